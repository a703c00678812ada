"""Round to nearest, without calibration."""

from dataclasses import dataclass

import torch
from torch import Tensor

from jointq_cli.errors import NumericsError
from jointq_cli.formats.k_quant import KGrid, KQuantWeight
from jointq_cli.formats.k_rounding import round_to_k
from jointq_cli.formats.uniform import UniformWeight, group_columns
from jointq_cli.quantization.quantizers.base import Prepared, Solution
from jointq_cli.quantization.quantizers.scale_fit import fit
from jointq_cli.quantization.quantizers.statistics import HeldOut
from jointq_cli.quantization.quantizers.uniform import UniformQuantizer, hessian_product
from jointq_cli.setting_rules import setting


def _has_uniform_grid(rtn: "RTN") -> bool:
    return rtn.grid is None


def _has_k_grid(rtn: "RTN") -> bool:
    return rtn.grid is not None


@dataclass(frozen=True)
class RtnPrepared(Prepared):
    """diagonal (in,) float64: that of the Hessian."""

    diagonal: Tensor


@dataclass(frozen=True)
class RTN(UniformQuantizer):
    """Min/max range per group with zero inside it; `mse` shrinks the range where that lowers sum |error|^2.4.

    On a K grid, the scales with the least squared error, weighted with `importance` by the Hessian's diagonal.
    """

    mse: bool = setting(True, used=_has_uniform_grid)
    importance: bool = setting(False, used=_has_k_grid)

    def cost(self, out_features: int, in_features: int, tokens: int) -> float:
        return 0.5 * hessian_product(out_features, in_features)

    @property
    def _rtn(self) -> "RTN":
        return self

    def _prepare(self, hessian: Tensor, heldout: HeldOut | None) -> Prepared:
        return RtnPrepared(hessian.diagonal()) if self.grid and self.importance else Prepared()

    def _solve(self, weight: Tensor, prepared: Prepared, scale_dtype: torch.dtype) -> Solution:
        if self.k_grid:
            weights = prepared.diagonal if isinstance(prepared, RtnPrepared) else None
            return Solution(on_k_grid(weight, self.k_grid, weights), damping=None, verdict="ok")
        columns = group_columns(self.group_size, weight.shape[1])
        groups = weight.reshape(len(weight), -1, columns)  # (out, groups, columns)
        scale, zero_point = fit(groups, self.integer_grid, self.mse, scale_dtype)
        codes = self.integer_grid.nearest_codes(groups, scale[..., None], zero_point[..., None])
        quantized = UniformWeight(
            codes=codes.flatten(1),
            scale=scale.to(scale_dtype),
            zero_point=self.integer_grid.stored_zero_point(zero_point, scale_dtype),
            permutation=None,
            bits=self.bits,
            symmetric=self.symmetric,
        )
        return Solution(quantized, damping=None, verdict="ok")

    def _describe_options(self) -> list[str]:
        if self.grid:
            return ["importance"] if self.importance else []
        return ["mse"] if self.mse else []


def on_k_grid(weight: Tensor, grid: KGrid, weights: Tensor | None) -> KQuantWeight:
    """Rounded to nearest. Raises NumericsError where a scale does not fit."""
    quantized = round_to_k(weight, grid, weights)
    check_k_scales(quantized)
    return quantized


def check_k_scales(quantized: KQuantWeight) -> None:
    """Raises NumericsError where d or dmin is beyond float16, in which llama.cpp stores them."""
    for part in (quantized.d, quantized.dmin):
        if not bool(torch.isfinite(part).all()):
            raise NumericsError("a scale of a super-block does not fit in float16")
