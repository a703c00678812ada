"""JointQ: codes and scales of a layer optimised together for the least output error.

Minimises e H_l e' per output row with e = w - w_quantised and H_l = H + lambda R, over codes, scales and zero-points,
by local search. The method is that of Fujitsu's OneComp, called the reference below; docs/jointq.md says what is
different here, and has the measurements behind the defaults. This module chooses lambda and the start; `metric` has
H_l, `search` the local search.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from jointq_cli.errors import ConfigError, NumericsError
from jointq_cli.formats.k_quant import SUPER_BLOCK
from jointq_cli.formats.uniform import group_columns
from jointq_cli.quantization.quantizers.base import Prepared, Solution
from jointq_cli.quantization.quantizers.gptq import GPTQ, GptqPrepared
from jointq_cli.quantization.quantizers.jointq.descent import SearchResult
from jointq_cli.quantization.quantizers.jointq.metric import Metric, activation_order, measure, natural_order, penalty
from jointq_cli.quantization.quantizers.jointq.scaled_layer import KLayer, ScaledLayer, UniformLayer
from jointq_cli.quantization.quantizers.jointq.search import Search, State
from jointq_cli.quantization.quantizers.rtn import RTN
from jointq_cli.quantization.quantizers.statistics import HeldOut
from jointq_cli.quantization.quantizers.uniform import INCOHERENCE, UniformQuantizer, hessian_product, is_uniform
from jointq_cli.setting_rules import changed, check_settings, setting, shown

Chosen = tuple[float, Metric, SearchResult[Any]]  # a lambda, its metric, and what the search found


@dataclass(frozen=True)
class GptqStart:
    """Settings of GPTQ as a start of the search; bits, groups and symmetry are JointQ's."""

    mse: bool = setting(True)
    damping: float = setting(0.01, least=0)
    block_size: int = setting(128, least=1)


def _tries_lambdas(jointq: "JointQ") -> bool:
    return jointq.lambda_mode != "fixed_lambda"


def _is_incremental(jointq: "JointQ") -> bool:
    return jointq.lambda_mode == "incremental_lambda"


def _is_diagonal(jointq: "JointQ") -> bool:
    return jointq.regularization_mode == "diagonal"


