"""Binary: one bit per weight on two levels for each row and group of columns, by JointQ's search.

    W ~ (codes - zero_point) * scale * c,    codes 0 or 1

Levels are +-scale/2, or any two with `offset`: the form of CQ (OneComp) and of ARB (ARB-LLM, Li et al., arXiv
2410.03129). c is 1, or with `column_scale` a number for each column: the form of OneBit (Xu et al., arXiv 2402.11295)
and of ARB-RC. Their authors fit signs and scales to the weight; here all are chosen for the layer's output.

With H_l = H + lambda R and fixed c, rows of W / c are solved in the metric diag(c) H_l diag(c). With fixed codes and
scales, Z = (codes - zero_point) * scale, the best c is that of (Z'Z o H_l) c = diag(Z' W H_l). They take turns, from
c = 1 where rows have several groups, else from the right singular vector of |W|: there W H_l is computed once, and each
search takes one product more.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jointq_cli.errors import NumericsError
from jointq_cli.formats.base import StoredWeight
from jointq_cli.formats.column_scaled import ColumnScaledWeight
from jointq_cli.formats.uniform import UniformWeight, check_group_size, grid_label
from jointq_cli.quantization.quantizers.base import Prepared, Quantizer, Solution
from jointq_cli.quantization.quantizers.jointq.metric import Metric
from jointq_cli.quantization.quantizers.jointq.quantizer import JointQ, JointQPrepared
from jointq_cli.quantization.quantizers.jointq.scaled_layer import UniformLayer, over_tiles
from jointq_cli.quantization.quantizers.jointq.search import State
from jointq_cli.quantization.quantizers.statistics import HeldOut
from jointq_cli.quantization.quantizers.uniform import FailedPreparation, hessian_product
from jointq_cli.setting_rules import check_settings, setting

_LEAST = 1 / 64  # of a column's scale, relative to their mean: W / c must not overflow
_POWER_STEPS = 3  # towards the singular pair of |W|, whose other singular values are much smaller
_COLUMNS = 256  # of the columns' system at a time
_PRECISION = 1e-4  # of column scales, relative to all
_MOST_STEPS = 100


@dataclass(frozen=True)
class Turn:
    """What is found for column scales c (in,), as they are stored, or for none; cost: tr(E H_l E'), in the metric's
    order and unit."""

    columns: Tensor | None
    state: State
    cost: float


@dataclass(frozen=True)
class ColumnTurns:
    """One layer. target: W as the search has it, with rows of padding; correlation: W H_l, of the same shape; signal:
    tr(W H_l W')."""

    jointq: JointQ
    layer: UniformLayer
    metric: Metric
    target: Tensor
    correlation: Tensor
    signal: float

    @classmethod
    def of(cls, jointq: JointQ, layer: UniformLayer, metric: Metric) -> "ColumnTurns":
        target = layer.target(layer.weight, metric)
        return cls(jointq, layer, metric, target, *layer.correlation(target, metric))

    def first(self) -> Turn:
        """From JointQ's start, without column scales."""
        return self._searched(None, None)

    def first_scaled(self) -> Turn:
        """From JointQ's start, with the column scales that fit |W| best together with scales of rows, as in OneBit."""
        columns = self._on_one_thread(lambda: _right_singular(self.target.abs()))
        if not bool(columns.any()):
            return self.first()
        return self._searched(self._as_stored(columns), None)

    def again(self, turn: Turn) -> Turn:
        """Codes and scales searched from those of `turn`, with its column scales."""
        return self._searched(turn.columns, turn.state)

    def scaled(self, turn: Turn) -> Turn:
        """The best column scales for codes and scales of `turn`, by conjugate gradients from those that it has."""
        values, full = turn.state.values(self.metric), self.metric.full
        energy = torch.empty_like(full)

        def one(span: slice) -> None:
            upper = (values[:, span].T @ values[:, span.start :]).mul_(full[span, span.start :])
            energy[span, span.start :] = upper
            energy[span.stop :, span] = upper[:, span.stop - span.start :].T

        over_tiles(len(full), _COLUMNS, full.device, one)
        along = self._on_one_thread(lambda: (values * self.correlation[: len(values)]).sum(dim=0))
        start = torch.ones_like(along) if turn.columns is None else turn.columns
        columns = self._as_stored(self._on_one_thread(lambda: _conjugate_gradients(energy, along, start)))
        fall = torch.dot(columns.double(), (2.0 * along - energy @ columns).double())
        return Turn(columns, turn.state, max(0.0, self.signal - float(fall)))

    def _searched(self, columns: Tensor | None, before: State | None) -> Turn:
        """Rows of W / c solved in the metric diag(c) H_l diag(c)."""
        layer, metric, target, correlation = self.layer, self.metric, self.target, self.correlation
        if columns is not None:
            metric = replace(metric, full=(metric.full * columns).mul_(columns[:, None]))
            target, correlation = target / columns, correlation * columns
        if metric.groups == 1:
            found = layer.solve_group(metric, target, correlation, before)
            return Turn(columns, found.state, float(found.cost.sum()))
        if columns is not None:
            original = torch.empty_like(columns).index_copy_(0, metric.order, columns)
            layer = replace(layer, weight=(layer.weight / original).float())
        if before is None:
            found = self.jointq.from_starts(layer, metric)
        else:
            found = self.jointq.continued(layer, metric, before)
        return Turn(columns, found.state, float(found.cost.sum()))

    def _on_one_thread(self, function: Callable[[], Tensor]) -> Tensor:
        """So that no bit depends on the number of threads."""
        return over_tiles(1, None, self.target.device, lambda _: function())[0]

    def _as_stored(self, columns: Tensor) -> Tensor:
        least = _LEAST * float(columns.abs().mean())
        return torch.where(columns.abs() < least, least, columns).to(self.layer.scale_dtype).to(columns.dtype)


def _scales(binary: "Binary") -> bool:
    return binary.column_scale


@dataclass(frozen=True)
class Binary(Quantizer):
    """See the module, and configs/quantizer/binary.yaml for what each field does."""

    group_size: int | None = setting(128)
    offset: bool = setting(False)
    column_scale: bool = setting(False)
    rounds: int = setting(3, least=0, used=_scales)
    regularization_lambda: float = setting(0.3, least=0)
    regularization_gamma: float = setting(1.0, least=0)
    regularization_floor: float = setting(0.1, least=0)
    max_sweeps: int = setting(3, least=0)
    batch_size: int | None = setting(None, least=1, null="to choose it by device")
    on_failure: str = setting("error", choices=("error", "rtn"))

    def __post_init__(self) -> None:
        check_settings(self, "quantizer")
        check_group_size(self.group_size, {})

    @property
    def _jointq(self) -> JointQ:
        """What solves rows. Where a row is one group, the start has searched it to its end already."""
        return JointQ(
            bits=1,
            group_size=self.group_size,
            zero_point="real" if self.offset else "half",
            regularization_lambda=self.regularization_lambda,
            regularization_gamma=self.regularization_gamma,
            regularization_floor=self.regularization_floor,
            max_sweeps=0 if self.group_size is None else self.max_sweeps,
            batch_size=self.batch_size,
            on_failure=self.on_failure,
        )

    @property
    def _sweeps(self) -> int:
        """Of a row whose columns have got other scales: one searches a single group to its end."""
        return min(1, self.max_sweeps) if self.group_size is None else self.max_sweeps

    @property
    def row_separable(self) -> bool:
        return not self.column_scale  # which all rows have in common

    @property
    def prepare_key(self) -> str:
        return repr(replace(self, offset=False, rounds=0, max_sweeps=0))

    def check(self, in_features: Mapping[str, int]) -> None:
        check_group_size(self.group_size, in_features)

    def storage(self, out_features: int, in_features: int, dtype: torch.dtype) -> StoredWeight:
        found = self._jointq.storage(out_features, in_features, dtype)
        return self._stored(found, torch.empty(in_features, dtype=dtype, device="meta"))

    def _stored(self, found: StoredWeight, column_scale: Tensor) -> StoredWeight:
        assert isinstance(found, UniformWeight)
        return ColumnScaledWeight(found, column_scale) if self.column_scale else found

    def cost(self, out_features: int, in_features: int, tokens: int) -> float:
        product = hessian_product(out_features, in_features)
        once = 4 * product if self.group_size is None else self._jointq.cost(out_features, in_features, tokens)
        rounds = self.rounds if self.column_scale else 0
        return once + rounds * product + max(0, rounds - 1) * once

    def prepare(self, hessian: Tensor, heldout: HeldOut | None = None) -> Prepared:
        return self._jointq.prepare(hessian)

    def ridge(self, hessian: Tensor) -> Tensor | None:
        return self._jointq.ridge(hessian)

    def join(self, parts: Sequence[Solution]) -> Solution:
        return self._jointq.join(parts)

    def quantize(self, weight: Tensor, prepared: Prepared, scale_dtype: torch.dtype) -> Solution:
        turns = self.column_scale or self.group_size is None
        if not turns or not isinstance(prepared, JointQPrepared):
            return self._by_jointq(weight, prepared, scale_dtype)
        if not math.isfinite(float(weight.sum())) and not bool(torch.isfinite(weight).all()):
            raise NumericsError("the weight holds NaN or Inf")
        try:
            return self._by_turns(weight, prepared, scale_dtype)
        except NumericsError as error:
            if self.on_failure == "error":
                raise
            return self._by_jointq(weight, FailedPreparation(str(error)), scale_dtype)

    def _by_jointq(self, weight: Tensor, prepared: Prepared, scale_dtype: torch.dtype) -> Solution:
        """With c = 1."""
        found = self._jointq.quantize(weight, prepared, scale_dtype)
        columns = torch.ones(weight.shape[1], dtype=scale_dtype, device=weight.device)
        return replace(found, quantized=self._stored(found.quantized, columns))

    def _by_turns(self, weight: Tensor, prepared: JointQPrepared, scale_dtype: torch.dtype) -> Solution:
        problem, metric = self._problem(weight, prepared.metric, scale_dtype), prepared.metric
        turns, layer, signal = list(self._turns(problem)), problem.layer, problem.signal
        last = turns[-1]
        columns = torch.ones(weight.shape[1], dtype=scale_dtype, device=weight.device)
        if last.columns is not None:
            columns.index_copy_(0, metric.order, last.columns.to(scale_dtype))
        notes: dict[str, float | int | str | bool] = {
            "lambda": self.regularization_lambda,
            "start_error": turns[0].cost / signal if signal else 0.0,
            "final_error": last.cost / signal if signal else 0.0,
            "dead_columns": int((prepared.everything.diagonal() == 0).sum()),
            "min_condition": metric.condition,
        }
        return Solution(
            quantized=self._stored(layer.quantized(metric, last.state, permuted=False), columns),
            damping=metric.damping if metric.damping_retries else None,
            verdict="damped" if metric.damping_retries else "ok",
            notes=notes
            | ({"rounds": len(turns) // 2} if self.column_scale else {"sweeps": 0, "flips_per_weight": 0.0}),
            signal=math.ldexp(signal, 2 * layer.exponent),
        )

    def _problem(self, weight: Tensor, metric: Metric, scale_dtype: torch.dtype) -> ColumnTurns:
        exponent = math.frexp(float(weight.abs().max()))[1]
        layer = UniformLayer(weight, exponent, self.batch_size, self._jointq.integer_grid, scale_dtype)
        return ColumnTurns.of(self._jointq, layer, metric)

    def _turns(self, problem: ColumnTurns) -> Iterator[Turn]:
        """Codes, then column scales and codes in turn; each costs less than the one before."""
        turn = problem.first_scaled() if self.column_scale and self.group_size is None else problem.first()
        yield turn
        steps = self.rounds * [problem.scaled, problem.again] if self.column_scale else []
        for step in steps[:-1]:
            following = step(turn)
            if not following.cost < turn.cost:  # column scales as they are stored are no better, or no code changes
                return
            turn = following
            yield turn

    def describe(self) -> str:
        label = grid_label(self._jointq.integer_grid, self.group_size) + " column-scaled" * self.column_scale
        return f"Binary {label} lambda={self.regularization_lambda:g}"


def _right_singular(matrix: Tensor) -> Tensor:
    """The first right singular vector of a matrix without negative entries, with mean 1; 0 where all is 0."""
    found = matrix.mean(dim=0)
    for _ in range(_POWER_STEPS):
        found = (matrix @ found) @ matrix
        found /= found.mean().clamp_min(torch.finfo(found.dtype).tiny)
    return found


def _conjugate_gradients(matrix: Tensor, right: Tensor, start: Tensor) -> Tensor:
    """An x with `matrix` x = `right`, from x = `start`; the matrix is symmetric and positive semidefinite.

    Preconditioned by its diagonal. Signs of many rows make columns of Z nearly orthogonal, so that some ten steps reach
    what scales of 16 bits can hold.
    """
    diagonal = matrix.diagonal().clamp_min(torch.finfo(matrix.dtype).tiny)
    found, residual = start.clone(), right - matrix @ start
    scaled = residual / diagonal
    direction, size = scaled, torch.dot(residual, scaled)
    enough = _PRECISION**2 * torch.dot(right, right / diagonal)
    for _ in range(_MOST_STEPS):
        along = matrix @ direction
        energy = torch.dot(direction, along)
        if not bool((size > enough) & (energy > 0)):
            break
        found = found + size / energy * direction
        residual = residual - size / energy * along
        scaled, before = residual / diagonal, size
        size = torch.dot(residual, scaled)
        direction = scaled + size / before * direction
    return found
