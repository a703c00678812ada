"""The kernels for CPUs, compiled by numba: one row at a time in cache, rows distributed over threads.

A row's result depends neither on other rows nor on the number of threads: one thread computes it, in one order of
operations, without fused or reordered arithmetic. Threads are Python's (compiled code releases the GIL), as many as
torch uses: numba's own thread pools cannot be resized, and conflict with torch's in one process.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jointq_cli.kernels import (
    CANCELLED,
    COLUMN_SWEEPS,
    K_ROUNDS,
    TOLERANCE,
    Box,
    Kernels,
    KLimits,
    Rounding,
    cpu_columns,
    cpu_flips,
)
from jointq_cli.kernels.compiled import compiled

Floats = NDArray[np.float32]
f32 = np.float32

_MIN_WEIGHTS_PER_THREAD = 1 << 15  # below it, starting a thread costs more than it saves
_SEARCH_PASSES = 8  # how often a search over levels visits each weight, at least


@compiled
def _power_2_4(square: Any) -> Any:
    """|r|^2.4 from r^2, with a relative error of 1.1e-4: u^2 (u^-0.2)^4 for u = r^2.

    u^-0.2 is the root of y^-5 - u: two Newton steps y (6 - u y^5) / 5 from an initial guess that divides the exponent,
    as in the "fast inverse square root" with a fifth instead of a half. Without calls, branches and tables, so that
    the loop around it vectorises.
    """
    u = f32(max(square, f32(1e-30)))  # 0 would give 0 * inf below; the square of 1e-30 underflows to 0 as well
    guess = np.int32(np.int32(1277921859) - np.int32(f32(0.2) * f32(u.view(np.int32))))
    y = guess.view(np.float32)
    y2 = y * y
    y = y * (f32(1.2) - f32(0.2) * (u * (y2 * y2 * y)))
    y2 = y * y
    y = y * (f32(1.2) - f32(0.2) * (u * (y2 * y2 * y)))
    y2 = y * y
    return u * u * (y2 * y2)


@compiled
def _clip_search(
    values: Floats,
    zero_points: Floats,
    scales: Floats,
    lowest: Any,
    highest: Any,
    best: NDArray[np.int64],
) -> None:
    """The innermost loop is over candidates, not columns: their independent sums vectorise without reordering."""
    groups, columns = values.shape
    candidates = scales.shape[1]
    loss = np.empty(candidates, np.float32)
    inverse = np.empty(candidates, np.float32)
    fraction = np.empty(candidates, np.float32)
    floor = np.empty(candidates, np.float32)
    ceiling = np.empty(candidates, np.float32)
    for i in range(groups):
        for k in range(candidates):
            loss[k] = f32(0)
            inverse[k] = f32(1) / scales[i, k]
            zero = np.floor(zero_points[i, k])
            fraction[k] = zero_points[i, k] - zero
            floor[k] = lowest - zero
            ceiling[k] = highest - zero
        for j in range(columns):
            value = values[i, j]
            for k in range(candidates):
                exact = value * inverse[k] + fraction[k]
                gap = min(max(np.rint(exact), floor[k]), ceiling[k]) - exact
                loss[k] += _power_2_4(gap * gap)
        first = 0
        least = f32(np.inf)
        for k in range(candidates):
            ratio = scales[i, k] / scales[i, 0]
            total = loss[k] * _power_2_4(ratio * ratio)
            if total < least:
                least = total
                first = k
        best[i] = first


@compiled
def _quantize_columns(
    work: Floats,
    codes: NDArray[np.uint8],
    errors: Floats,
    upper: Floats,
    scale: Floats,
    zero_point: Floats,
    column_groups: NDArray[np.int64],
    start: int,
    stop: int,
    block_start: int,
    block_stop: int,
    lowest: Any,
    highest: Any,
) -> None:
    for i in range(work.shape[0]):
        for j in range(start, stop):
            group = column_groups[j]
            s = scale[i, group]
            zero = zero_point[i, group]
            whole = np.floor(zero)
            code = min(max(np.rint(work[i, j] / s + (zero - whole)) + whole, lowest), highest)
            codes[i, j] = np.uint8(np.int32(code))  # a negative code wraps to its int8 bit pattern
            error = (work[i, j] - (code - zero) * s) / upper[j, j]
            errors[i, j - block_start] = error
            for k in range(j + 1, block_stop):
                work[i, k] -= error * upper[j, k]


def _over_rows(rows: int, columns: int, body: Callable[[slice], None]) -> None:
    """Calls `body` on slices that cover `rows`, one per thread. columns: the work of one row, in weights."""
    threads = max(1, min(torch.get_num_threads(), rows, rows * columns // _MIN_WEIGHTS_PER_THREAD))
    edges = [rows * i // threads for i in range(threads + 1)]
    parts = [slice(a, b) for a, b in pairwise(edges)]
    if threads == 1:
        body(parts[0])
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(body, parts))


def _limits(box: Box) -> tuple[float, float, float]:
    """As floats, since a function is compiled for every combination of types."""
    return float(box.first), float(box.last), float(box.span)


def _scratch(levels: NDArray[Any]) -> NDArray[Any]:
    """An integer for each column, of the width of a level."""
    return np.empty(levels.shape[1], np.dtype(f"i{levels.itemsize}"))


class CpuKernels(Kernels):
    """See `Kernels` for the contract."""

    @staticmethod
    def clip_search(values: Tensor, zero_points: Tensor, scales: Tensor, lowest: int, highest: int) -> Tensor:
        best = torch.empty(len(values), dtype=torch.int64)
        v, z, s, b = values.numpy(), zero_points.numpy(), scales.numpy(), best.numpy()

        def body(rows: slice) -> None:
            _clip_search(v[rows], z[rows], s[rows], f32(lowest), f32(highest), b[rows])

        _over_rows(values.shape[0], values.shape[1] * scales.shape[1] // 4, body)
        return best

    @staticmethod
    def quantize_columns(
        work: Tensor,
        codes: Tensor,
        errors: Tensor,
        upper: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        column_groups: Tensor,
        span: range,
        block: range,
        lowest: int,
        highest: int,
    ) -> None:
        w, c, e = work.numpy(), codes.view(torch.uint8).numpy(), errors.numpy()
        s, z, u, g = scale.numpy(), zero_point.numpy(), upper.numpy(), column_groups.numpy()
        edges = (span.start, span.stop, block.start, block.stop)

        def body(rows: slice) -> None:
            _quantize_columns(w[rows], c[rows], e[rows], u, s[rows], z[rows], g, *edges, f32(lowest), f32(highest))

        _over_rows(work.shape[0], len(span), body)

    @staticmethod
    def weighted_clip(
        values: Tensor,
        weights: Tensor,
        low: Tensor,
        widest: Tensor,
        levels: Tensor,
        scale: Tensor,
        box: Box,
        steps: int,
    ) -> None:
        x, w, a, b, z, s = (t.numpy() for t in (values, weights, low, widest, levels, scale))

        def body(rows: slice) -> None:
            cpu_flips.weighted_clip(x[rows], w, a[rows], b[rows], z[rows], s[rows], _limits(box), steps)

        _over_rows(values.shape[0], values.shape[1] * steps // 4, body)

    @staticmethod
    def flip_search(
        correlation: Tensor,
        metric: Tensor,
        products: Tensor,
        levels: Tensor,
        scale: Tensor,
        box: Box,
        rounding: Rounding,
        *,
        guarded: bool,
    ) -> tuple[Tensor, Tensor]:
        steps = torch.empty(len(levels), dtype=torch.int64)
        fall = torch.empty(len(levels), dtype=torch.float64)
        h, m, v, z, s = (t.numpy() for t in (correlation, metric, products, levels, scale))
        limits, scale_format, tolerances = (
            _limits(box),
            astuple(rounding),
            (TOLERANCE, CANCELLED * torch.finfo(levels.dtype).eps),
        )
        n, f, most = steps.numpy(), fall.numpy(), box.most_steps(levels.shape[1])

        def body(rows: slice) -> None:
            cpu_flips.flip_search(
                h[rows],
                m,
                v[rows],
                z[rows],
                s[rows],
                limits,
                scale_format,
                tolerances,
                most,
                guarded,
                n[rows],
                f[rows],
                _scratch(z),
            )

        _over_rows(levels.shape[0], _SEARCH_PASSES * levels.shape[1], body)
        return steps, fall

    @staticmethod
    def anneal(
        correlation: Tensor,
        metric: Tensor,
        products: Tensor,
        levels: Tensor,
        scale: Tensor,
        box: Box,
        rounding: Rounding,
        *,
        temperature: float,
        noise: Tensor,
    ) -> None:
        h, m, v, z, s = (t.numpy() for t in (correlation, metric, products, levels, scale))
        limits, scale_format, tolerances = (
            _limits(box),
            astuple(rounding),
            (TOLERANCE, CANCELLED * torch.finfo(levels.dtype).eps),
        )
        bonus = (noise * temperature).numpy()

        def body(rows: slice) -> None:
            cpu_flips.anneal(
                h[rows], m, v[rows], z[rows], s[rows], limits, scale_format, tolerances, bonus, _scratch(z)
            )

        _over_rows(levels.shape[0], _SEARCH_PASSES * levels.shape[1], body)

    @staticmethod
    def k_flip_search(
        correlation: Tensor,
        metric: Tensor,
        products: Tensor,
        levels: Tensor,
        scales: Tensor,
        mins: Tensor,
        d: Tensor,
        dmin: Tensor,
        limits: KLimits,
    ) -> tuple[Tensor, Tensor]:
        steps = torch.empty(len(levels), dtype=torch.int64)
        fall = torch.empty(len(levels), dtype=torch.float64)
        h, m, v, z, s, b, u, w = (t.numpy() for t in (correlation, metric, products, levels, scales, mins, d, dmin))
        n, f, most = steps.numpy(), fall.numpy(), limits.box.most_steps(levels.shape[1])

        def body(rows: slice) -> None:
            cpu_flips.k_flip_search(
                h[rows], m, v[rows], z[rows], s[rows], b[rows], u[rows], w[rows], astuple(limits), TOLERANCE, K_ROUNDS,
                most, n[rows], f[rows], _scratch(z),
            )  # fmt: skip

        _over_rows(levels.shape[0], _SEARCH_PASSES * levels.shape[1], body)
        return steps, fall

    @staticmethod
    def column_flips(products: Tensor, metric: Tensor, coupling: Tensor, signs: Tensor, scale: Tensor) -> Tensor:
        change = torch.zeros_like(products)
        m, g, h, s, b, u = (t.numpy() for t in (products, metric, coupling, signs, scale, change))
        cpu_columns.column_flips(m, g, h, s, b, u, f32(TOLERANCE), COLUMN_SWEEPS)
        return change
