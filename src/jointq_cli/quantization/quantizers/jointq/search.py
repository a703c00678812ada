"""JointQ's search for the levels and scales of a tile of rows: starts, sweeps, annealing.

A row of levels z (in,) and scales s (groups,) represents the weights s z. Its cost is e H_l e' with e = w - s z. Rows
are independent: a row's result depends on its weights and the metric only.

In a matrix product the bits of a row are independent of the other rows only if their number is a multiple of PADDING
(measured with MKL on AVX-512, and asserted in the tests), so tiles are padded with rows of zeros.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from jointq_cli import kernels
from jointq_cli.formats.uniform import Grid
from jointq_cli.kernels import Rounding
from jointq_cli.quantization.quantizers.jointq.metric import Metric

PADDING = 16
CLIP_STEPS = 40  # shrink factors 1.00, 0.98 .. 0.22 of a group's range; coarse, since flips follow
ANNEAL_SHARE = 4  # columns per random step of a group in each sweep


@dataclass(frozen=True)
class State:
    """A solution of a tile: levels (rows, in) and scale (rows, groups) > 0, floating point, in the metric's order."""

    levels: Tensor
    scale: Tensor

    def values(self, metric: Metric) -> Tensor:
        rows, columns = self.levels.shape
        return (self.levels.view(rows, -1, metric.columns) * self.scale[:, :, None]).view(rows, columns)

    def take(self, rows: Tensor) -> "State":
        return State(self.levels[rows], self.scale[rows])

    def copy(self) -> "State":
        return State(self.levels.clone(), self.scale.clone())


@dataclass(frozen=True)
class SearchResult:
    """The end of a search, one entry per row; costs are e H_l e' in the unit of the metric, float64."""

    state: State
    start_cost: Tensor
    cost: Tensor
    sweeps: Tensor  # in which the row changed
    steps: Tensor  # of `flip_search`

    def head(self, rows: int) -> "SearchResult":
        """The first `rows` rows."""
        return _combined(lambda tensor: tensor[:rows], self)

    @classmethod
    def joined(cls, parts: list["SearchResult"]) -> "SearchResult":
        """Tiles concatenated."""
        return _combined(lambda *tensors: torch.cat(tensors), *parts)

    def with_rows(self, rows: Tensor, other: "SearchResult") -> "SearchResult":
        """With `other` in place of these rows."""
        return _combined(lambda mine, theirs: mine.index_copy(0, rows, theirs), self, other)

    def or_better(self, other: "SearchResult") -> "SearchResult":
        """For each row the result that costs less; this one where both cost the same."""
        wins = other.cost < self.cost
        return _combined(
            lambda mine, theirs: torch.where(wins if mine.dim() == 1 else wins[:, None], theirs, mine), self, other
        )


def _combined(function: Callable[..., Tensor], *results: SearchResult) -> SearchResult:
    """`function` applied to the corresponding tensors of `results`, which are (rows,) or (rows, columns)."""

    def combine(name: str, owners: Sequence[Any]) -> Tensor:
        return function(*(getattr(owner, name) for owner in owners))

    states = [result.state for result in results]
    rest = {field.name: combine(field.name, results) for field in fields(SearchResult) if field.name != "state"}
    return SearchResult(State(combine("levels", states), combine("scale", states)), **rest)


