"""Weights on a uniform integer grid: the levels of the grid, and the stored form.

A weight w is stored as a code a with w ~ (a - zero_point) * scale. Asymmetric: a in [0, 2^bits - 1] and
zero_point an integer of that range. Symmetric: a in [-2^(bits-1), 2^(bits-1) - 1] and zero_point 0. One scale
and zero-point per row and group of columns. Scales are rounded to the checkpoint's dtype *before* codes are
chosen, so codes are the nearest ones for the stored scale. Nothing here depends on the absolute size of the
weights: where the dtype's exponent allows, a layer times a power of two has the same codes to the bit.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from jointq_cli import kernels
from jointq_cli.errors import ConfigError, ModelError
from jointq_cli.formats.base import StoredWeight

MOST_NAMED = 3  # layers in an error message


@dataclass(frozen=True)
class Grid:
    """The codes of one grid: 2^bits consecutive integers."""

    bits: int
    symmetric: bool

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def highest(self) -> int:
        return self.lowest + (1 << self.bits) - 1

    @property
    def box(self) -> kernels.Box:
        """The values that code - zero_point can have, over all zero-points."""
        return kernels.Box(self.lowest - (0 if self.symmetric else self.highest), self.highest, (1 << self.bits) - 1)

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.int8 if self.symmetric else torch.uint8

    def covering_scale(self, low: Tensor, high: Tensor) -> Tensor:
        """The smallest scale whose levels cover `low` <= 0 to `high` >= 0 within half a step; 1 where both are 0."""
        steps = float((1 << self.bits) - 1)
        if not self.symmetric:
            scale = (high - low) / steps
        elif self.bits == 1:  # levels -1 and 0: with the formula below, -1 would be twice the extreme value
            scale = torch.maximum(high, -low)
        else:
            scale = 2.0 * torch.maximum(high, -low) / steps
        return torch.where(scale == 0, 1.0, scale)

    def zero_point(self, low: Tensor, scale: Tensor) -> Tensor:
        """The code of the value 0 if the lowest code represents about `low`; integers as float32."""
        if self.symmetric:
            return torch.zeros_like(scale)
        return torch.round(-low / scale).clamp_(0, self.highest)

    def nearest_codes(self, values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Codes of `values` by rounding to nearest, ties to even; all arguments float32 and broadcastable."""
        codes = torch.round(values / scale).add_(zero_point).clamp_(self.lowest, self.highest)
        return codes.to(self.code_dtype)


def group_columns(group_size: int | None, in_features: int) -> int:
    """Columns that share a scale; null and -1: all of the row."""
    return in_features if group_size in (None, -1) else int(group_size or in_features)


def check_group_size(group_size: int | None, in_features: Mapping[str, int]) -> None:
    """in_features by layer name. Raises ConfigError, naming layers, unless `group_size` divides all of them."""
    if group_size in (None, -1):
        return
    key = f"quantizer.group_size={group_size}"
    if group_size is None or group_size < 1:
        raise ConfigError(f"{key}: must be positive, or null (-1) for one scale per row")
    offending = [f"{name} ({size})" for name, size in in_features.items() if size % group_size]
    if offending:
        more = f" and {len(offending) - MOST_NAMED} more" if len(offending) > MOST_NAMED else ""
        common = math.gcd(*in_features.values())
        sizes = ", ".join(str(size) for size in range(1, common + 1) if common % size == 0)
        raise ConfigError(
            f"{key}: must divide in_features, and does not for {', '.join(offending[:MOST_NAMED])}{more}; "
            f"sizes that divide all layers: {sizes}; or null for one scale per row"
        )


def grid_label(bits: int, group_size: int | None, symmetric: bool) -> str:
    """Such as "W4 g128 asymmetric"; group_size null or -1: one scale per row."""
    groups = "per-channel" if group_size in (None, -1) else f"g{group_size}"
    return f"W{bits} {groups} {'symmetric' if symmetric else 'asymmetric'}"


