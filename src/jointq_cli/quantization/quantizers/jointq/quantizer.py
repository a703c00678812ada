"""JointQ: codes and scales of a layer optimised together for the least output error.

Minimises e H_l e' per output row with e = w - w_quantised and H_l = H + lambda R, over codes, scales and zero-points,
by local search. The method is that of Fujitsu's OneComp, called the reference below; docs/jointq.md says what is
different here, and has the measurements behind the defaults. `settings` has what is asked of it, `metric` has H_l and
`search` the local search; this module chooses the start, and lambda where it is not fixed.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from jointq_cli.errors import NumericsError
from jointq_cli.formats.k_quant import SUPER_BLOCK
from jointq_cli.formats.uniform import group_columns
from jointq_cli.quantization.quantizers.base import Prepared, Solution
from jointq_cli.quantization.quantizers.gptq import GPTQ, GptqPrepared
from jointq_cli.quantization.quantizers.jointq.descent import SearchResult
from jointq_cli.quantization.quantizers.jointq.metric import Metric, activation_order, measure, natural_order
from jointq_cli.quantization.quantizers.jointq.scaled_layer import KLayer, ScaledLayer, UniformLayer
from jointq_cli.quantization.quantizers.jointq.search import Search, State
from jointq_cli.quantization.quantizers.jointq.settings import JointQSettings
from jointq_cli.quantization.quantizers.rtn import RTN
from jointq_cli.quantization.quantizers.statistics import HeldOut
from jointq_cli.quantization.quantizers.uniform import hessian_product

Chosen = tuple[float, Metric, SearchResult[Any]]  # a lambda, its metric, and what the search found


@dataclass(frozen=True)
class JointQPrepared(Prepared):
    """What layers with the same input share. everything (in, in) float64: the Hessian of all tokens; hessian: that of
    all but the held-out tokens, with which lambda is chosen; metric: that of `hessian` and the first lambda."""

    everything: Tensor
    heldout: HeldOut | None
    hessian: Tensor
    columns: int
    metric: Metric
    gptq: GptqPrepared | None


@dataclass(frozen=True)
class JointQ(JointQSettings):
    """See the module."""

    def _prepare(self, hessian: Tensor, heldout: HeldOut | None) -> JointQPrepared:
        everything = hessian
        if self.lambda_mode == "heldout":
            if heldout is None:
                raise ValueError("JointQ.prepare needs held-out tokens where lambda_mode is heldout")
            hessian = heldout.complement(everything)
        self.check({"this layer": len(hessian)})
        columns = SUPER_BLOCK if self.grid else group_columns(self.group_size, len(hessian))
        order = activation_order(hessian) if self.act_order else natural_order(hessian, columns)
        first = self.strength if self.lambda_mode == "fixed_lambda" else self.lambda_list[0]
        extra = self.penalty(hessian, first)
        metric = measure(hessian, order, columns, extra)
        gptq = None
        if self.enable_gptq:
            ordered = hessian.index_select(0, order).index_select(1, order)
            ordered.diagonal().add_(extra[order])  # the reference's GPTQ uses H alone, which gives a worse start
            gptq = self._gptq()._prepare(ordered, None)
        return JointQPrepared(everything, heldout, hessian, columns, metric, gptq)

    def join(self, parts: Sequence[Solution]) -> Solution:
        joined = super().join(parts)
        if joined.verdict in ("fallback", "no input"):  # rounded to nearest, without a search
            return joined
        signals = [part.signal for part in parts]
        rows = [float(part.quantized.shape[0]) for part in parts]

        def mean(name: str, weights: list[float]) -> float:
            total = math.fsum(weights)
            weighted = (float(part.notes[name]) * weight for part, weight in zip(parts, weights, strict=True))
            return math.fsum(weighted) / total if total else 0.0

        notes = {
            "start_error": mean("start_error", signals),
            "final_error": mean("final_error", signals),
            "sweeps": max(int(part.notes["sweeps"]) for part in parts),
            "flips_per_weight": mean("flips_per_weight", rows),
        }
        return replace(joined, notes={**joined.notes, **notes}, signal=math.fsum(signals))

    def _gptq(self) -> GPTQ:
        return GPTQ(
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            zero_point=self.zero_point,
            mse=self.gptq.mse,
            act_order=False,  # columns and groups are in JointQ's order already
            static_groups=False,
            damping=self.gptq.damping,
            block_size=self.gptq.block_size,
            on_failure="error",
        )

    def cost(self, out_features: int, in_features: int, tokens: int) -> float:
        lambdas = len(self.lambda_list) if self.lambda_mode != "fixed_lambda" else 1
        random = self.annealing_sweeps + self.ils_enabled * self.ils_num_iterations
        return lambdas * (6 + 5 * self.max_sweeps + 4 * random) * hessian_product(out_features, in_features)

    @property
    def _rtn(self) -> RTN:
        return RTN(self.bits, self.group_size, self.symmetric, mse=True, grid=self.grid, zero_point=self.zero_point)

    def quantize(self, weight: Tensor, prepared: Prepared, scale_dtype: torch.dtype) -> Solution:
        found = super().quantize(weight, prepared, scale_dtype)
        if not self.is_turned or "lambda" not in found.notes:
            return found
        return replace(found, notes={**found.notes, "lambda": self.strength})  # added before turning

    @property
    def _plain(self) -> "JointQ":
        return replace(self, incoherence="none", zero_point=self.integer_grid.zero, regularization_lambda=0.0)

    @property
    def _fallback(self) -> RTN | None:
        return self._rtn if self.on_failure == "rtn" else None

    def _permutes(self, groups: int) -> bool:
        return self.act_order and groups > 1

    def _solve(self, weight: Tensor, prepared: Prepared, scale_dtype: torch.dtype) -> Solution:
        if not isinstance(prepared, JointQPrepared):
            raise TypeError(f"JointQ.quantize needs what JointQ.prepare returned, not {type(prepared).__name__}")
        layer = self._layer(weight, scale_dtype)
        strength, metric, solved = {
            "fixed_lambda": self._fixed,
            "incremental_lambda": self._incremental,
            "heldout": self._heldout,
        }[self.lambda_mode](layer, prepared)
        if self.ils_enabled:
            solved = self._iterate(layer, metric, solved)
        signal = layer.signal(metric)
        return Solution(
            quantized=layer.quantized(metric, solved.state, permuted=self._permutes(metric.groups)),
            damping=metric.damping if metric.damping_retries else None,
            verdict="damped" if metric.damping_retries else "ok",
            notes={
                "lambda": strength,
                "start_error": _share(solved.start_cost, signal),
                "final_error": _share(solved.cost, signal),
                "sweeps": int(solved.sweeps.max()),
                "flips_per_weight": float(solved.steps.sum()) / weight.numel(),
                "dead_columns": int((prepared.everything.diagonal() == 0).sum()),
                "min_condition": metric.condition,
            },
            signal=math.ldexp(signal, 2 * layer.exponent),  # parts of a layer may have different exponents
        )

    def _layer(self, weight: Tensor, scale_dtype: torch.dtype) -> ScaledLayer[Any]:
        exponent = math.frexp(float(weight.abs().max()))[1]
        if self.k_grid:
            return KLayer(weight, exponent, self.batch_size, self.k_grid)
        return UniformLayer(weight, exponent, self.batch_size, self.integer_grid, scale_dtype)

    def _fixed(self, layer: ScaledLayer[Any], prepared: JointQPrepared) -> Chosen:
        return self.strength, prepared.metric, self.from_starts(layer, prepared.metric, prepared.gptq)

    def _incremental(self, layer: ScaledLayer[Any], prepared: JointQPrepared) -> Chosen:
        """The reference's rule: increase lambda as long as the weight error falls and the output error hardly rises."""
        skip = self.incremental_initial_skip_ew_threshold
        accepted: Chosen | None = None
        e_y = e_w = math.inf
        for strength in self.lambda_list:
            metric, solved = self._next(layer, prepared, strength, accepted[2] if accepted else None)
            new_y = layer.output_error(metric, solved.state, prepared.hessian)
            new_w = layer.weight_error(metric, solved.state)
            if accepted is None and strength == 0 and skip is not None and new_w > skip:
                continue
            if accepted is not None and not self._accepts(e_y, e_w, new_y, new_w):
                break
            accepted, e_y, e_w = (strength, metric, solved), new_y, new_w
        if accepted is None:
            raise NumericsError(
                f"quantizer.lambda_list={self.lambda_list}: its only value is 0, whose weight error exceeds "
                f"incremental_initial_skip_ew_threshold={skip}"
            )
        return accepted

    def _accepts(self, e_y: float, e_w: float, new_y: float, new_w: float) -> bool:
        if new_w > e_w:
            return False
        both_fell = new_y < e_y and new_w < e_w
        traded = new_y <= e_y * (1 + self.incremental_eps_y) and new_w <= e_w * (1 - self.incremental_eps_w)
        return both_fell or traded

    def _heldout(self, layer: ScaledLayer[Any], prepared: JointQPrepared) -> Chosen:
        """The lambda whose solution has the least output error on the held-out tokens; then solved with all tokens.

        Each lambda is solved from the starts, as the final one is: continuing from the solution of a smaller lambda
        would favour large ones, which would have had more sweeps.
        """
        assert prepared.heldout is not None  # checked by _prepare
        best, least = self.lambda_list[0], math.inf
        for strength in self.lambda_list:
            metric, solved = self._next(layer, prepared, strength, None)
            error = layer.output_error(metric, solved.state, prepared.heldout.hessian)
            if error < least:
                best, least = strength, error
        everything = prepared.everything
        metric = measure(everything, prepared.metric.order, prepared.columns, self.penalty(everything, best))
        return best, metric, self.from_starts(layer, metric, prepared.gptq)

    def _next(
        self, layer: ScaledLayer[Any], prepared: JointQPrepared, strength: float, previous: SearchResult[Any] | None
    ) -> tuple[Metric, SearchResult[Any]]:
        """The solution for one of several lambda: continued from `previous`, or from the starts if that is None."""
        first = strength == self.lambda_list[0]
        extra = self.penalty(prepared.hessian, strength)
        metric = prepared.metric if first else measure(prepared.hessian, prepared.metric.order, prepared.columns, extra)
        if previous is not None:
            return metric, self.continued(layer, metric, previous.state)
        return metric, self.from_starts(layer, metric, prepared.gptq)

    def continued(self, layer: ScaledLayer[Any], metric: Metric, state: Any) -> SearchResult[Any]:
        """Sweeps from a solution that is known."""

        def solve(search: Search, target: Tensor, part: State | None) -> SearchResult[Any]:
            assert part is not None
            return search.descend(target, part, self.max_sweeps)

        return layer.solve(metric, solve, state)

    def from_starts(
        self, layer: ScaledLayer[Any], metric: Metric, gptq: GptqPrepared | None = None
    ) -> SearchResult[Any]:
        """For every row the best of the searches from all starts."""
        state = None
        if gptq is not None:
            assert isinstance(layer, UniformLayer)  # __post_init__ requires it
            state = layer.gptq_start(self._gptq(), gptq, metric)

        def solve(search: Search, target: Tensor, gptq_start: State | None) -> SearchResult[Any]:
            best: SearchResult[Any] | None = None
            for start in self._starts(search, target, gptq_start):
                found = search.descend(target, start, self.max_sweeps)
                best = found if best is None else best.or_better(found)
            assert best is not None  # __post_init__ requires a start
            return self._anneal(search, target, best)

        return layer.solve(metric, solve, state)

    def _starts(self, search: Search, target: Tensor, gptq_start: State | None) -> Iterator[State]:
        if self.enable_schur:
            yield search.schur_start(target)
        if self.enable_clip_optimize:
            yield search.clip_start(target, propagate=False)
        if self.enable_clip_optimize_ep:
            yield search.clip_start(target, propagate=True)
        if gptq_start is not None:
            yield gptq_start

    def _anneal(self, search: Search, target: Tensor, found: SearchResult[Any]) -> SearchResult[Any]:
        if not self.annealing_sweeps:
            return found
        annealed = search.anneal(target, found.state, self.annealing_sweeps, self.annealing_temperature, seed=0)
        result = search.descend(target, annealed, max(1, self.max_sweeps))
        return found.or_better(replace(result, start_cost=found.start_cost))

    def _iterate(self, layer: ScaledLayer[Any], metric: Metric, solved: SearchResult[Any]) -> SearchResult[Any]:
        """Iterated local search on the worst rows: random steps, a descent from there, and the best result is kept."""
        count = min(self.ils_num_channels or len(solved.cost), len(solved.cost))
        worst = torch.argsort(solved.cost, descending=True, stable=True)[:count].sort().values

        def solve(search: Search, target: Tensor, state: State | None) -> SearchResult[Any]:
            assert state is not None
            best = search.descend(target, state, self.max_sweeps)
            for kick in range(self.ils_num_iterations * self.ils_num_clones):
                if kick % self.ils_num_clones == 0:
                    origin = best.state
                perturbed = search.anneal(target, origin, 1, self.annealing_temperature, seed=1 + kick)
                best = best.or_better(search.descend(target, perturbed, self.max_sweeps))
            return best

        better = layer.rows(worst).solve(metric, solve, solved.state.take(worst))
        total = replace(
            better,
            start_cost=solved.start_cost[worst],
            sweeps=solved.sweeps[worst] + better.sweeps,
            steps=solved.steps[worst] + better.steps,
        )
        return solved.with_rows(worst, total)


def _share(cost: Tensor, signal: float) -> float:
    return float(cost.sum()) / signal if signal else 0.0
