"""Scales and zero-points fitted to groups of weights, and the rounding of scales to the dtype they are stored in."""

import math

import torch
from torch import Tensor

from jointq_cli import kernels
from jointq_cli.errors import ConfigError, NumericsError
from jointq_cli.formats.uniform import Grid

SHRINK_STEPS = 80  # GPTQ's clip search: maxshrink 0.8 on a grid of 100, that is factors 1.00, 0.99 .. 0.21
_MANTISSA = {torch.bfloat16: (7, -126), torch.float16: (10, -14), torch.float32: (23, -126)}  # bits, least exponent
_GROUPS_AT_ONCE = 1 << 15  # bounds the memory of the clip search's tables, 10 MiB each


def round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` (float32, positive) rounded to `dtype`, returned as float32; never 0, inf or nan.

    A scale below the range of `dtype` becomes its smallest number: in float16 that is 2^-24, the resolution of the
    checkpoint's own weights, so no precision is lost that the checkpoint had.

    Raises NumericsError where a scale is too large for `dtype` or not finite.
    """
    rounded = scale.to(dtype).to(torch.float32)
    if not bool(torch.isfinite(rounded).all()):
        raise NumericsError(f"a scale of {scale.max().item():.3g} does not fit in {str(dtype).removeprefix('torch.')}")
    return rounded.clamp_min_(_smallest_scale(dtype))


def scale_rounding(dtype: torch.dtype, exponent: int = 0) -> kernels.Rounding:
    """The rounding of `round_scale` for kernels that work on weights divided by 2^exponent.

    Raises ConfigError for a dtype that scales cannot be stored as.
    """
    if dtype not in _MANTISSA:
        raise ConfigError(f"the checkpoint's dtype {dtype}: scales can be stored as {', '.join(map(str, _MANTISSA))}")
    digits, least_normal = _MANTISSA[dtype]
    return kernels.Rounding(digits, least_normal - exponent, math.ldexp(_smallest_scale(dtype), -exponent))


def _smallest_scale(dtype: torch.dtype) -> float:
    # Normal numbers only where the exponent is wide: the reciprocal of a subnormal bfloat16 overflows.
    return 2.0**-24 if dtype == torch.float16 else float(torch.finfo(torch.float32).tiny)


def fit(values: Tensor, grid: Grid, mse: bool, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero-point of each group of weights.

    `values` (..., columns) float32, one group per leading index. The range is that of `Grid.ends`; with `mse` it is
    multiplied by the one of SHRINK_STEPS factors with the least sum of |error|^2.4 (GPTQ, Frantar et al. 2023,
    `quant.py`), around its middle where zero-points are real and around zero elsewhere.

    Returns scale and zero_point, (...) float32, both exactly representable as they are stored.
    Raises NumericsError where a scale does not fit in `scale_dtype`.
    """
    groups = values.reshape(-1, values.shape[-1]).contiguous()
    low, high = grid.ends(groups)
    widest = grid.covering_scale(low, high)
    scale = round_scale(widest, scale_dtype)
    if mse:
        middle = (low + high) / 2 if grid.zero == "real" else torch.zeros_like(low)
        scale, low = _clipped(groups, low, middle, widest, grid, scale_dtype)
    zero_point = grid.zero_point(low, scale)
    if grid.zero == "real":
        zero_point = zero_point.to(scale_dtype).to(torch.float32)
    return scale.view(values.shape[:-1]), zero_point.view(values.shape[:-1])


def _clipped(
    groups: Tensor, low: Tensor, middle: Tensor, widest: Tensor, grid: Grid, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The best of the ranges of each group shrunk around `middle`: scale and lower end, both (groups,) float32."""
    search = kernels.for_device(groups.device).clip_search
    shrink = 1.0 - torch.arange(SHRINK_STEPS, dtype=torch.float32, device=groups.device) / 100
    scale, end = torch.empty_like(low), torch.empty_like(low)
    for start in range(0, len(groups), _GROUPS_AT_ONCE):
        rows = slice(start, start + _GROUPS_AT_ONCE)
        scales = (widest[rows, None] * shrink).to(dtype).to(torch.float32).clamp_min_(_smallest_scale(dtype))
        ends = torch.addcmul(middle[rows, None], (low - middle)[rows, None], shrink)
        best = search(groups[rows], grid.zero_point(ends, scales), scales, grid.lowest, grid.highest)[:, None]
        scale[rows], end[rows] = scales.gather(1, best)[:, 0], ends.gather(1, best)[:, 0]
    return scale, end
