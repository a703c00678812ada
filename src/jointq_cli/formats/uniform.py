"""Weights on a uniform integer grid: the levels of the grid, and the stored form.

A weight w is stored as a code a with w ~ (a - zero_point) * scale. Asymmetric: a in [0, 2^bits - 1] and
zero_point an integer of that range; or half of 2^bits - 1 everywhere, so that the levels are half-integers around zero
and no zero-point is stored; or any real number. Symmetric: a in [-2^(bits-1), 2^(bits-1) - 1] and zero_point 0. One
scale and zero-point per row and group of columns. Scales are rounded to the checkpoint's dtype *before* codes are
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
ZERO_POINTS = ("integer", "half", "real")
_FARTHEST = 2.0**12  # steps from zero to a group's range, if zero-points are real: float16 holds eight times more


@dataclass(frozen=True)
class Grid:
    """The codes of one grid: 2^bits consecutive integers. zero: of ZERO_POINTS; integer where symmetric."""

    bits: int
    symmetric: bool
    zero: str = "integer"

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def highest(self) -> int:
        return self.lowest + (1 << self.bits) - 1

    @property
    def box(self) -> kernels.Box:
        """The values that code - zero_point can have, over all zero-points; of real ones, but for a shift of all."""
        span = (1 << self.bits) - 1
        if self.zero == "half":
            return kernels.Box(-span / 2, span / 2, span)
        return kernels.Box(self.lowest - (0 if self.symmetric else self.highest), self.highest, span)

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.int8 if self.symmetric else torch.uint8

    def ends(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest and highest weight (groups,) that levels should cover; groups (groups, columns)."""
        low, high = torch.aminmax(groups, dim=1)
        if self.zero == "half":
            high = torch.maximum(high, -low)
            return -high, high
        return (low, high) if self.zero == "real" else (low.clamp_max_(0.0), high.clamp_min_(0.0))

    def covering_scale(self, low: Tensor, high: Tensor) -> Tensor:
        """The smallest scale whose levels cover `ends` within half a step; 1 where both are 0, but 0 where no level
        is."""
        steps = float((1 << self.bits) - 1)
        if self.zero == "half":
            return (high - low) / steps
        if self.zero == "real":
            scale = torch.maximum((high - low) / steps, torch.maximum(high, -low) / _FARTHEST)
        elif not self.symmetric:
            scale = (high - low) / steps
        elif self.bits == 1:  # levels -1 and 0: with the formula below, -1 would be twice the extreme value
            scale = torch.maximum(high, -low)
        else:
            scale = 2.0 * torch.maximum(high, -low) / steps
        return torch.where(scale == 0, 1.0, scale)

    def zero_point(self, low: Tensor, scale: Tensor) -> Tensor:
        """The code of the value 0 if the lowest code represents `low`, or about that; float32."""
        if self.symmetric:
            return torch.zeros_like(scale)
        if self.zero == "half":
            return torch.full_like(scale, self.highest / 2)
        return -low / scale if self.zero == "real" else torch.round(-low / scale).clamp_(0, self.highest)

    def stored_zero_point(self, zero_point: Tensor, scale_dtype: torch.dtype) -> Tensor | None:
        """As a UniformWeight has it."""
        if self.zero == "half":
            return None
        return zero_point.to(scale_dtype if self.zero == "real" else torch.uint8)

    def nearest_codes(self, values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Codes of `values` by rounding to nearest, ties to even; all arguments float32 and broadcastable."""
        whole = torch.floor(zero_point)
        codes = torch.round((values / scale).add_(zero_point - whole)).add_(whole)
        return codes.clamp_(self.lowest, self.highest).to(self.code_dtype)


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


def grid_label(grid: Grid, group_size: int | None) -> str:
    """Such as "W4 g128 asymmetric" or "W2 g64 half"; group_size null or -1: one scale per row."""
    groups = "per-channel" if group_size in (None, -1) else f"g{group_size}"
    kind = "symmetric" if grid.symmetric else "asymmetric" if grid.zero == "integer" else grid.zero
    return f"W{grid.bits} {groups} {kind}"


@dataclass(frozen=True, eq=False)
class UniformWeight(StoredWeight):
    """A linear layer on a uniform grid. Codes are in the original order of the columns.

    codes (out, in) uint8, or int8 when symmetric; scale (out, groups) in the checkpoint's dtype; zero_point
    (out, groups) uint8, in scale's dtype where it is real, None where it is half; permutation (in,) int32 or None:
    column permutation[j] belongs to group j // group_size, with None column j does.
    """

    kind: ClassVar[str] = "uniform"

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
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
            zero_point=None
            if parts[0].zero_point is None
            else torch.cat([part.zero_point for part in parts if part.zero_point is not None]),
        )

    @property
    def grid(self) -> Grid:
        if self.zero_point is None:
            return Grid(self.bits, self.symmetric, "half")
        return Grid(self.bits, self.symmetric, "real" if self.zero_point.is_floating_point() else "integer")

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group_size(self) -> int:
        """Columns per scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    @property
    def label(self) -> str:
        return grid_label(self.grid, self.group_size if self.scale.shape[1] > 1 else None)

    @property
    def stored_bits(self) -> int:
        """Codes, scales, zero-points if there are any, and the permutation with 32 bits a column."""
        scale_bits = 8 * self.scale.element_size()
        zero_bits = {"integer": self.bits, "half": 0, "real": scale_bits}[self.grid.zero]
        per_group = scale_bits + (0 if self.symmetric else zero_bits)
        permutation = 0 if self.permutation is None else 32 * len(self.permutation)
        return self.bits * self.codes.numel() + per_group * self.scale.numel() + permutation

    def record_fields(self) -> dict[str, Any]:
        return super().record_fields() | {"bits": self.bits, "group_size": self.group_size}

    def take_rows(self, rows: Tensor) -> "UniformWeight":
        """The layer with the rows in another order, or some of them. rows: indices."""
        zero_point = None if self.zero_point is None else self.zero_point[rows]
        return replace(self, codes=self.codes[rows], scale=self.scale[rows], zero_point=zero_point)

    def unsigned_codes(self) -> Tensor:
        """(out, in) uint8: the codes counted from 0, as packed formats store them."""
        return self.codes.view(torch.uint8) - (Grid(self.bits, self.symmetric).lowest & 255)  # modulo 256

    def unsigned_zero_point(self) -> Tensor:
        """(out, groups) uint8: the zero-point of `unsigned_codes`; float32 where it is no integer."""
        if self.zero_point is None or self.zero_point.is_floating_point():
            return self.zero_points()
        return self.zero_point - (Grid(self.bits, self.symmetric).lowest & 255)

    def zero_points(self) -> Tensor:
        """(out, groups) float32."""
        if self.zero_point is None:
            return torch.full(self.scale.shape, self.grid.highest / 2, device=self.scale.device)
        return self.zero_point.to(torch.float32)

    def column_groups(self) -> Tensor:
        """(in,) int64: the group of each column."""
        order = torch.arange(self.codes.shape[1], device=self.codes.device)
        if self.permutation is None:
            return order // self.group_size
        return torch.empty_like(order).scatter_(0, self.permutation.long(), order // self.group_size)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """(codes - zero_point) * scale."""
        groups = self.column_groups()
        offset = self.zero_points()[:, groups]
        weight = self.codes.to(torch.float32).sub_(offset)
        return weight.mul_(self.scale.to(torch.float32)[:, groups]).to(dtype)

    def to_tensors(self) -> dict[str, Tensor]:
        """`format` holds bits, whether symmetric, and the number of the kind of zero-points unless that is 0."""
        kind = ZERO_POINTS.index(self.grid.zero)
        numbers = [self.bits, int(self.symmetric), *([kind] if kind else [])]
        tensors = {
            "codes": self.codes.contiguous(),
            "scale": self.scale.contiguous(),
        }
        if self.zero_point is not None:
            tensors["zero_point"] = self.zero_point.contiguous()
        tensors["format"] = torch.tensor(numbers, dtype=torch.int32)
        if self.permutation is not None:
            tensors["permutation"] = self.permutation.contiguous()
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "UniformWeight":
        numbers = tensors["format"].tolist() if "format" in tensors else []
        is_half = numbers[2:] == [ZERO_POINTS.index("half")]
        needed = ("codes", "scale", *(() if is_half else ("zero_point",)), "format")
        missing = [name for name in needed if name not in tensors]
        if missing:
            raise ModelError(f"tensor {', '.join(missing)} is missing")
        bits, symmetric = numbers[:2]
        return cls(
            codes=tensors["codes"],
            scale=tensors["scale"],
            zero_point=tensors.get("zero_point"),
            permutation=tensors.get("permutation"),
            bits=bits,
            symmetric=bool(symmetric),
        )
