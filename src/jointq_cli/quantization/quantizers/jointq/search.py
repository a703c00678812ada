"""JointQ's search for the levels and scales of a tile of rows on a uniform grid: starts, sweeps, annealing.

A row of levels z (in,) and scales s (groups,) represents the weights s z.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from jointq_cli import kernels
from jointq_cli.formats.uniform import Grid
from jointq_cli.kernels import Rounding
from jointq_cli.quantization.quantizers.jointq.descent import Descent, RowState
from jointq_cli.quantization.quantizers.jointq.metric import Metric

CLIP_STEPS = 40  # shrink factors 1.00, 0.98 .. 0.22 of a group's range; coarse, since flips follow
ANNEAL_SHARE = 4  # columns per random step of a group in each sweep


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

    def _sweep(self, target: Tensor, state: State) -> tuple[Tensor, Tensor]:
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

    def _empty(self, target: Tensor) -> State:
        return State(torch.empty_like(target), target.new_empty(len(target), self.metric.groups))
