"""Rounding to nearest on a K grid, with errors weighted by column, as llama.cpp does with an importance matrix.

For each block, steps on a grid of candidates are tried, each refined by least squares, as in `make_qkx3_quants` and
`make_qx_quants` of ggml-quants.c; then d and dmin are searched so that the rounded scales are near those. Afterwards
scales are refitted to the codes and codes rounded again, as long as the error falls.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from jointq_cli.formats.k_quant import SUPER_BLOCK, KGrid, KQuantWeight

STEP_TRIALS = 19  # steps of a block: its range divided by (levels + offset), offsets from -0.9 to 0.9
SCALE_TRIALS = 8  # of d and dmin: the largest scale divided by (largest integer + offset)
REFITS = 2
LEAST = 2.0**-24  # of d and dmin: float16's smallest number
AT_ONCE = 1 << 18  # weights that are rounded at once: what is computed of them stays in cache


@dataclass(frozen=True)
class KScales:
    """The scales of super-blocks, integers as float32: d, dmin (..., 1) and sc, mn (..., blocks). dmin and mn are 0
    where the grid has no mins."""

    d: Tensor
    dmin: Tensor
    sc: Tensor
    mn: Tensor

    @property
    def step(self) -> Tensor:
        return self.d * self.sc

    @property
    def offset(self) -> Tensor:
        return self.dmin * self.mn

    @classmethod
    def joined(cls, parts: Sequence["KScales"]) -> "KScales":
        """Of all super-blocks of some rows: the parts (rows, super-blocks, ...) next to each other."""
        return cls(*(torch.cat([getattr(part, name) for part in parts], dim=1) for name in _FIELDS))

    def where(self, condition: Tensor, others: "KScales") -> "KScales":
        """The others where the condition holds."""
        return KScales(*(torch.where(condition, getattr(others, name), getattr(self, name)) for name in _FIELDS))


_FIELDS = ("d", "dmin", "sc", "mn")


def round_to_k(values: Tensor, grid: KGrid, weights: Tensor | None = None) -> KQuantWeight:
    """values (rows, in) float32, in a multiple of 256; weights (in,) >= 0 of squared errors, None for equal ones.

    The result does not depend on other rows. Raises nothing; d beyond float16's range is inf, which callers check.
    """
    parts = [_round(part, grid, weights) for part in values.split(max(1, AT_ONCE // values.shape[1]))]
    return KQuantWeight.joined(parts)


def _round(values: Tensor, grid: KGrid, weights: Tensor | None) -> KQuantWeight:
    blocks, importance = in_blocks(values, weights, grid)
    scales, levels = fit_scales(blocks, importance, grid)
    return stored(scales, levels, grid)


def in_blocks(values: Tensor, weights: Tensor | None, grid: KGrid) -> tuple[Tensor, Tensor]:
    """values as (rows, super-blocks, blocks, columns), and weights that broadcast with it."""
    shape = (-1, grid.blocks, grid.block)
    rows, columns = values.shape
    importance = values.new_ones(columns) if weights is None else weights.to(values.dtype)
    mean = importance.view(-1, SUPER_BLOCK).mean(dim=1, keepdim=True)
    relative = importance.view(-1, SUPER_BLOCK) / mean.clamp_min(torch.finfo(mean.dtype).tiny)
    # A column that no token reaches must not have any value whatever: it may be reached later.
    return values.reshape(rows, *shape), relative.clamp_min(1e-6).view(shape)


def stored(scales: KScales, levels: Tensor, grid: KGrid) -> KQuantWeight:
    """levels z = code - zero (rows, super-blocks, blocks, columns)."""
    rows = len(levels)
    some = slice(None) if grid.has_mins else slice(0)
    return KQuantWeight(
        codes=(levels + grid.zero).to(torch.uint8).view(rows, -1),
        scales=scales.sc.to(torch.int8).view(rows, -1),
        mins=scales.mn.to(torch.uint8).view(rows, -1)[:, some],
        d=scales.d.to(torch.float16).view(rows, -1),
        dmin=scales.dmin.to(torch.float16).view(rows, -1)[:, some],
        grid=grid,
    )


def fit_scales(values: Tensor, weights: Tensor, grid: KGrid, exponent: int = 0) -> tuple[KScales, Tensor]:
    """Scales and levels of super-blocks. values (..., blocks, columns); weights broadcast with it.

    d and dmin are float16 numbers divided by 2^exponent. The first of equal candidates wins.
    """
    step, offset = _block_fit(values, weights, grid)
    levels = _nearest(values, step[..., None], offset[..., None], grid)
    scales = _round_scales(step, offset, levels, weights, grid, exponent)
    levels = _nearest(values, scales.step[..., None], scales.offset[..., None], grid)
    loss = _loss(values, weights, scales, levels)
    for _ in range(REFITS):
        refitted = _round_scales(*_least_squares(values, weights, levels, grid), levels, weights, grid, exponent)
        again = _nearest(values, refitted.step[..., None], refitted.offset[..., None], grid)
        changed = _loss(values, weights, refitted, again)
        better = changed < loss
        if not bool(better.any()):
            break
        loss = torch.where(better, changed, loss)
        scales = scales.where(better[..., None], refitted)
        levels = torch.where(better[..., None, None], again, levels)
    return scales, levels


@cache
def _offsets(count: int, least: float, most: float) -> tuple[float, ...]:
    """`count` numbers from least to most, 0 first: the plain choice wins where others are only as good."""
    numbers = [least + (most - least) * k / (count - 1) for k in range(count)]
    return (0.0, *(number for number in numbers if abs(number) > 1e-9))


def _block_fit(values: Tensor, weights: Tensor, grid: KGrid) -> tuple[Tensor, Tensor]:
    """The best step and offset of each block, values ~ step z - offset, before they are rounded: (..., blocks)."""
    low = values.amin(dim=-1).clamp_max_(0.0)
    if grid.has_mins:
        span = (values.amax(dim=-1) - low).clamp_min_(torch.finfo(values.dtype).tiny)
        widths, start = span, -low
    else:
        low, high = torch.aminmax(values, dim=-1)
        widths = torch.where(-low >= high, -low, -high)  # the extreme value gets the level -zero, of which there is one
        start = torch.zeros_like(widths)
    least, best_step, best_offset = torch.full_like(widths, torch.inf), widths, start
    for more in _offsets(STEP_TRIALS, -0.9, 0.9):
        step = widths / ((grid.last_code if grid.has_mins else grid.zero) + more)
        step = torch.where(step == 0, 1.0, step)
        levels = _nearest(values, step[..., None], start[..., None], grid)
        step, offset = _least_squares(values, weights, levels, grid, step, start)
        error = levels.mul_(step[..., None]).sub_(offset[..., None]).sub_(values)
        loss = error.square_().mul_(weights).sum(dim=-1)
        better = loss < least
        best_step, best_offset = torch.where(better, step, best_step), torch.where(better, offset, best_offset)
        least = torch.where(better, loss, least)
    return best_step, best_offset


def _least_squares(
    values: Tensor,
    weights: Tensor,
    levels: Tensor,
    grid: KGrid,
    step: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The step and the offset >= 0 of each block that are best for its levels; where levels are all alike, the given
    ones."""
    weighted = levels * weights
    square = (weighted * levels).sum(dim=-1)
    product = (weighted * values).sum(dim=-1)
    alone = torch.where(square > 0, product / square, 1.0 if step is None else step)
    if not grid.has_mins:
        return alone, torch.zeros_like(alone)
    total = weights.sum(dim=-1)
    first = weighted.sum(dim=-1)
    mean = (values * weights).sum(dim=-1)
    determinant = total * square - first * first
    solvable = determinant > 1e-5 * total * square
    both_step = (total * product - first * mean) / determinant
    both_offset = (first * product - square * mean) / determinant
    flat = (-mean / total).clamp_min(0.0) if offset is None else offset
    inside = solvable & (both_offset >= 0) & (both_step > 0)
    return (
        torch.where(inside, both_step, torch.where(solvable, alone, alone if step is None else step)),
        torch.where(inside, both_offset, torch.where(solvable, 0.0, flat)),
    )


