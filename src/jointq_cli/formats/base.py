"""The contract of a stored weight: what a quantizer returns, and what the loop, files, audit and reports use.

A new kind is a direct subclass with its own `kind`, imported in formats/__init__.py; nothing else changes.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorDifference:
    """One respect in which two stored weights differ, such as "3 of 64 scales", and the largest relative difference."""

    text: str
    relative: float = 0.0


class StoredWeight(ABC):
    """The weight of a linear layer as it is stored: a few tensors, from which `dequantize` computes the weight."""

    kind: ClassVar[str]  # written to the metadata of its file
    form_tensors: ClassVar[tuple[str, ...]] = ()  # small ones, whose values are known where only the form is read

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""

    @property
    @abstractmethod
    def label(self) -> str:
        """The form in a few words, such as "W4 g128 asymmetric"."""

    @property
    @abstractmethod
    def stored_bits(self) -> int:
        """Bits that the layer takes with its codes packed; everything else that `dequantize` needs is counted too."""

    @property
    def bits_per_weight(self) -> float:
        return self.stored_bits / (self.shape[0] * self.shape[1])

    @property
    def file_bytes(self) -> int:
        """Bytes of the tensors in its file, where codes are not packed."""
        return sum(tensor.nbytes for tensor in self.to_tensors().values())

    @abstractmethod
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in), computed in float32 and rounded to `dtype`."""

    @abstractmethod
    def to_tensors(self) -> dict[str, Tensor]:
        """Everything as contiguous tensors for a safetensors file."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `to_tensors`. Raises ModelError where a tensor is missing."""

    @classmethod
    @abstractmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The layer whose rows are those of the parts, concatenated."""

    def record_fields(self) -> dict[str, Any]:
        """The fields of a LayerRecord that depend on the form. bits and group_size: None where a kind has none."""
        return {"label": self.label, "bits": None, "group_size": None, "bits_per_weight": self.bits_per_weight}

    def to(self, device: torch.device | str) -> Self:
        return self.from_tensors({name: tensor.to(device) for name, tensor in self.to_tensors().items()})

    def difference(self, other: "StoredWeight") -> list[TensorDifference]:
        """How the tensors of two weights differ; empty where they are equal."""
        ours, theirs = self.to_tensors(), other.to_tensors()
        shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (ours, theirs)]
        if self.label != other.label or shapes[0] != shapes[1]:
            return [TensorDifference(f"{self.label} {list(self.shape)} → {other.label} {list(other.shape)}")]
        pairs = [(name, tensor, theirs[name]) for name, tensor in ours.items()]
        return [_difference(*pair) for pair in pairs if bool((pair[1] != pair[2]).any())]


def _difference(name: str, ours: Tensor, theirs: Tensor) -> TensorDifference:
    noun = name.replace("_", "-").removesuffix("s") + "s"
    text = f"{int((ours != theirs).sum())} of {ours.numel()} {noun}"
    if not ours.is_floating_point():
        return TensorDifference(text)
    first, second = ours.double(), theirs.double()
    relative = ((second - first).abs() / first.abs()).nan_to_num(nan=0.0, posinf=torch.inf)  # nan: both are 0
    return TensorDifference(text, relative.max().item())
