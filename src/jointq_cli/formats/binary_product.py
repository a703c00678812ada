"""Products of two sign matrices with scales: W = diag(a) S1 diag(d) S2 diag(b).

(Double binary factorisation: Boza, Macko, arXiv 2505.11076. S1 is (out, rank), S2 (rank, in).) The rank decides the
size, so that any number of bits per weight is possible.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from jointq_cli.errors import ModelError
from jointq_cli.formats.base import StoredWeight

_ROWS_AT_ONCE = 1024  # in float64
_NAMES = ("left", "right", "out_scale", "rank_scale", "in_scale")


def packed_signs(signs: Tensor) -> Tensor:
    """(rows, ceil(columns / 8)) uint8 of signs (rows, columns): bit i of byte j says whether column 8 j + i is 1."""
    bits = torch.nn.functional.pad((signs > 0).to(torch.uint8), (0, -signs.shape[1] % 8)).unflatten(1, (-1, 8))
    packed: Tensor = (bits << torch.arange(8, dtype=torch.uint8, device=signs.device)).sum(dim=2, dtype=torch.uint8)
    return packed


def unpacked_signs(packed: Tensor, columns: int) -> Tensor:
    """(rows, columns) int8 of 1 and -1."""
    bits = packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten(1)[:, :columns].to(torch.int8).mul_(2).sub_(1)


def largest_rank(bits: float, out_features: int, in_features: int, dtype: torch.dtype) -> int:
    """The largest rank with which a layer takes at most `bits` per weight, scales in `dtype` counted; below 1 where
    not even rank 1 does."""
    width = 8 * dtype.itemsize
    budget = bits * out_features * in_features - width * (out_features + in_features)
    return int(budget // (out_features + -out_features % 8 + in_features + -in_features % 8 + width))


@dataclass(frozen=True, eq=False)
class BinaryProduct(StoredWeight):
    """See the module. left (rank, ceil(out / 8)) uint8: the signs of S1 transposed, and right (rank, ceil(in / 8))
    those of S2, as `packed_signs` has them; out_scale a (out,), rank_scale d (rank,), in_scale b (in,) of the
    checkpoint's dtype."""

    kind: ClassVar[str] = "binary_product"

    left: Tensor
    right: Tensor
    out_scale: Tensor
    rank_scale: Tensor
    in_scale: Tensor

    @classmethod
    def empty(
        cls, rank: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
    ) -> "BinaryProduct":
        packed = (
            torch.empty(rank, -(-size // 8), dtype=torch.uint8, device=device) for size in (out_features, in_features)
        )
        scales = (torch.empty(size, dtype=dtype, device=device) for size in (out_features, rank, in_features))
        return cls(*packed, *scales)

    @classmethod
    def joined(cls, parts: Sequence["BinaryProduct"]) -> "BinaryProduct":
        [complete] = parts  # no rows can be solved alone: all have S2 in common
        return complete

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.out_scale), len(self.in_scale)

    @property
    def label(self) -> str:
        return f"DBF rank {len(self.rank_scale)}"

    @property
    def stored_bits(self) -> int:
        """Those of its file."""
        return 8 * self.file_bytes

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """In float64, of which rounding to `dtype` leaves the same on every machine."""
        outer, inner = self.shape
        right = unpacked_signs(self.right, inner).double().mul_(self.rank_scale.double()[:, None])
        right.mul_(self.in_scale.double())
        left = unpacked_signs(self.left, outer).T
        return torch.cat(
            [
                (rows.double() @ right).mul_(scale.double()[:, None]).to(dtype)
                for rows, scale in zip(left.split(_ROWS_AT_ONCE), self.out_scale.split(_ROWS_AT_ONCE), strict=True)
            ]
        )

    def to_tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).contiguous() for name in _NAMES}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "BinaryProduct":
        missing = [name for name in _NAMES if name not in tensors]
        if missing:
            raise ModelError(f"tensor {', '.join(missing)} is missing")
        return cls(*(tensors[name] for name in _NAMES))
