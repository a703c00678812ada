"""One layer inside JointQ: from its weight to targets for the search, and from the search's result to codes.

Handles the order of columns, the padding of tiles and a power of two by which all weights are divided, so that the
search computes with numbers near 1 and a layer scaled by 2^k is solved with the same bits.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from jointq_cli.formats.base import StoredWeight
from jointq_cli.formats.k_quant import SUPER_BLOCK, KGrid, KQuantWeight
from jointq_cli.formats.k_rounding import KScales, stored
from jointq_cli.formats.uniform import Grid, UniformWeight
from jointq_cli.quantization.quantizers.gptq import GPTQ, GptqPrepared
from jointq_cli.quantization.quantizers.jointq.descent import (
    PADDING,
    Descent,
    RowState,
    SearchResult,
    combined,
    with_rows,
)
from jointq_cli.quantization.quantizers.jointq.k_search import KSearch, KState
from jointq_cli.quantization.quantizers.jointq.metric import Metric
from jointq_cli.quantization.quantizers.jointq.search import Search, State
from jointq_cli.quantization.quantizers.rtn import check_k_scales
from jointq_cli.quantization.quantizers.scale_fit import round_scale, scale_rounding
from jointq_cli.quantization.quantizers.statistics import output_error, weight_error

_CPU_ROWS = 256  # the errors of a tile of so many rows fit in cache

T = TypeVar("T")
S = TypeVar("S", bound=RowState)


@dataclass(frozen=True)
class ScaledLayer(ABC, Generic[S]):
    """`weight` (out, in) float32, not yet scaled; `exponent` of the power of two by which it is divided."""

    weight: Tensor
    exponent: int
    batch_size: int | None

    @abstractmethod
    def search(self, metric: Metric) -> Descent[S]:
        """The search of one tile."""

    @abstractmethod
    def quantized(self, metric: Metric, state: S, permuted: bool) -> StoredWeight:
        """The result in its stored form. Raises NumericsError where a scale does not fit in its dtype."""

    def rows(self, rows: Tensor) -> Self:
        """The same with these rows only."""
        return replace(self, weight=self.weight[rows])

    def solve(
        self, metric: Metric, solve: Callable[[Any, Tensor, S | None], SearchResult[S]], state: S | None
    ) -> SearchResult[S]:
        """Calls `solve` for every tile with a search, targets (rows, in) and the tile's part of `state`."""
        search = self.search(metric)

        def one(tile: slice) -> SearchResult[S]:
            target = self.target(self.weight[tile], metric)
            part = None if state is None else combined(lambda tensor: tensor[tile], state).padded(len(target), target)
            return solve(search, target, part).head(tile.stop - tile.start)

        return SearchResult.joined(over_tiles(len(self.weight), self.batch_size, self.weight.device, one))

    def signal(self, metric: Metric) -> float:
        """tr(W H_l W') in the unit of the search's costs."""

        def one(tile: slice) -> float:
            target = self.target(self.weight[tile], metric)
            return float(torch.sum((target @ metric.full).mul_(target), dtype=torch.float64))

        return math.fsum(over_tiles(len(self.weight), self.batch_size, self.weight.device, one))

    def correlation(self, target: Tensor, metric: Metric) -> tuple[Tensor, float]:
        """W H_l and tr(W H_l W') in the unit of the search, of all rows as `target` has them."""
        found = torch.empty_like(target)

        def one(tile: slice) -> float:
            part = torch.mm(target[tile], metric.full, out=found[tile])
            return float(torch.linalg.vecdot(target[tile], part).sum(dtype=torch.float64))

        return found, math.fsum(over_tiles(len(target), self._padded_rows, target.device, one))

    @property
    def _padded_rows(self) -> int | None:
        """Rows of a tile of targets that are padded."""
        return self.batch_size and self.batch_size + -self.batch_size % PADDING

    def values(self, metric: Metric, state: S) -> Tensor:
        """The dequantised weights of `state`, (out, in) float32 in the original order."""
        values = torch.ldexp(state.values(metric).float(), torch.tensor(self.exponent))
        return torch.empty_like(values).index_copy_(1, metric.order, values)

    def output_error(self, metric: Metric, state: S, hessian: Tensor) -> float:
        return output_error(self.weight, self.values(metric, state), hessian)

    def weight_error(self, metric: Metric, state: S) -> float:
        return weight_error(self.weight, self.values(metric, state))

    def target(self, weight: Tensor, metric: Metric) -> Tensor:
        """Rows of the weight as the search has them, and rows of zeros up to a multiple of PADDING."""
        ordered = torch.ldexp(weight.index_select(1, metric.order), torch.tensor(-self.exponent))
        return with_rows(ordered.to(metric.full.dtype), len(weight) + -len(weight) % PADDING, 0.0)