@dataclass(frozen=True)
class Search:
    """The search in one metric. Targets are weights (rows, in) in the metric's order and dtype."""

    metric: Metric
    grid: Grid
    rounding: Rounding

    # starts

    def schur_start(self, target: Tensor) -> State:
        """Group after group in the metric S_t, in which all later groups compensate its error.

        GPTQ (Frantar et al. 2023) with groups in place of columns: after each group, the error times U_tt^-1 U_t,later
        is subtracted from the targets of the later ones.
        """
        work = target.clone()
        state = self._empty(target)
        for t in range(self.metric.groups):
            span = self.metric.span(t)
            metric = self.metric.schur[span, span].contiguous()
            wanted = work[:, span].contiguous()
            self._solve_group(state, t, wanted, wanted @ metric, metric)
            error = wanted - state.levels[:, span] * state.scale[:, t : t + 1]
            work[:, span.stop :].addmm_(error, self.metric.schur[span, span.stop :], alpha=-1.0)
        return state

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
        kernels.for_device(wanted.device).flip_search(
            correlation, metric, levels @ metric, levels, scale, self.grid.box, self.rounding, guarded=False
        )
        state.levels[:, self.metric.span(t)] = levels
        state.scale[:, t] = scale

    def _clip(self, wanted: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        low, high = torch.aminmax(wanted, dim=1)
        low, high = low.clamp_max_(0.0), high.clamp_min_(0.0)
        widest = self.grid.covering_scale(low, high).clamp_min_(2.0**-100)  # weights are near 1: below it, all are 0
        levels = torch.empty_like(wanted)
        scale = torch.empty_like(widest)
        kernels.for_device(wanted.device).weighted_clip(
            wanted, weights, low, widest, levels, scale, self.grid.box, CLIP_STEPS
        )
        return levels, scale

    # descent

    def descend(self, target: Tensor, start: State, sweeps: int) -> SearchResult:
        """Sweeps over all groups with the full metric; a row is done after `sweeps`, or when one does not change it."""
        rows = torch.arange(len(target), device=target.device)
        state, result = start.copy(), start.copy()
        steps, moved = torch.zeros_like(rows), torch.zeros_like(rows)
        decrease = torch.zeros(len(rows), dtype=torch.float64, device=target.device)
        active = target
        for _ in range(sweeps):
            taken, gained = self._sweep(active, state)
            result.levels[rows], result.scale[rows] = state.levels, state.scale
            steps[rows] += taken
            moved[rows] += taken > 0
            decrease[rows] += gained
            if not bool(taken.any()):
                break
            keep = _padded(torch.nonzero(taken)[:, 0], len(taken))
            rows, active, state = rows[keep], active[keep], state.take(keep)
        cost = self.cost(target, result)
        return SearchResult(result, cost + decrease, cost, moved, steps)

    def _sweep(self, target: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """One sweep, in place, which raises no row's cost. Returns steps and decrease of the cost, both (rows,)."""
        error = target - state.values(self.metric)
        steps = torch.zeros(len(target), dtype=torch.int64, device=target.device)
        decrease = torch.zeros(len(target), dtype=torch.float64, device=target.device)
        flip_search = kernels.for_device(target.device).flip_search
        for t in range(self.metric.groups):
            correlation, metric, products, levels, scale = self._group(error, state, t)
            taken, gained = flip_search(
                correlation, metric, products, levels, scale, self.grid.box, self.rounding, guarded=True
            )
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
                correlation, metric, products, levels, scale = self._group(error, state, t)
                kernels.for_device(target.device).anneal(
                    correlation, metric, products, levels, scale, self.grid.box, self.rounding,
                    temperature=current, noise=noise,
                )  # fmt: skip
                self._put(target, error, state, t, levels, scale)
        return state

    def _group(self, error: Tensor, state: State, t: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What the kernels need of group t, all other groups fixed: correlation, metric, products, levels, scale."""
        span = self.metric.span(t)
        metric = self.metric.full[span, span].contiguous()
        levels = state.levels[:, span].contiguous()
        scale = state.scale[:, t].contiguous()
        products = levels @ metric
        correlation = torch.addcmul(error @ self.metric.full[:, span], products, scale[:, None])
        return correlation, metric, products, levels, scale

    def _put(self, target: Tensor, error: Tensor, state: State, t: int, levels: Tensor, scale: Tensor) -> None:
        span = self.metric.span(t)
        state.levels[:, span] = levels
        state.scale[:, t] = scale
        error[:, span] = torch.addcmul(target[:, span], levels, scale[:, None], value=-1.0)

    def cost(self, target: Tensor, state: State) -> Tensor:
        """e H_l e' of each row, (rows,) float64, in the unit of the metric."""
        error = target - state.values(self.metric)
        return torch.sum((error @ self.metric.full).mul_(error), dim=1, dtype=torch.float64)

    def _empty(self, target: Tensor) -> State:
        return State(torch.empty_like(target), target.new_empty(len(target), self.metric.groups))


def _padded(rows: Tensor, available: int) -> Tensor:
    """`rows` (indices) of a tile, and other rows of it up to a multiple of PADDING."""
    missing = -len(rows) % PADDING
    if not missing:
        return rows
    others = torch.ones(available, dtype=torch.bool, device=rows.device)
    others[rows] = False
    return torch.cat([rows, torch.nonzero(others)[:missing, 0]])
