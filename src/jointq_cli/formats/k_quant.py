"""Weights on the K-quant grids of llama.cpp: scales of blocks that are themselves quantised.

A super-block is 256 neighbouring columns of a row, cut into blocks of 16 or 32. With a code q of a weight, the small
integers sc and mn of its block, and the float16 numbers d and dmin of its super-block, a weight is

    w ~ d sc (q - zero) - dmin mn

ggml-common.h and ggml-quants.c of llama.cpp. Types without mins (Q3_K, Q6_K) have signed sc and the code `zero` in the
middle; the others have mn and zero = 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from jointq_cli.errors import ModelError
from jointq_cli.formats.base import StoredWeight

SUPER_BLOCK = 256  # columns


@dataclass(frozen=True)
class KGrid:
    """One type. bits: of a code; block: columns of a block; zero: the code of the value 0 if there are no mins;
    scales: the least and largest sc; last_min: the largest mn, 0 if there are no mins; stored_bytes: of a super-block.
    """

    name: str
    bits: int
    block: int
    zero: int
    scales: tuple[int, int]
    last_min: int
    stored_bytes: int

    @property
    def label(self) -> str:
        """As llama.cpp writes it: "Q4_K"."""
        return self.name.upper()

    @property
    def last_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def has_mins(self) -> bool:
        return self.last_min > 0

    @property
    def blocks(self) -> int:
        """In a super-block."""
        return SUPER_BLOCK // self.block


K_GRIDS: Mapping[str, KGrid] = {
    grid.name: grid
    for grid in (
        KGrid("q2_k", bits=2, block=16, zero=0, scales=(0, 15), last_min=15, stored_bytes=84),
        KGrid("q3_k", bits=3, block=16, zero=4, scales=(-32, 31), last_min=0, stored_bytes=110),
        KGrid("q4_k", bits=4, block=32, zero=0, scales=(0, 63), last_min=63, stored_bytes=144),
        KGrid("q5_k", bits=5, block=32, zero=0, scales=(0, 63), last_min=63, stored_bytes=176),
        KGrid("q6_k", bits=6, block=16, zero=32, scales=(-128, 127), last_min=0, stored_bytes=210),
    )
}
_BY_BITS = {grid.bits: grid for grid in K_GRIDS.values()}
_PARTS = ("codes", "scales", "mins", "d", "dmin")


@dataclass(frozen=True, eq=False)
class KQuantWeight(StoredWeight):
    """A linear layer on a K grid.

    codes (out, in) uint8; scales (out, blocks) int8: sc; mins (out, blocks) uint8: mn; d and dmin (out, super-blocks)
    float16. Without mins, `mins` and `dmin` have no columns.
    """

    kind: ClassVar[str] = "k_quant"

    codes: Tensor
    scales: Tensor
    mins: Tensor
    d: Tensor
    dmin: Tensor
    grid: KGrid

    @classmethod
    def joined(cls, parts: Sequence["KQuantWeight"]) -> "KQuantWeight":
        if len(parts) == 1:
            return parts[0]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in _PARTS}, grid=parts[0].grid)

    @classmethod
    def empty(cls, out_features: int, in_features: int, grid: KGrid, device: torch.device) -> "KQuantWeight":
        """Tensors of the right shapes, with any content."""
        blocks, super_blocks = in_features // grid.block, in_features // SUPER_BLOCK
        return cls(
            codes=torch.empty(out_features, in_features, dtype=torch.uint8, device=device),
            scales=torch.empty(out_features, blocks, dtype=torch.int8, device=device),
            mins=torch.empty(out_features, blocks * grid.has_mins, dtype=torch.uint8, device=device),
            d=torch.empty(out_features, super_blocks, dtype=torch.float16, device=device),
            dmin=torch.empty(out_features, super_blocks * grid.has_mins, dtype=torch.float16, device=device),
            grid=grid,
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def label(self) -> str:
        return self.grid.label

    @property
    def stored_bits(self) -> int:
        """Those of llama.cpp's super-blocks, which hold all of it."""
        return 8 * self.grid.stored_bytes * self.d.numel()

    def record_fields(self) -> dict[str, Any]:
        return super().record_fields() | {"bits": self.grid.bits, "group_size": self.grid.block}

    def take_rows(self, rows: Tensor) -> "KQuantWeight":
        """The layer with the rows in another order, or some of them. rows: indices."""
        return replace(self, **{name: getattr(self, name)[rows] for name in _PARTS})

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """d sc (q - zero) - dmin mn, in float32 and in the order of llama.cpp, whose values these are to the bit."""
        rows, columns = self.shape
        codes = (self.codes.to(torch.float32) - self.grid.zero).view(rows, -1, self.grid.blocks, self.grid.block)
        step = self.d.to(torch.float32)[:, :, None] * self.scales.to(torch.float32).view(rows, -1, self.grid.blocks)
        values = codes.mul_(step[..., None])
        if self.grid.has_mins:
            mins = self.mins.to(torch.float32).view(rows, -1, self.grid.blocks)
            values -= (self.dmin.to(torch.float32)[:, :, None] * mins)[..., None]
        return values.view(rows, columns).to(dtype)

    def to_tensors(self) -> dict[str, Tensor]:
        """`format` holds the bits of a code, which name the type."""
        tensors = {name: getattr(self, name).contiguous() for name in _PARTS}
        return tensors | {"format": torch.tensor([self.grid.bits], dtype=torch.int32)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "KQuantWeight":
        missing = [name for name in (*_PARTS, "format") if name not in tensors]
        if missing:
            raise ModelError(f"tensor {', '.join(missing)} is missing")
        return cls(**{name: tensors[name] for name in _PARTS}, grid=_BY_BITS[int(tensors["format"][0])])
