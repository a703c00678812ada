"""JointQ's search for the levels and scales of a tile of rows: starts, sweeps, annealing.

Knows the metric of the layer's input, the grid and the kernels; knows no config, no files, no threads. A row of levels
z (in,) and scales s (groups,) stands for the weights s z. Its cost is e H_l e' with e = w - s z. Rows never meet: what
becomes of a row depends on nothing but its weights and the metric.

A matrix product gives a row the same bits whatever its neighbours are only if the number of rows is a multiple of
PADDING (measured with MKL on AVX-512, and asserted in the tests), so tiles are padded with rows of zeros.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from jointq_cli import kernels
from jointq_cli.formats.uniform import Grid
from jointq_cli.kernels import Rounding
from jointq_cli.quantization.quantizers.jointq.metric import Metric

PADDING = 16
CLIP_STEPS = 40  # shrink factors 1.00, 0.98 .. 0.22 of a group's range: the flips that follow do the fine work
ANNEAL_SHARE = 4  # random steps per group and sweep: one for so many columns


@dataclass(frozen=True)
class State:
    """Solutions of a tile: levels (rows, in) and scale (rows, groups) > 0, floating, in the metric's order."""

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
    """Where descents ended, and how, one entry per row; costs are e H_l e' in units of the metric, float64."""

    state: State
    start_cost: Tensor
    cost: Tensor
    sweeps: Tensor  # in which the row moved
    steps: Tensor

    def head(self, rows: int) -> "SearchResult":
        """The first so many rows."""
        rest = {field.name: getattr(self, field.name)[:rows] for field in fields(self) if field.name != "state"}
        return SearchResult(State(self.state.levels[:rows], self.state.scale[:rows]), **rest)

    @classmethod
    def joined(cls, parts: list["SearchResult"]) -> "SearchResult":
        """Tiles one below the other."""
        rest = {
            field.name: torch.cat([getattr(part, field.name) for part in parts])
            for field in fields(cls)
            if field.name != "state"
        }
        levels = torch.cat([part.state.levels for part in parts])
        return cls(State(levels, torch.cat([part.state.scale for part in parts])), **rest)

    def with_rows(self, rows: Tensor, other: "SearchResult") -> "SearchResult":
        """`other` in place of these rows."""
        rest = {
            field.name: getattr(self, field.name).index_copy(0, rows, getattr(other, field.name))
            for field in fields(self)
            if field.name != "state"
        }
        levels = self.state.levels.index_copy(0, rows, other.state.levels)
        return SearchResult(State(levels, self.state.scale.index_copy(0, rows, other.state.scale)), **rest)

    def or_better(self, other: "SearchResult") -> "SearchResult":
        """Row by row the one that costs less, this one where they are equal."""
        wins = other.cost < self.cost
        picked = {
            field.name: torch.where(wins, getattr(other, field.name), getattr(self, field.name))
            for field in fields(self)
            if field.name != "state"
        }
        column = wins[:, None]
        levels = torch.where(column, other.state.levels, self.state.levels)
        return SearchResult(State(levels, torch.where(column, other.state.scale, self.state.scale)), **picked)