def _iterates(jointq: "JointQ") -> bool:
    return jointq.ils_enabled


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
class JointQ(UniformQuantizer):
    """See the module, and configs/quantizer/jointq.yaml for what each field does."""

    act_order: bool = setting(False)
    lambda_mode: str = setting("fixed_lambda", choices=("fixed_lambda", "incremental_lambda", "heldout"))
    regularization_lambda: float = setting(0.3, least=0)
    regularization_mode: str = setting("diagonal", choices=("identity", "diagonal"))
    regularization_gamma: float = setting(1.0, least=0, used=_is_diagonal)
    regularization_floor: float = setting(0.1, least=0, used=_is_diagonal)
    regularization_reference: str = setting("mean_diagonal", choices=("absolute", "mean_diagonal"))
    lambda_list: list[float] = setting([0.001, 0.01, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5], least=0, used=_tries_lambdas)
    incremental_eps_y: float = setting(0.03, least=0, used=_is_incremental)
    incremental_eps_w: float = setting(0.1, least=0, used=_is_incremental)
    incremental_initial_skip_ew_threshold: float | None = setting(0.3, least=0, null="for never", used=_is_incremental)
    heldout_share: float = setting(0.25, above=0, below=1, used=lambda jointq: jointq.lambda_mode == "heldout")
    enable_schur: bool = setting(True)
    enable_clip_optimize: bool = setting(False)
    enable_clip_optimize_ep: bool = setting(False)
    enable_gptq: bool = setting(False)
    gptq: GptqStart = setting(GptqStart(), used=lambda jointq: jointq.enable_gptq)
    max_sweeps: int = setting(3, least=0)
    annealing_sweeps: int = setting(0, least=0)
    annealing_temperature: float = setting(
        0.15, least=0, used=lambda jointq: jointq.annealing_sweeps > 0 or jointq.ils_enabled
    )
    ils_enabled: bool = setting(False)
    ils_num_iterations: int = setting(10, least=1, used=_iterates)
    ils_num_clones: int = setting(8, least=1, used=_iterates)
    ils_num_channels: int | None = setting(None, least=1, null="for all", used=_iterates)
    batch_size: int | None = setting(None, least=1, null="to choose it by device")
    on_failure: str = setting("error", choices=("error", "rtn"))
    _: KW_ONLY
    incoherence: str = setting("auto", choices=INCOHERENCE, used=is_uniform)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self.gptq, "quantizer.gptq")
        for complaint in self._complaints():
            raise ConfigError(f"quantizer.{complaint}")

    def _complaints(self) -> Iterator[str]:
        """What is wrong with settings in combination, by key."""
        if self.lambda_mode != "fixed_lambda" and not self.lambda_list:
            yield f"lambda_list=[]: lambda_mode={self.lambda_mode} needs at least one value"
        if self.lambda_mode != "fixed_lambda" and self.lambda_list != sorted(set(self.lambda_list)):
            yield f"lambda_list={self.lambda_list}: must rise from value to value"
        if self.lambda_mode == "incremental_lambda" and self.regularization_mode == "diagonal":
            yield "regularization_mode=diagonal: lambda_mode=incremental_lambda works with identity only"
        if not any((self.enable_schur, self.enable_clip_optimize, self.enable_clip_optimize_ep, self.enable_gptq)):
            yield (
                "enable_schur=false: one start is needed, of enable_schur, enable_clip_optimize, "
                "enable_clip_optimize_ep and enable_gptq"
            )
        if self.is_turned and self.lambda_mode != "fixed_lambda":
            yield f"lambda_mode={self.lambda_mode}: incoherence=input works with fixed_lambda only"
        if self.ils_enabled and self.max_sweeps == 0:
            yield "max_sweeps=0: ils_enabled=true needs at least 1, for it searches from where a search ended"
        uniform_only = (
            "act_order",
            "enable_clip_optimize",
            "enable_clip_optimize_ep",
            "enable_gptq",
            "annealing_sweeps",
            "ils_enabled",
        )
        for name in uniform_only:
            if self.grid and getattr(self, name):
                yield f"grid={self.grid}: does not go with {name}={shown(getattr(self, name))}"
        if (self.ils_enabled or self.annealing_sweeps) and self.annealing_temperature == 0:
            yield "annealing_temperature=0: must be above 0 where ils_enabled or annealing_sweeps ask for random steps"

    @property
    def turnable(self) -> bool:
        return super().turnable and self.lambda_mode == "fixed_lambda"

    @property
    def heldout(self) -> float:
        return self.heldout_share if self.lambda_mode == "heldout" else 0.0

    def _prepare(self, hessian: Tensor, heldout: HeldOut | None) -> JointQPrepared:
        everything = hessian
        if self.lambda_mode == "heldout":
            if heldout is None:
                raise ValueError("JointQ.prepare needs held-out tokens where lambda_mode is heldout")
            hessian = heldout.complement(everything)
        self.check({"this layer": len(hessian)})
        columns = SUPER_BLOCK if self.grid else group_columns(self.group_size, len(hessian))
        order = activation_order(hessian) if self.act_order else natural_order(hessian, columns)
        first = self.regularization_lambda if self.lambda_mode == "fixed_lambda" else self.lambda_list[0]
        extra = self._penalty(hessian, first)
        metric = measure(hessian, order, columns, extra)
        gptq = None
        if self.enable_gptq:
            ordered = hessian.index_select(0, order).index_select(1, order)
            ordered.diagonal().add_(extra[order])  # the reference's GPTQ uses H alone, which gives a worse start
            gptq = self._gptq()._prepare(ordered, None)
        return JointQPrepared(everything, heldout, hessian, columns, metric, gptq)

    def _penalty(self, hessian: Tensor, strength: float) -> Tensor:
        return penalty(
            hessian,
            strength,
            self.regularization_mode,
            self.regularization_gamma,
            self.regularization_floor,
            self.regularization_reference,
        )

    @property
    def row_separable(self) -> bool:
        # Otherwise lambda or the worst rows are chosen over all rows of a layer, or random steps depend on the tile.
        return self.lambda_mode == "fixed_lambda" and not self.ils_enabled and not self.annealing_sweeps

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

    def ridge(self, hessian: Tensor) -> Tensor | None:
        return self._penalty(hessian, self.regularization_lambda) if self.lambda_mode == "fixed_lambda" else None

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
        return replace(found, notes={**found.notes, "lambda": self.regularization_lambda})  # added before turning

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
        return self.regularization_lambda, prepared.metric, self.from_starts(layer, prepared.metric, prepared.gptq)

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
        metric = measure(everything, prepared.metric.order, prepared.columns, self._penalty(everything, best))
        return best, metric, self.from_starts(layer, metric, prepared.gptq)

    def _next(
        self, layer: ScaledLayer[Any], prepared: JointQPrepared, strength: float, previous: SearchResult[Any] | None
    ) -> tuple[Metric, SearchResult[Any]]:
        """The solution for one of several lambda: continued from `previous`, or from the starts if that is None."""
        first = strength == self.lambda_list[0]
        extra = self._penalty(prepared.hessian, strength)
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

    def _describe_options(self) -> list[str]:
        """Lambda or how it is chosen, and all else that differs from the defaults."""
        strength = f"lambda={self.regularization_lambda:g}" if self.lambda_mode == "fixed_lambda" else self.lambda_mode
        stated = (
            "bits",
            "group_size",
            "symmetric",
            "zero_point",
            "incoherence",
            "incoherence_block",
            "grid",
            "regularization_lambda",
            "lambda_mode",
        )
        return [strength, *(_option(name, value) for name, value in changed(self).items() if name not in stated)]


def _option(name: str, value: Any) -> str:
    """Such as act_order, no-schur, max_sweeps=5."""
    if isinstance(value, bool):
        return f"{'' if value else 'no-'}{name.removeprefix('enable_').removesuffix('_enabled')}"
    if isinstance(value, GptqStart):
        return " ".join(_option(f"{name}.{part}", item) for part, item in changed(value).items())
    return f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"


def _share(cost: Tensor, signal: float) -> float:
    return float(cost.sum()) / signal if signal else 0.0
