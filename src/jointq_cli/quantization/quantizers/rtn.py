"""Round to nearest: every weight by itself, no calibration. Knows the grid, no Hessian."""

from dataclasses import dataclass

import torch
from torch import Tensor

from jointq_cli.formats.uniform import QuantizedWeight
from jointq_cli.quantization.quantizers.base import Prepared, Quantizer, Solution
from jointq_cli.quantization.quantizers.scale_fit import fit
from jointq_cli.quantization.quantizers.statistics import HeldOut


@dataclass(frozen=True)
class RTN(Quantizer):
    """Min/max range per group with zero inside it; `mse` shrinks the range where that lowers sum
    |error|^2.4."""

    mse: bool

    def prepare(self, hessian: Tensor, heldout: HeldOut | None = None) -> Prepared:
        return Prepared()

    def quantize(self, weight: Tensor, prepared: Prepared, scale_dtype: torch.dtype) -> Solution:
        groups = weight.reshape(len(weight), -1, self._columns(weight))  # (out, groups, columns)
        scale, zero_point = fit(groups, self.grid, self.mse, scale_dtype)
        codes = self.grid.nearest_codes(groups, scale[..., None], zero_point[..., None].to(torch.float32))
        quantized = QuantizedWeight(
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