@dataclass(frozen=True, eq=False)
class UniformWeight(StoredWeight):
    """A linear layer on a uniform grid. Codes are in the original order of the columns.

    codes (out, in) uint8, or int8 when symmetric; scale (out, groups) in the checkpoint's dtype; zero_point
    (out, groups) uint8; permutation (in,) int32 or None: column permutation[j] belongs to group j //
    group_size, with None column j does.
    """

    kind: ClassVar[str] = "uniform"

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    permutation: Tensor | None
    bits: int
    symmetric: bool

    @classmethod
    def joined(cls, parts: Sequence["UniformWeight"]) -> "UniformWeight":
        if len(parts) == 1:
            return parts[0]
        return replace(
            parts[0],
            codes=torch.cat([part.codes for part in parts]),
            scale=torch.cat([part.scale for part in parts]),
            zero_point=torch.cat([part.zero_point for part in parts]),
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group_size(self) -> int:
        """Columns per scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    @property
    def label(self) -> str:
        return grid_label(self.bits, self.group_size if self.scale.shape[1] > 1 else None, self.symmetric)

    @property
    def stored_bits(self) -> int:
        """Codes, scales, zero-points if asymmetric, and the permutation with 32 bits a column."""
        per_group = 8 * self.scale.element_size() + (0 if self.symmetric else self.bits)
        permutation = 0 if self.permutation is None else 32 * len(self.permutation)
        return self.bits * self.codes.numel() + per_group * self.scale.numel() + permutation

    def record_fields(self) -> dict[str, Any]:
        return super().record_fields() | {"bits": self.bits, "group_size": self.group_size}

    def take_rows(self, rows: Tensor) -> "UniformWeight":
        """The layer with the rows in another order, or some of them. rows: indices."""
        return replace(self, codes=self.codes[rows], scale=self.scale[rows], zero_point=self.zero_point[rows])

    def unsigned_codes(self) -> Tensor:
        """(out, in) uint8: the codes counted from 0, as packed formats store them."""
        return self.codes.view(torch.uint8) - (Grid(self.bits, self.symmetric).lowest & 255)  # modulo 256

    def unsigned_zero_point(self) -> Tensor:
        """(out, groups) uint8: the zero-point of `unsigned_codes`."""
        return self.zero_point - (Grid(self.bits, self.symmetric).lowest & 255)

    def column_groups(self) -> Tensor:
        """(in,) int64: the group of each column."""
        order = torch.arange(self.codes.shape[1], device=self.codes.device)
        if self.permutation is None:
            return order // self.group_size
        return torch.empty_like(order).scatter_(0, self.permutation.long(), order // self.group_size)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """(codes - zero_point) * scale."""
        groups = self.column_groups()
        offset = self.zero_point.to(torch.float32)[:, groups]
        weight = self.codes.to(torch.float32).sub_(offset)
        return weight.mul_(self.scale.to(torch.float32)[:, groups]).to(dtype)

    def to_tensors(self) -> dict[str, Tensor]:
        """`format` holds bits and whether symmetric."""
        tensors = {
            "codes": self.codes.contiguous(),
            "scale": self.scale.contiguous(),
            "zero_point": self.zero_point.contiguous(),
            "format": torch.tensor([self.bits, int(self.symmetric)], dtype=torch.int32),
        }
        if self.permutation is not None:
            tensors["permutation"] = self.permutation.contiguous()
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "UniformWeight":
        missing = [name for name in ("codes", "scale", "zero_point", "format") if name not in tensors]
        if missing:
            raise ModelError(f"tensor {', '.join(missing)} is missing")
        bits, symmetric = tensors["format"].tolist()
        return cls(
            codes=tensors["codes"],
            scale=tensors["scale"],
            zero_point=tensors["zero_point"],
            permutation=tensors.get("permutation"),
            bits=bits,
            symmetric=bool(symmetric),
        )
