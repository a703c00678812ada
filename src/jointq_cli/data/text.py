"""Which text a recipe names, and a text as an iterator of documents.

Knows the names and conventions of the data sets. How they are read is in `local_files`, `hub` and `pydoc`; `corpus`
chooses between these.
"""

import hashlib
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jointq_cli.data import pydoc as pydoc_text
from jointq_cli.data.chat import Document, instruction, messages
from jointq_cli.errors import ConfigError, TextError
from jointq_cli.setting_rules import check_settings, setting

MOST_NAMES: Final = 8  # columns that a message lists
COLUMN: Final = "text"


@dataclass(frozen=True)
class HubDataset:
    """A data set of the hub, and how papers turn it into one text for perplexity."""

    repository: str
    config: str
    splits: tuple[str, ...]
    streamed: bool  # too large to download: documents are fetched as they are iterated
    running: bool  # rows are the lines of one continuous text, blank ones included, rather than documents
    joint: str  # the separator of rows in an evaluation text
    evaluated: int | None  # the number of documents in the evaluation text, None for all


# The evaluation texts are those of GPTQ (Frantar et al., ICLR 2023, datautils.py): WikiText-2's rows joined
# by a blank line; the first 1100 documents of C4 joined by a space.
HUB: Final = {
    "wikitext2": HubDataset(
        "Salesforce/wikitext", "wikitext-2-raw-v1", ("train", "validation", "test"), False, True, "\n\n", None
    ),
    "c4": HubDataset("allenai/c4", "en", ("train", "validation"), True, False, " ", 1100),
}
DATASETS: Final = ("pydoc", "text", *HUB)
GENERATED: Final = "generated"  # by the model that is calibrated; of calibration only


@dataclass(frozen=True)
class TextSource:
    """Which text to read: the base class of the recipe's groups `calibration` and `evaluation`.

    dataset: `pydoc` (the documentation that this Python installation carries), `text` (local files),
    `wikitext2` or `c4` (the hub; with `path` a local copy). path: a file or a glob. A .txt, .raw or .md file
    is one document; for wikitext2 it is the raw file with a row on each line. .jsonl, .ndjson, .json, .csv, .tsv
    and .parquet have one document per row, in `column` (null: "text"; "meta.text" for a key of a nested object). A
    column of messages (role and content, or ShareGPT's from and value), or three columns instruction+input+output, are
    conversations: they become text through the tokenizer's chat template. All but .parquet may be compressed, as .gz or
    .zst. config and revision apply to the hub only. split names a part of pydoc, wikitext2 or c4, and is only a label
    for `text`.

    Raises ConfigError for a value that is none of these.
    """

    dataset: str = setting("pydoc", choices=DATASETS)
    path: str | None = setting(None, place=True)
    config: str | None = setting(None)
    split: str = setting("evaluation")
    column: str | None = setting(None)
    revision: str | None = setting(None, decides=False)  # the hash of the tokens decides

    def __post_init__(self) -> None:
        check_settings(self, self.section)
        if self.dataset == "text" and not self.path:
            raise ConfigError(f"{self.section}.dataset=text: needs {self.section}.path=FILE")
        if self.dataset in ("pydoc", GENERATED) and self.path:
            rule = f"{self.dataset} reads no file; add {self.section}.dataset=text"
            raise ConfigError(f"{self.section}.path={self.path}: {rule}")
        if self.dataset not in ("text", GENERATED) and self.split not in self._splits:
            raise ConfigError(
                f"{self.section}.split={self.split}: must be one of {', '.join(self._splits)} "
                f"for {self.section}.dataset={self.dataset}"
            )

    @property
    def is_on_hub(self) -> bool:
        """Whether the text has to be downloaded."""
        return self.dataset in HUB and not self.path

    @property
    def section(self) -> str:
        """The recipe's group that this is, for messages; groups have the names of their dataclasses."""
        return type(self).__name__.lower()

    def provenance(self, **more: str) -> dict[str, str]:
        return {"dataset": self.dataset, "split": self.split, **more}

    @property
    def _splits(self) -> tuple[str, ...]:
        return HUB[self.dataset].splits if self.dataset in HUB else pydoc_text.SPLITS


@dataclass(frozen=True)
class Corpus:
    """An opened text. `documents` can be iterated once, and is read only as far as it is iterated."""

    documents: Iterator[Document]
    provenance: dict[str, str]  # dataset, split, revision; config or files where there are any
    running: bool = False  # documents are the lines of one continuous text: join them with `joint`
    joint: str = "\n\n"  # the separator of documents in a running or an evaluation text
    streamed: bool = False  # practically endless
    evaluated: int | None = None  # the number of documents in an evaluation text, None for all
    column: str = ""  # the key that names the column, for messages


def text_hash(parts: list[str]) -> str:
    """sha256, 64 hex digits, of the documents joined by a blank line."""
    digest = hashlib.sha256()
    for number, part in enumerate(parts):
        # surrogatepass: JSON can contain a lone surrogate
        digest.update((("\n\n" if number else "") + part).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def has_column(row: dict[str, Any], column: str) -> bool:
    """Whether a table's row has the column; "meta.text" is also the key text of an object in the column meta."""
    if column in row:
        return True
    outer, _, inner = column.partition(".")
    value = row.get(outer)
    return bool(inner) and isinstance(value, dict) and has_column(value, inner)


def column_names(row: dict[str, Any]) -> list[str]:
    """The columns of a row, with dotted names for the keys of objects."""
    names = []
    for name, value in row.items():
        inner = column_names(value) if isinstance(value, dict) else []
        names += [f"{name}.{key}" for key in inner] or [str(name)]
    return names


def columns(source: TextSource) -> list[str]:
    """The columns of a table that a document is read from: one, or three of an instruction, its input and output."""
    column = source.column or COLUMN
    several = re.split("[+,]", column)
    return several if len(several) == 3 else [column]


def row_document(source: TextSource, row: dict[str, Any], place: Path | None) -> Document:
    """The text or the conversation of a table's row, "" for null. place: its file, None for the hub. Raises TextError
    where the row has no such column, or neither text nor messages in it."""
    names = columns(source)
    if len(names) == 3:
        task, context, answer = (_cell_text(source, row, name, place) for name in names)
        return instruction(task, context, answer)
    value = _found(source, row, names[0], place)
    chat = messages(value)
    return _cell_text(source, row, names[0], place) if chat is None else chat


def _found(source: TextSource, row: dict[str, Any], column: str, place: Path | None) -> Any:
    where = place if place is not None else source.dataset
    if not has_column(row, column):
        names = [textwrap.shorten(name, 40, placeholder="…") for name in column_names(row)]
        listed = ", ".join(names[:MOST_NAMES]) + (
            f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        )
        raise TextError(f"{source.section}.column={column}: {where} has no such column; it has {listed}")
    return _cell(row, column)


def _cell_text(source: TextSource, row: dict[str, Any], column: str, place: Path | None) -> str:
    value = _found(source, row, column, place)
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    where = place if place is not None else source.dataset
    kind = type(value).__name__
    raise TextError(f"{source.section}.column={column}: {where} holds {kind} there, not text or messages")


def _cell(row: dict[str, Any], column: str) -> Any:
    if column in row:
        return row[column]
    outer, _, inner = column.partition(".")
    return _cell(row[outer], inner)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
