"""DBF: a layer as a product of two sign matrices with scales, in the metric of its input; any number of bits.

    W ~ diag(a) S1 diag(d) S2 diag(b)    S1 (out, rank), S2 (rank, in) of 1 and -1

The form is that of double binary factorisation (Boza, Macko, arXiv 2505.11076), who minimise the error in diag(H).
Here `start` does that too, and `descent` improves all in H_l = H + lambda R. `bits` counts
everything: signs and scales.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jointq_cli.errors import ConfigError, NumericsError
from jointq_cli.formats.base import StoredWeight
from jointq_cli.formats.binary_product import BinaryProduct, largest_rank, packed_signs
from jointq_cli.quantization.quantizers.base import Prepared, Quantizer, Solution
from jointq_cli.quantization.quantizers.dbf.descent import Layer, descent, fit_out_scale, fit_rank_scale
from jointq_cli.quantization.quantizers.dbf.factors import Factors, product
from jointq_cli.quantization.quantizers.dbf.start import start
from jointq_cli.quantization.quantizers.jointq.metric import penalty
from jointq_cli.quantization.quantizers.scale_fit import round_scale, scale_rounding
from jointq_cli.quantization.quantizers.statistics import HeldOut
from jointq_cli.quantization.quantizers.uniform import NoInput, hessian_product
from jointq_cli.setting_rules import check_settings, setting


@dataclass(frozen=True)
class DbfPrepared(Prepared):
    """metric (in, in) float32: H_l over its mean diagonal, which is `unit`."""

    metric: Tensor
    unit: float


@dataclass(frozen=True)
class DBF(Quantizer):
    """See the module, and configs/quantizer/dbf.yaml for what each field does."""

    bits: float = setting(1.5, above=0, most=8)
    start_rounds: int = setting(40, least=1)
    rounds: int = setting(8, least=0)
    seed: int = setting(0, least=0, most=2**63 - 1)
    regularization_lambda: float = setting(0.3, least=0)
    regularization_gamma: float = setting(1.0, least=0)
    regularization_floor: float = setting(0.1, least=0)

    def __post_init__(self) -> None:
        check_settings(self, "quantizer")

    @property
    def row_separable(self) -> bool:
        return False  # all rows have S2 in common

    @property
    def seeds(self) -> Mapping[str, int]:
        return {"quantizer.seed": self.seed}

    @property
    def prepare_key(self) -> str:
        return repr(replace(self, bits=1.0, start_rounds=1, rounds=0, seed=0))

    def _rank(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        rank = largest_rank(self.bits, out_features, in_features, dtype)
        if rank < 1:
            least = BinaryProduct.empty(1, out_features, in_features, dtype, torch.device("meta")).bits_per_weight
            raise ConfigError(
                f"quantizer.bits={self.bits:g}: must be at least {math.ceil(100 * least) / 100:g} for a layer of "
                f"{out_features} x {in_features}, whose scales count too"
            )
        return rank

    def storage(self, out_features: int, in_features: int, dtype: torch.dtype) -> StoredWeight:
        rank = self._rank(out_features, in_features, dtype)
        return BinaryProduct.empty(rank, out_features, in_features, dtype, torch.device("meta"))

    def cost(self, out_features: int, in_features: int, tokens: int) -> float:
        p, m = out_features, in_features
        k = max(1, largest_rank(self.bits, p, m, torch.bfloat16))
        turn = 4 * k * p * m + 4 * k**2 * (p + m) + 8 * k**3  # inverses in float64
        steps = 11 * k * m**2 + 8 * k * p * m + 8 * k**2 * (p + m) + 2 * k**3 + m**3
        return float(self.start_rounds * turn + self.rounds * steps) + hessian_product(p, m)

    def prepare(self, hessian: Tensor, heldout: HeldOut | None = None) -> Prepared:
        if not bool(torch.isfinite(hessian).all()):
            raise NumericsError("the Hessian holds NaN or Inf")
        if not bool(hessian.diagonal().any()):
            return NoInput()
        extra = self.ridge(hessian)
        unit = float((hessian.diagonal() + extra).mean())
        metric = (hessian / unit).float()
        metric.diagonal().copy_((hessian.diagonal() + extra) / unit)
        return DbfPrepared(metric, unit)

    def ridge(self, hessian: Tensor) -> Tensor:
        gamma, floor = self.regularization_gamma, self.regularization_floor
        return penalty(hessian, self.regularization_lambda, "diagonal", gamma, floor, "mean_diagonal")

    def quantize(self, weight: Tensor, prepared: Prepared, scale_dtype: torch.dtype) -> Solution:
        if not bool(torch.isfinite(weight).all()):
            raise NumericsError("the weight holds NaN or Inf")
        rank = self._rank(weight.shape[0], weight.shape[1], scale_dtype)
        verdict = "no input" if isinstance(prepared, NoInput) else "ok"
        if not isinstance(prepared, DbfPrepared):
            prepared = DbfPrepared(torch.eye(weight.shape[1], device=weight.device), 1.0)
        if not bool(weight.any()):
            return Solution(_empty(rank, weight, scale_dtype), None, verdict)
        exponent = math.frexp(float(weight.abs().max()))[1]
        scaled, metric = torch.ldexp(weight, torch.tensor(-exponent)), prepared.metric
        layer = Layer(scaled, metric, product(scaled, metric), scale_rounding(scale_dtype, exponent))
        first = start(scaled, metric, rank, self.start_rounds, self.seed)
        last, steps = first, 0
        for last in descent(layer, first, self.rounds):  # noqa: B007 - one at a time in memory
            steps += 1
        stored = _rounded(layer, last, scale_dtype)
        signal, unit = layer.signal, math.ldexp(prepared.unit, 2 * exponent)
        out_scale = round_scale(torch.ldexp(stored.out_scale, torch.tensor(exponent)), scale_dtype)
        stored = replace(stored, out_scale=torch.ldexp(out_scale, torch.tensor(-exponent)))
        return Solution(
            quantized=BinaryProduct(
                left=packed_signs(stored.left.T),
                right=packed_signs(stored.right),
                out_scale=out_scale.to(scale_dtype),
                rank_scale=stored.rank_scale.to(scale_dtype),
                in_scale=stored.in_scale.to(scale_dtype),
            ),
            damping=None,
            verdict=verdict,
            notes={
                "lambda": self.regularization_lambda,
                "rank": rank,
                "start_error": layer.cost(first) / signal,
                "final_error": layer.cost(stored) / signal,
                "steps": steps,
            },
            signal=signal * unit,
        )

    def describe(self) -> str:
        return f"DBF {self.bits:g} bits lambda={self.regularization_lambda:g}"


def _rounded(layer: Layer, factors: Factors, dtype: torch.dtype) -> Factors:
    """With b and d as they are stored, around 1, and the best of what is left after each."""
    mean = factors.in_scale.mean()
    factors = replace(factors, in_scale=(factors.in_scale / mean).to(dtype).float())
    factors = fit_rank_scale(layer, factors)
    mean = factors.rank_scale.mean()
    return fit_out_scale(layer, replace(factors, rank_scale=(factors.rank_scale / mean).to(dtype).float()))


def _empty(rank: int, weight: Tensor, dtype: torch.dtype) -> BinaryProduct:
    """Of a weight that is all 0."""
    found = BinaryProduct.empty(rank, weight.shape[0], weight.shape[1], dtype, weight.device)
    for tensor in found.to_tensors().values():
        tensor.zero_()
    return found
