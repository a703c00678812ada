"""Texts as a recipe's `evaluation` group names them."""

from dataclasses import dataclass
from pathlib import Path

from jointq_cli.data.text import TextSource


@dataclass(frozen=True)
class Evaluation(TextSource):
    """In place of the recipe's group of that name."""


def source(
    dataset: str = "text",
    path: Path | str | None = None,
    split: str = "train",
    column: str | None = None,
    revision: str | None = None,
) -> TextSource:
    return Evaluation(dataset, None if path is None else str(path), None, split, column, revision)
