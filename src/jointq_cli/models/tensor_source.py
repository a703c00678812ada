"""What a model needs of the place that its weights come from."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor


class TensorSource(Protocol):
    """The tensors of one model by name: stored, as in a `Checkpoint`, or computed when they are read."""

    @property
    def directory(self) -> Path:
        """Holds config.json, and the Python files of a model that brings its own; error messages name it."""

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, by its stored name."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, on the CPU."""