@dataclass(frozen=True)
class Search:
    """The search in one metric. Targets are weights (rows, in) in the metric's order and dtype."""

    metric: Metric
    grid: Grid
    rounding: Rounding

    # starts

    def schur_start(self, target: Tensor) -> State:
        """Group after group in the metric S_t, which knows that all later groups will make up for its error.

        GPTQ (Frantar et al. 2023) with a whole group as its unit: after each group the targets of the later ones move
        by the error times U_tt^-1 U_t,later.
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
        """Group after group in the metric H_tt, each for itself (the reference's clip-optimize); with `propagate` so
        that it makes up for the groups before it as well (clip-optimize-EP)."""
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
        """Fills in group t of `state`: clip search weighted by the metric's diagonal, then flips."""
        levels, scale = self._clip(wanted, metric.diagonal().contiguous())
        self._kernels(target=wanted).flip_search(
            correlation, metric, levels @ metric, levels, scale, self.grid.box, self.rounding, guarded=False
        )
        state.levels[:, self.metric.span(t)] = levels
        state.scale[:, t] = scale

    def _clip(self, wanted: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        low, high = torch.aminmax(wanted, dim=1)
        low, high = low.clamp_max_(0.0), high.clamp_min_(0.0)
        widest = self.grid.covering_scale(low, high).clamp_min_(2.0**-100)  # weights are near 1: below it all is 0
        levels = torch.empty_like(wanted)
        scale = torch.empty_like(widest)
        self._kernels(target=wanted).weighted_clip(
            wanted, weights, low, widest, levels, scale, self.grid.box, CLIP_STEPS
        )
        return levels, scale

    # descent

    def descend(self, target: Tensor, start: State, sweeps: int) -> SearchResult:
        """Sweeps over all groups with the full metric, until a row stands still or has had `sweeps` of them."""
        rows = torch.arange(len(target), device=target.device)
        state, result = start.copy(), start.copy()
        steps, moves = torch.zeros_like(rows), torch.zeros_like(rows)
        fall = torch.zeros(len(rows), dtype=torch.float64, device=target.device)
        moving = target
        for _ in range(sweeps):
            taken, gained = self._sweep(moving, state)
            result.levels[rows], result.scale[rows] = state.levels, state.scale
            steps[rows] += taken
            moves[rows] += taken > 0
            fall[rows] += gained
            if not bool(taken.any()):
                break
            keep = _padded(torch.nonzero(taken)[:, 0], len(taken))
            rows, moving, state = rows[keep], moving[keep], state.take(keep)
        cost = self.cost(target, result)
        return SearchResult(result, cost + fall, cost, moves, steps)

    def _sweep(self, target: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """One sweep, in place; no row costs more than before. Returns steps taken and what the cost fell by."""
        error = target - state.values(self.metric)
        steps = torch.zeros(len(target), dtype=torch.int64, device=target.device)
        fall = torch.zeros(len(target), dtype=torch.float64, device=target.device)
        flip_search = self._kernels(target).flip_search
        for t in range(self.metric.groups):
            correlation, metric, products, levels, scale = self._group(error, state, t)
            taken, gained = flip_search(
                correlation, metric, products, levels, scale, self.grid.box, self.rounding, guarded=True
            )
            self._put(target, error, state, t, levels, scale)
            steps += taken
            fall += gained
        return steps, fall

    def anneal(self, target: Tensor, state: State, sweeps: int, temperature: float, seed: int) -> State:
        """Sweeps of random steps at a falling temperature. The result may cost more than `state`: descend from it."""
        state = state.copy()
        error = target - state.values(self.metric)
        generator = torch.Generator().manual_seed(seed)
        shape = (max(1, self.metric.columns // ANNEAL_SHARE), self.metric.columns)
        for sweep in range(sweeps):
            warmth = temperature * (1.0 - sweep / sweeps) ** 1.5
            for t in range(self.metric.groups):
                noise = torch.empty(shape, dtype=target.dtype).exponential_(generator=generator).to(target.device)
                correlation, metric, products, levels, scale = self._group(error, state, t)
                self._kernels(target).anneal(
                    correlation, metric, products, levels, scale, self.grid.box, self.rounding,
                    temperature=warmth, noise=noise,
                )  # fmt: skip
                self._put(target, error, state, t, levels, scale)
        return state

    def _group(self, error: Tensor, state: State, t: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What the kernels want to know of group t with all other groups as they are."""
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

    # judgement

    def cost(self, target: Tensor, state: State) -> Tensor:
        """e H_l e' of each row, (rows,) float64, in units of the metric."""
        error = target - state.values(self.metric)
        return torch.sum((error @ self.metric.full).mul_(error), dim=1, dtype=torch.float64)

    def _empty(self, target: Tensor) -> State:
        return State(torch.empty_like(target), target.new_empty(len(target), self.metric.groups))

    def _kernels(self, target: Tensor) -> type[kernels.Kernels]:
        return kernels.for_device(target.device)


def _padded(rows: Tensor, available: int) -> Tensor:
    """`rows` of a tile and as many others of it as make their number a multiple of PADDING."""
    missing = -len(rows) % PADDING
    if not missing:
        return rows
    others = torch.ones(available, dtype=torch.bool, device=rows.device)
    others[rows] = False
    return torch.cat([rows, torch.nonzero(others)[:missing, 0]])
