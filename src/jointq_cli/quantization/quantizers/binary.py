"""Binary: one bit per weight on two levels for each row and group of columns, by JointQ's search.

    W ~ (codes - zero_point) * scale * c,    codes 0 or 1

Levels are +-scale/2, or any two with `offset`: the form of CQ (OneComp) and of ARB (ARB-LLM, Li et al., arXiv
2410.03129). c is 1, or with `column_scale` a number for each column: the form of OneBit (Xu et al., arXiv 2402.11295)
and of ARB-RC. Their authors fit signs and scales to the weight; here all are chosen for the layer's output.

With H_l = H + lambda R and fixed c, rows of W / c are solved in the metric diag(c) H_l diag(c). With fixed codes and
scales, Z = (codes - zero_point) * scale, the best c is that of (Z'Z o H_l) c = diag(Z' W H_l). They take turns.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jointq_cli.errors import NumericsError
from jointq_cli.formats.base import StoredWeight
from jointq_cli.formats.column_scaled import ColumnScaledWeight
from jointq_cli.formats.uniform import UniformWeight, check_group_size, grid_label
from jointq_cli.quantization.quantizers.base import Prepared, Quantizer, Solution
from jointq_cli.quantization.quantizers.jointq.descent import SearchResult
from jointq_cli.quantization.quantizers.jointq.metric import Metric, for_sweeps
from jointq_cli.quantization.quantizers.jointq.quantizer import JointQ, JointQPrepared
from jointq_cli.quantization.quantizers.jointq.scaled_layer import UniformLayer
from jointq_cli.quantization.quantizers.jointq.search import State
from jointq_cli.quantization.quantizers.statistics import HeldOut
from jointq_cli.quantization.quantizers.uniform import FailedPreparation, hessian_product
from jointq_cli.setting_rules import check_settings, setting

_LEAST = 1 / 64  # of a column's scale, relative to their mean: W / c must not overflow


@dataclass(frozen=True)
class ColumnsPrepared(Prepared):
    """regularized: H_l (in, in) float64; metric: of c = 1."""

    regularized: Tensor
    metric: Metric


@dataclass(frozen=True)
class Turn:
    """What is found for one c (in,) float64. unit: of the costs of `found`."""

    layer: UniformLayer
    metric: Metric
    column_scale: Tensor
    found: SearchResult[State]
    unit: float

    @property
    def cost(self) -> float:
        """tr(E H_l E')."""
        return float(self.found.cost.sum()) * self.unit

    def signal(self) -> float:
        """tr(W H_l W')."""
        return self.layer.signal(self.metric) * self.unit

    def grid_values(self) -> Tensor:
        """Z, (out, in) float32."""
        return self.layer.values(self.metric, self.found.state)


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
        once = self._jointq.cost(out_features, in_features, tokens)
        if not self.column_scale:
            return once
        systems = 4 * (hessian_product(out_features, in_features) + in_features**3)  # float64: c, and the metric
        return once + self.rounds * (once + systems)

    def prepare(self, hessian: Tensor, heldout: HeldOut | None = None) -> Prepared:
        prepared, ridge = self._jointq.prepare(hessian), self.ridge(hessian)
        if not self.column_scale or ridge is None or not isinstance(prepared, JointQPrepared):
            return prepared
        return ColumnsPrepared(hessian + torch.diag(ridge), prepared.metric)

    def ridge(self, hessian: Tensor) -> Tensor | None:
        return self._jointq.ridge(hessian)

    def join(self, parts: Sequence[Solution]) -> Solution:
        return self._jointq.join(parts)

    def quantize(self, weight: Tensor, prepared: Prepared, scale_dtype: torch.dtype) -> Solution:
        if not isinstance(prepared, ColumnsPrepared):
            return self._by_jointq(weight, prepared, scale_dtype)
        if not bool(torch.isfinite(weight).all()):
            raise NumericsError("the weight holds NaN or Inf")
        try:
            turns = list(self._turns(weight, prepared, scale_dtype))
        except NumericsError as error:
            if self.on_failure == "error":
                raise
            return self._by_jointq(weight, FailedPreparation(str(error)), scale_dtype)
        last = turns[-1]
        inner = last.layer.quantized(last.metric, last.found.state, permuted=False)
        signal = last.signal()
        notes: dict[str, float | int | str | bool] = {
            "lambda": self.regularization_lambda,
            "start_error": turns[0].cost / signal if signal else 0.0,
            "final_error": last.cost / signal if signal else 0.0,
            "rounds": len(turns) - 1,
        }
        return Solution(self._stored(inner, last.column_scale.to(scale_dtype)), None, "ok", notes, signal)

    def _by_jointq(self, weight: Tensor, prepared: Prepared, scale_dtype: torch.dtype) -> Solution:
        """With c = 1."""
        found = self._jointq.quantize(weight, prepared, scale_dtype)
        columns = torch.ones(weight.shape[1], dtype=scale_dtype, device=weight.device)
        return replace(found, quantized=self._stored(found.quantized, columns))

    def _turns(self, weight: Tensor, prepared: ColumnsPrepared, scale_dtype: torch.dtype) -> Iterator[Turn]:
        """From c = 1, each of less cost than the one before."""
        ones = torch.ones(weight.shape[1], dtype=torch.float64, device=weight.device)
        turn = self._turn(weight, prepared, ones, scale_dtype, None)
        yield turn
        correlation = weight.double() @ prepared.regularized
        for _ in range(self.rounds):
            columns = _best_columns(turn.grid_values(), correlation, prepared.regularized)
            if columns is None:
                return
            columns = columns.to(scale_dtype).double()
            following = self._turn(weight, prepared, columns, scale_dtype, turn)
            if not following.cost < turn.cost:  # c as it is stored is no better
                return
            turn = following
            yield turn

    def _turn(
        self, weight: Tensor, prepared: ColumnsPrepared, columns: Tensor, scale_dtype: torch.dtype, before: Turn | None
    ) -> Turn:
        """Rows solved for c = `columns`, from the codes and scales of another c or from JointQ's start."""
        jointq, scaled = self._jointq, prepared.regularized * columns * columns[:, None]
        exponent = math.frexp(float(weight.abs().max()))[1]
        divided = (weight.double() / columns).float()
        layer = UniformLayer(divided, exponent, self.batch_size, jointq.integer_grid, scale_dtype)
        if before is None:
            metric = prepared.metric
            found = jointq.from_starts(layer, metric)
        else:
            metric = for_sweeps(scaled, before.metric)
            found = replace(jointq, max_sweeps=self._sweeps).continued(layer, metric, before.found.state)
        unit = math.ldexp(float(scaled.diagonal().mean()), 2 * exponent)
        return Turn(layer, metric, columns, found, unit)

    def describe(self) -> str:
        label = grid_label(self._jointq.integer_grid, self.group_size) + " column-scaled" * self.column_scale
        return f"Binary {label} lambda={self.regularization_lambda:g}"


def _best_columns(values: Tensor, correlation: Tensor, regularized: Tensor) -> Tensor | None:
    """The c (in,) of least tr(E H_l E') for given Z (out, in) float32; correlation: W H_l, float64 as it is. None where
    several are: a column of Z is zero, or all of the weight."""
    factor, failed = torch.linalg.cholesky_ex((values.T @ values).double() * regularized)
    if int(failed):
        return None
    found = torch.cholesky_solve((values * correlation).sum(dim=0)[:, None], factor)[:, 0]
    if not bool(found.any()):
        return None
    least = _LEAST * float(found.abs().mean())
    return torch.where(found.abs() < least, least, found)
