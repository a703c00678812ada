"""Round to nearest, without calibration."""

from dataclasses import dataclass

import torch
from torch import Tensor

from jointq_cli.formats.uniform import UniformWeight, group_columns
from jointq_cli.quantization.quantizers.base import Prepared, Solution
from jointq_cli.quantization.quantizers.scale_fit import fit
from jointq_cli.quantization.quantizers.statistics import HeldOut
from jointq_cli.quantization.quantizers.uniform import UniformQuantizer, hessian_product
from jointq_cli.setting_rules import setting


@dataclass(frozen=True)
class RTN(UniformQuantizer):
    """Min/max range per group with zero inside it; `mse` shrinks the range where that lowers sum |error|^2.4."""

    mse: bool = setting(True)

    def cost(self, out_features: int, in_features: int, tokens: int) -> float:
        return 0.5 * hessian_product(out_features, in_features)

    @property
    def _rtn(self) -> "RTN":
        return self

    def _prepare(self, hessian: Tensor, heldout: HeldOut | None) -> Prepared:
        return Prepared()

    def _solve(self, weight: Tensor, prepared: Prepared, scale_dtype: torch.dtype) -> Solution:
        columns = group_columns(self.group_size, weight.shape[1])
        groups = weight.reshape(len(weight), -1, columns)  # (out, groups, columns)
        scale, zero_point = fit(groups, self.grid, self.mse, scale_dtype)
        codes = self.grid.nearest_codes(groups, scale[..., None], zero_point[..., None].to(torch.float32))
        quantized = UniformWeight(
            codes=codes.flatten(1),
            scale=scale.to(scale_dtype),
            zero_point=zero_point,
            permutation=None,
            bits=self.bits,
            symmetric=self.symmetric,
        )
        return Solution(quantized, damping=None, verdict="ok")

    def _describe_options(self) -> list[str]:
        return ["mse"] if self.mse else []
