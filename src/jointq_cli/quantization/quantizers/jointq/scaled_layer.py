"""One layer inside JointQ: from its weight to targets for the search, and from the search's result to codes.

Handles the order of columns, the padding of tiles and a power of two by which all weights are divided, so that the
search computes with numbers near 1 and a layer scaled by 2^k is solved with the same bits.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from jointq_cli.formats.uniform import Grid, UniformWeight
from jointq_cli.kernels import Rounding
from jointq_cli.quantization.quantizers.gptq import GPTQ, GptqPrepared
from jointq_cli.quantization.quantizers.jointq.metric import Metric
from jointq_cli.quantization.quantizers.jointq.search import PADDING, Search, SearchResult, State
from jointq_cli.quantization.quantizers.scale_fit import round_scale, scale_rounding
from jointq_cli.quantization.quantizers.statistics import output_error, weight_error

_CPU_ROWS = 256  # the errors of a tile of so many rows fit in cache

T = TypeVar("T")
Solve = Callable[[Search, Tensor, State | None], SearchResult]


@dataclass(frozen=True)
class ScaledLayer:
    """`weight` (out, in) float32, not yet scaled; `exponent` of the power of two by which it is divided."""

    weight: Tensor
    exponent: int
    grid: Grid
    scale_dtype: torch.dtype
    batch_size: int | None

    @classmethod
    def of(cls, weight: Tensor, grid: Grid, scale_dtype: torch.dtype, batch_size: int | None) -> "ScaledLayer":
        return cls(weight, math.frexp(float(weight.abs().max()))[1], grid, scale_dtype, batch_size)

    def rows(self, rows: Tensor) -> "ScaledLayer":
        """The same with these rows only."""
        return replace(self, weight=self.weight[rows])

    def solve(self, metric: Metric, solve: Solve, state: State | None) -> SearchResult:
        """Calls `solve` for every tile with a search, targets (rows, in) and the tile's part of `state`."""
        search = Search(metric, self.grid, self._rounding())

        def one(tile: slice) -> SearchResult:
            target = self._target(self.weight[tile], metric)
            part = None if state is None else _padded(state, tile, target)
            return solve(search, target, part).head(tile.stop - tile.start)

        return SearchResult.joined(over_tiles(len(self.weight), self.batch_size, self.weight.device, one))

    def signal(self, metric: Metric) -> float:
        """tr(W H_l W') in the unit of the search's costs."""

        def one(tile: slice) -> float:
            target = self._target(self.weight[tile], metric)
            return float(torch.sum((target @ metric.full).mul_(target), dtype=torch.float64))

        return math.fsum(over_tiles(len(self.weight), self.batch_size, self.weight.device, one))

    def gptq_start(self, gptq: GPTQ, prepared: GptqPrepared, metric: Metric) -> State:
        """GPTQ's solution as a start, in JointQ's order of columns and groups."""
        ordered = self.weight.index_select(1, metric.order)
        found = gptq.uniform(ordered, prepared, self.scale_dtype)
        levels = found.codes.to(metric.full.dtype)
        levels.view(len(levels), -1, metric.columns).sub_(found.zero_point.to(levels.dtype)[:, :, None])
        return State(levels, torch.ldexp(found.scale.to(levels.dtype), torch.tensor(-self.exponent)))

    def values(self, metric: Metric, state: State) -> Tensor:
        """The dequantised weights of `state`, (out, in) float32 in the original order."""
        values = torch.ldexp(state.values(metric).float(), torch.tensor(self.exponent))
        return torch.empty_like(values).index_copy_(1, metric.order, values)

    def output_error(self, metric: Metric, state: State, hessian: Tensor) -> float:
        return output_error(self.weight, self.values(metric, state), hessian)

    def weight_error(self, metric: Metric, state: State) -> float:
        return weight_error(self.weight, self.values(metric, state))

    def quantized(self, metric: Metric, state: State, permuted: bool) -> UniformWeight:
        """The result in its stored form. Raises NumericsError where a scale does not fit in the checkpoint's dtype."""
        groups = state.levels.view(len(state.levels), -1, metric.columns)
        lowest = groups.amin(dim=2).clamp_max_(0.0) if not self.grid.symmetric else torch.zeros_like(state.scale)
        codes = (groups - lowest[:, :, None]).flatten(1).to(self.grid.code_dtype)
        scale = round_scale(torch.ldexp(state.scale.float(), torch.tensor(self.exponent)), self.scale_dtype)
        zero_point = lowest.neg_().to(torch.uint8)
        if not permuted:  # groups are stored in the original order
            stored = metric.order.view(-1, metric.columns)[:, 0] // metric.columns
            scale = torch.empty_like(scale).index_copy_(1, stored, scale)
            zero_point = torch.empty_like(zero_point).index_copy_(1, stored, zero_point)
        return UniformWeight(
            codes=torch.empty_like(codes).index_copy_(1, metric.order, codes),
            scale=scale.to(self.scale_dtype),
            zero_point=zero_point,
            permutation=metric.order.to(torch.int32) if permuted else None,
            bits=self.grid.bits,
            symmetric=self.grid.symmetric,
        )

    def _rounding(self) -> Rounding:
        return scale_rounding(self.scale_dtype, self.exponent)

    def _target(self, weight: Tensor, metric: Metric) -> Tensor:
        ordered = torch.ldexp(weight.index_select(1, metric.order), torch.tensor(-self.exponent))
        return _with_rows(ordered.to(metric.full.dtype), len(weight) + -len(weight) % PADDING, 0.0)


def _padded(state: State, tile: slice, target: Tensor) -> State:
    """The tile's part with as many rows as `target` and its dtype, which may differ between values of lambda."""
    levels, scale = state.levels[tile].to(target.dtype), state.scale[tile].to(target.dtype)
    return State(_with_rows(levels, len(target), 0.0), _with_rows(scale, len(target), 1.0))


def _with_rows(tensor: Tensor, rows: int, value: float) -> Tensor:
    if len(tensor) == rows:
        return tensor
    return torch.cat([tensor, tensor.new_full((rows - len(tensor), tensor.shape[1]), value)])


def over_tiles(rows: int, batch_size: int | None, device: torch.device, solve: Callable[[slice], T]) -> list[T]:
    """The results of `solve` on consecutive slices of at most `batch_size` rows.

    batch_size None: all rows at once on a GPU, tiles of 256 on a CPU. On a CPU each tile is solved by one thread: with
    torch's own threads the bits of a product would depend on their number.
    """
    size = batch_size or (_CPU_ROWS if device.type == "cpu" else rows)
    tiles = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    if device.type != "cpu":
        return [solve(tile) for tile in tiles]
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(solve, tiles))
    finally:
        torch.set_num_threads(threads)  # new threads inherit what the pool's threads have set
