"""Weights on a uniform grid in another basis of their input: incoherence of the input side.

W = V Q^T with Q = diag(signs) H / sqrt(in), a random orthogonal matrix: V, whose entries are alike in size, is what has
codes and scales. H is the Hadamard matrix of `kernels.hadamard`, with equal blocks on the diagonal where there is none
of that size. Fewer signs than columns stand for a Q of their size, repeated along the diagonal. (QuIP, Chee et al.,
arXiv 2307.13304; signs and Hadamard as in QuIP#, arXiv 2402.04396. Both turn the rows too, which gains nothing where
each has scales of its own.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from jointq_cli.errors import ModelError
from jointq_cli.formats.base import StoredWeight
from jointq_cli.formats.uniform import UniformWeight
from jointq_cli.kernels.hadamard import hadamard_transform

_ROWS_AT_ONCE = 1024  # in float64


def random_signs(size: int, seed: int, device: torch.device) -> Tensor:
    """(size,) int8 of 1 and -1."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randint(2, (size,), generator=generator, dtype=torch.int8) - 1).to(device)


def turned(rows: Tensor, signs: Tensor) -> Tensor:
    """rows Q (..., in) float64."""
    return hadamard_transform(rows.double().unflatten(-1, (-1, len(signs))) * signs).flatten(-2)


def turned_label(block: int | None) -> str:
    """After the grid's. block: columns of it, None for all."""
    return " turned" if block is None else f" turned b{block}"


@dataclass(frozen=True, eq=False)
class TurnedWeight(StoredWeight):
    """See the module. signs (block,) int8, of which the columns have one or several: in of Q as a whole."""

    kind: ClassVar[str] = "turned"
    form_tensors: ClassVar[tuple[str, ...]] = ("signs",)  # which some engines share between layers

    inner: UniformWeight
    signs: Tensor

    @classmethod
    def joined(cls, parts: Sequence["TurnedWeight"]) -> "TurnedWeight":
        return cls(UniformWeight.joined([part.inner for part in parts]), parts[0].signs)

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    @property
    def label(self) -> str:
        block = len(self.signs)
        return self.inner.label + turned_label(None if block == self.shape[1] else block)

    @property
    def stored_bits(self) -> int:
        """Those of the inner weight, and the signs."""
        return self.inner.stored_bits + len(self.signs)

    def record_fields(self) -> dict[str, Any]:
        return self.inner.record_fields() | {"label": self.label, "bits_per_weight": self.bits_per_weight}

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """In float64, of which rounding to `dtype` leaves the same on every machine."""
        blocks = self.inner.dequantize(torch.float32).unflatten(-1, (-1, len(self.signs)))
        parts = (
            hadamard_transform(rows.double(), transposed=True) * self.signs for rows in blocks.split(_ROWS_AT_ONCE)
        )
        return torch.cat([part.to(dtype) for part in parts]).flatten(-2)

    def to_tensors(self) -> dict[str, Tensor]:
        return {**self.inner.to_tensors(), "signs": self.signs.contiguous()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "TurnedWeight":
        if "signs" not in tensors:
            raise ModelError("tensor signs is missing")
        return cls(UniformWeight.from_tensors(tensors), tensors["signs"])