@dataclass(frozen=True)
class UniformLayer(ScaledLayer[State]):
    """On a uniform grid."""

    grid: Grid
    scale_dtype: torch.dtype

    def search(self, metric: Metric) -> Search:
        return Search(metric, self.grid, scale_rounding(self.scale_dtype, self.exponent), self.scale_dtype)

    def solve_group(
        self, metric: Metric, target: Tensor, correlation: Tensor, state: State | None
    ) -> SearchResult[State]:
        """`Search.one_group` for every tile of the padded `target`."""
        search = self.search(metric)

        def one(tile: slice) -> SearchResult[State]:
            rows = target[tile]
            part = None if state is None else combined(lambda tensor: tensor[tile], state).padded(len(rows), rows)
            return search.one_group(rows, correlation[tile], part)

        tiles = over_tiles(len(target), self._padded_rows, target.device, one)
        return SearchResult.joined(tiles).head(len(self.weight))

    def gptq_start(self, gptq: GPTQ, prepared: GptqPrepared, metric: Metric) -> State:
        """GPTQ's solution as a start, in JointQ's order of columns and groups."""
        ordered = self.weight.index_select(1, metric.order)
        found = gptq.uniform(ordered, prepared, self.scale_dtype)
        levels = found.codes.to(metric.full.dtype)
        levels.view(len(levels), -1, metric.columns).sub_(found.zero_points().to(levels.dtype)[:, :, None])
        return State(levels, torch.ldexp(found.scale.to(levels.dtype), torch.tensor(-self.exponent)))

    def quantized(self, metric: Metric, state: State, permuted: bool) -> UniformWeight:
        """The result in its stored form. Raises NumericsError where a scale does not fit in the checkpoint's dtype."""
        groups = state.levels.view(len(state.levels), -1, metric.columns)
        lowest = self._lowest(groups)
        codes = (groups - lowest[:, :, None]).round_().flatten(1).to(self.grid.code_dtype)
        scale = round_scale(torch.ldexp(state.scale.float(), torch.tensor(self.exponent)), self.scale_dtype)
        zero_point = lowest.neg_()
        if not permuted:  # groups are stored in the original order
            stored = metric.order.view(-1, metric.columns)[:, 0] // metric.columns
            scale = torch.empty_like(scale).index_copy_(1, stored, scale)
            zero_point = torch.empty_like(zero_point).index_copy_(1, stored, zero_point)
        return UniformWeight(
            codes=torch.empty_like(codes).index_copy_(1, metric.order, codes),
            scale=scale.to(self.scale_dtype),
            zero_point=self.grid.stored_zero_point(zero_point, self.scale_dtype),
            permutation=metric.order.to(torch.int32) if permuted else None,
            bits=self.grid.bits,
            symmetric=self.grid.symmetric,
        )

    def _lowest(self, groups: Tensor) -> Tensor:
        """The level (out, groups) of the lowest code, of levels (out, groups, columns)."""
        lowest = groups.amin(dim=2)
        if self.grid.symmetric:
            return torch.zeros_like(lowest)
        if self.grid.zero == "half":
            return torch.full_like(lowest, self.grid.box.first)
        return lowest if self.grid.zero == "real" else lowest.clamp_max_(0.0)


@dataclass(frozen=True)
class KLayer(ScaledLayer[KState]):
    """On a K grid."""

    grid: KGrid

    def search(self, metric: Metric) -> KSearch:
        return KSearch(metric, self.grid, self.exponent)

    def quantized(self, metric: Metric, state: KState, permuted: bool) -> KQuantWeight:
        rows = len(state.levels)
        original = torch.argsort(metric.order.view(-1, SUPER_BLOCK)[:, 0])  # super-blocks in the original order

        def arranged(tensor: Tensor) -> Tensor:
            return tensor.view(rows, metric.groups, -1)[:, original]

        unit = torch.tensor(self.exponent, device=state.d.device)
        scales = KScales(
            d=torch.ldexp(arranged(state.d).float(), unit),
            dmin=torch.ldexp(arranged(state.dmin).float(), unit),
            sc=arranged(state.sc),
            mn=arranged(state.mn),
        )
        found = stored(scales, arranged(state.levels).unflatten(-1, (self.grid.blocks, self.grid.block)), self.grid)
        check_k_scales(found)
        return found


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