def _round_scales(step: Tensor, offset: Tensor, levels: Tensor, weights: Tensor, grid: KGrid, exponent: int) -> KScales:
    """d, dmin and integers near these steps and offsets; a deviation costs what it costs at these levels."""
    least, last = grid.scales
    # With sc = 0 a block could have one value only, which it has at any sc with all codes at `zero` as well.
    d, sc = _quantized(step, (levels.square() * weights).sum(dim=-1), least or 1, last, exponent)
    sc = torch.where(sc == 0, 1.0, sc)
    if not grid.has_mins:
        return KScales(d, torch.zeros_like(d), sc, torch.zeros_like(sc))
    dmin, mn = _quantized(offset, weights.sum(dim=-1).expand_as(offset), 0, grid.last_min, exponent)
    return KScales(d, dmin, sc, mn)


def _quantized(wanted: Tensor, cost: Tensor, least: int, last: int, exponent: int) -> tuple[Tensor, Tensor]:
    """The unit (..., 1), a float16 number, and integers n (..., blocks): least sum of cost (unit n - wanted)^2."""
    # Blocks of zeros have any step, which must not stretch the range of the others.
    peak = torch.where(cost > 0, wanted.abs(), 0.0).amax(dim=-1, keepdim=True)
    trials = last + wanted.new_tensor(_offsets(SCALE_TRIALS, -1.0, 0.25 * last))
    count = torch.round(wanted / float16(peak / trials.view(-1, *[1] * peak.dim()), exponent)).clamp_(least, last)
    weighted = cost * count
    square = (weighted * count).sum(dim=-1, keepdim=True).clamp_min_(torch.finfo(cost.dtype).tiny)
    unit = float16((weighted * wanted).sum(dim=-1, keepdim=True) / square, exponent)
    count = torch.round(wanted / unit).clamp_(least, last)
    best = (cost * (unit * count - wanted).square()).sum(dim=-1, keepdim=True).argmin(dim=0, keepdim=True)
    fits = torch.isfinite(float16(peak / last, exponent))
    return torch.where(fits, unit.gather(0, best)[0], torch.inf), count.gather(0, best.expand(1, *wanted.shape))[0]


def float16(values: Tensor, exponent: int) -> Tensor:
    """values rounded to float16 numbers divided by 2^exponent; at least the smallest of them."""
    half = (values * 2.0**exponent).to(torch.float16).to(values.dtype).clamp_min_(LEAST)
    return half.mul_(2.0**-exponent)


def _nearest(values: Tensor, step: Tensor, offset: Tensor, grid: KGrid) -> Tensor:
    return torch.round((values + offset) / step).clamp_(-grid.zero, grid.last_code - grid.zero)


def _loss(values: Tensor, weights: Tensor, scales: KScales, levels: Tensor) -> Tensor:
    """Of each super-block, (...)."""
    error = levels * scales.step[..., None] - scales.offset[..., None] - values
    return error.square_().mul_(weights).sum(dim=(-2, -1))
