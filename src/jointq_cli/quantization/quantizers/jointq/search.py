"""JointQ's search for the levels and scales of a tile of rows on a uniform grid: starts, sweeps, annealing.

A row of levels z (in,) and scales s (groups,) represents the weights s z.

Where zero-points are real, levels of a group are integers plus a number in common. The best offset t of s u + t 1, for
integers u, is t = (h 1 - s u R 1) / (1 R 1); with it f is that of the metric R - R 1 1 R / (1 R 1) and the correlation
h - (h 1) 1 R / (1 R 1), in which the kernels then search.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from jointq_cli import kernels
from jointq_cli.formats.uniform import Grid
from jointq_cli.kernels import Rounding
from jointq_cli.quantization.quantizers.jointq.descent import Descent, RowState, SearchResult
from jointq_cli.quantization.quantizers.jointq.metric import Metric

CLIP_STEPS = 40  # shrink factors 1.00, 0.98 .. 0.22 of a group's range; coarse, since flips follow
ANNEAL_SHARE = 4  # columns per random step of a group in each sweep
MOST_ZERO = 2.0**15  # of real zero-points: float16 holds it


@dataclass(frozen=True)
class State(RowState):
    """levels (rows, in) and scale (rows, groups) > 0."""

    scale: Tensor

    def values(self, metric: Metric) -> Tensor:
        rows, columns = self.levels.shape
        return (self.levels.view(rows, -1, metric.columns) * self.scale[:, :, None]).view(rows, columns)


@dataclass(frozen=True)
class Search(Descent[State]):
    """See `Descent`."""

    metric: Metric
    grid: Grid
    rounding: Rounding
    scale_dtype: torch.dtype = torch.float32  # of real zero-points too

    def one_group(self, target: Tensor, correlation: Tensor, start: State | None) -> SearchResult[State]:
        """Rows of a single group, whose correlations w R (rows, in) are known: from JointQ's start, or from a known
        solution, which a row keeps unless others cost less.

        With z and s found, e R e' = w R w' - 2 s h z + s^2 z R z, so that the cost takes no further product.
        """
        if start is None:
            levels, scale = self._clip(target, self.metric.full.diagonal().contiguous())
        else:
            levels, scale = start.levels.clone(), start.scale[:, 0].clone()
        h, r, codes = correlation, self.metric.full, levels
        if self.grid.zero == "real":
            r, shared, sums = self._without_offset
            h, codes = correlation - correlation.sum(dim=1, keepdim=True) * shared, _codes(levels)
        products = codes @ r
        search = kernels.for_device(target.device).flip_search
        steps, _ = search(h, r, products, codes, scale, self.grid.box, self.rounding, guarded=start is not None)
        energy = torch.linalg.vecdot(products, codes).double()
        if self.grid.zero == "real":
            levels = self._with_zero_points(codes, scale, correlation, sums)
            energy += (levels @ sums).double().square_() / sums.sum(dtype=torch.float64)
        fall = torch.linalg.vecdot(torch.addcmul(target, levels, scale[:, None], value=-2.0), correlation)
        cost = energy.mul_(scale.double().square_()).add_(fall).clamp_min_(0.0)
        return SearchResult(State(levels, scale[:, None]), cost, cost, torch.zeros_like(steps), steps)

    @cached_property
    def _without_offset(self) -> tuple[Tensor, Tensor, Tensor]:
        """The metric of a single group with the best offset of each row, 1 R / (1 R 1), and 1 R."""
        sums = self.metric.full.sum(dim=0)
        shared = sums / sums.sum()
        return self.metric.full - sums[:, None] * shared, shared, sums

    # starts

    def _start_group(self, state: State, t: int, wanted: Tensor, metric: Tensor) -> Tensor:
        self._solve_group(state, t, wanted, wanted @ metric, metric)
        return wanted - state.levels[:, self.metric.span(t)] * state.scale[:, t : t + 1]

    def clip_start(self, target: Tensor, *, propagate: bool) -> State:
        """Group after group in the metric H_tt, independently of each other (OneComp's clip-optimize); with `propagate`
        each compensates the errors of the groups before it (clip-optimize-EP)."""
        state = self._empty(target)
        error = torch.zeros_like(target)
        for t in range(self.metric.groups):
            span = self.metric.span(t)
            metric = self.metric.full[span, span].contiguous()
            wanted = target[:, span].contiguous()
            correlation = wanted @ metric
            if propagate:
                correlation += error @ self.metric.full[:, span]
            self._solve_group(state, t, wanted, correlation, metric)
            error[:, span] = wanted - state.levels[:, span] * state.scale[:, t : t + 1]
        return state

    def _solve_group(self, state: State, t: int, wanted: Tensor, correlation: Tensor, metric: Tensor) -> None:
        """Solves group t and writes it to `state`: clip search weighted by the metric's diagonal, then flips."""
        levels, scale = self._clip(wanted, metric.diagonal().contiguous())
        self._flip(correlation, metric, levels, scale, guarded=False)
        state.levels[:, self.metric.span(t)] = levels
        state.scale[:, t] = scale

    def _clip(self, wanted: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        grid, widest = self.grid, wanted.new_full((len(wanted),), 2.0**-100)  # weights are near 1: below it, all are 0
        if grid.zero == "real":  # half-integers around the mean
            widest = grid.covering_scale(*grid.ends(wanted)).clamp_min_(2.0**-100)
            grid, wanted = replace(grid, zero="half"), wanted - wanted.mean(dim=1, keepdim=True)
        low, high = grid.ends(wanted)
        widest = torch.maximum(grid.covering_scale(low, high), widest)
        levels = torch.empty_like(wanted)
        scale = torch.empty_like(widest)
        kernels.for_device(wanted.device).weighted_clip(
            wanted, weights, low, widest, levels, scale, grid.box, CLIP_STEPS
        )
        return levels, scale

    def _flip(
        self, correlation: Tensor, metric: Tensor, levels: Tensor, scale: Tensor, *, guarded: bool
    ) -> tuple[Tensor, Tensor]:
        """`Kernels.flip_search` in one group, with the best zero-points where they are real; there what is not guarded
        is not measured, and has a fall of 0."""
        search = kernels.for_device(levels.device).flip_search
        if self.grid.zero != "real":
            products = levels @ metric
            return search(correlation, metric, products, levels, scale, self.grid.box, self.rounding, guarded=guarded)
        before, codes = levels * scale[:, None], _codes(levels)
        new_scale = scale.clone()
        h, r = _without_offsets(correlation, metric)
        taken, _ = search(h, r, codes @ r, codes, new_scale, self.grid.box, self.rounding, guarded=guarded)
        found = self._with_zero_points(codes, new_scale, correlation, metric.sum(dim=0))
        if not guarded:
            levels.copy_(found)
            scale.copy_(new_scale)
            return taken, torch.zeros_like(taken, dtype=torch.float64)
        after = found * new_scale[:, None]
        fall = ((after - before) * (2.0 * correlation - (after + before) @ metric)).sum(dim=1, dtype=torch.float64)
        kept = fall > 0
        levels.copy_(torch.where(kept[:, None], found, levels))
        scale.copy_(torch.where(kept, new_scale, scale))
        return torch.where(kept, taken.clamp_min(1), 0), torch.where(kept, fall, 0.0)

    def _with_zero_points(self, codes: Tensor, scale: Tensor, correlation: Tensor, sums: Tensor) -> Tensor:
        """The levels of integers (rows, d) with the best zero-points, rounded as they are stored; sums: 1 R."""
        codes = _codes(codes)
        offset = (correlation.sum(dim=1) / scale - (codes * sums).sum(dim=1)) / sums.sum()
        zero_point = offset.neg_().clamp_(-MOST_ZERO, MOST_ZERO).to(self.scale_dtype).to(codes.dtype)
        return codes - zero_point[:, None]

    def _sweep(self, target: Tensor, state: State) -> tuple[Tensor, Tensor]:
        error = target - state.values(self.metric)
        steps = torch.zeros(len(target), dtype=torch.int64, device=target.device)
        decrease = torch.zeros(len(target), dtype=torch.float64, device=target.device)
        for t in range(self.metric.groups):
            correlation, metric, levels, scale = self._group(error, state, t)
            taken, gained = self._flip(correlation, metric, levels, scale, guarded=True)
            self._put(target, error, state, t, levels, scale)
            steps += taken
            decrease += gained
        return steps, decrease

    def anneal(self, target: Tensor, state: State, sweeps: int, temperature: float, seed: int) -> State:
        """Sweeps of random steps at a falling temperature; the result may cost more than `state`."""
        state = state.copy()
        error = target - state.values(self.metric)
        generator = torch.Generator().manual_seed(seed)
        shape = (max(1, self.metric.columns // ANNEAL_SHARE), self.metric.columns)
        for sweep in range(sweeps):
            current = temperature * (1.0 - sweep / sweeps) ** 1.5
            for t in range(self.metric.groups):
                noise = torch.empty(shape, dtype=target.dtype).exponential_(generator=generator).to(target.device)
                correlation, metric, levels, scale = self._group(error, state, t)
                h, r, moved = correlation, metric, levels
                if self.grid.zero == "real":
                    h, r = _without_offsets(correlation, metric)
                    moved = _codes(levels)
                kernels.for_device(target.device).anneal(
                    h, r, moved @ r, moved, scale, self.grid.box, self.rounding, temperature=current, noise=noise
                )
                if self.grid.zero == "real":
                    moved = self._with_zero_points(moved, scale, correlation, metric.sum(dim=0))
                self._put(target, error, state, t, moved, scale)
        return state

    def _group(self, error: Tensor, state: State, t: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a search needs of group t, all other groups fixed: correlation, metric, levels, scale."""
        span = self.metric.span(t)
        metric = self.metric.full[span, span].contiguous()
        levels = state.levels[:, span].contiguous()
        scale = state.scale[:, t].contiguous()
        correlation = torch.addcmul(error @ self.metric.full[:, span], levels @ metric, scale[:, None])
        return correlation, metric, levels, scale

    def _put(self, target: Tensor, error: Tensor, state: State, t: int, levels: Tensor, scale: Tensor) -> None:
        span = self.metric.span(t)
        state.levels[:, span] = levels
        state.scale[:, t] = scale
        error[:, span] = torch.addcmul(target[:, span], levels, scale[:, None], value=-1.0)

    def _empty(self, target: Tensor) -> State:
        return State(torch.empty_like(target), target.new_empty(len(target), self.metric.groups))


def _codes(levels: Tensor) -> Tensor:
    """Levels of a group (rows, d), integers but for a number in common, counted from the lowest."""
    return (levels - levels.amin(dim=1, keepdim=True)).round_()


def _without_offsets(correlation: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """Correlation and metric of f with the best offset of each row."""
    sums = metric.sum(dim=0)
    shared = sums / sums.sum()
    return correlation - correlation.sum(dim=1, keepdim=True) * shared, metric - sums[:, None] * shared
