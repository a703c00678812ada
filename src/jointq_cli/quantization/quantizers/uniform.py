"""What quantizers on a uniform grid share: bits, groups, checks, and rounding to nearest where a solve fails."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from jointq_cli.errors import NumericsError
from jointq_cli.formats.uniform import Grid, UniformWeight, check_group_size, grid_label, group_columns
from jointq_cli.quantization.quantizers.base import Prepared, Quantizer, Solution
from jointq_cli.quantization.quantizers.statistics import HeldOut
from jointq_cli.setting_rules import check_settings, setting


@dataclass(frozen=True)
class FailedPreparation(Prepared):
    """The Hessian could not be used, and `on_failure` is rtn."""

    failed: ClassVar[bool] = True

    reason: str


@dataclass(frozen=True)
class NoInput(Prepared):
    """No token reaches the layer, or all its inputs are zero, as after pruned heads: there is nothing to solve for, and
    nothing to correct."""

    failed: ClassVar[bool] = True


@dataclass(frozen=True)
class UniformQuantizer(Quantizer):
    """Base of the quantizers whose result is a UniformWeight. group_size null or -1: one scale per row."""

    bits: int = setting(4, least=1, most=8)
    group_size: int | None = setting(128)
    symmetric: bool = setting(False)

    def __post_init__(self) -> None:
        check_settings(self, "quantizer")
        check_group_size(self.group_size, {})

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.symmetric)

    @property
    def prepare_key(self) -> str:
        return repr(replace(self, bits=1, symmetric=False))  # `_prepare` sees no codes

    def check(self, in_features: Mapping[str, int]) -> None:
        check_group_size(self.group_size, in_features)

    def storage(self, out_features: int, in_features: int, dtype: torch.dtype) -> UniformWeight:
        groups = in_features // group_columns(self.group_size, in_features)
        meta = torch.device("meta")
        return UniformWeight(
            codes=torch.empty(out_features, in_features, dtype=self.grid.code_dtype, device=meta),
            scale=torch.empty(out_features, groups, dtype=dtype, device=meta),
            zero_point=torch.empty(out_features, groups, dtype=torch.uint8, device=meta),
            permutation=torch.empty(in_features, dtype=torch.int32, device=meta) if self._permutes(groups) else None,
            bits=self.bits,
            symmetric=self.symmetric,
        )

    def prepare(self, hessian: Tensor, heldout: HeldOut | None = None) -> Prepared:
        if not bool(hessian.diagonal().any()):
            return NoInput()
        try:
            return self._prepare(hessian, heldout)
        except NumericsError as error:
            if self._fallback is None:
                raise
            return FailedPreparation(str(error))

    def quantize(self, weight: Tensor, prepared: Prepared, scale_dtype: torch.dtype) -> Solution:
        if not math.isfinite(float(weight.sum())) and not bool(torch.isfinite(weight).all()):
            raise NumericsError("the weight holds NaN or Inf")
        self.check({"this layer": weight.shape[1]})
        if isinstance(prepared, NoInput):
            return replace(self._rtn.quantize(weight, Prepared(), scale_dtype), verdict="no input")
        fallback = self._fallback
        try:
            if isinstance(prepared, FailedPreparation):
                raise NumericsError(prepared.reason)
            return self._solve(weight, prepared, scale_dtype)
        except NumericsError as error:
            if fallback is None:
                raise
            rounded = fallback.quantize(weight, Prepared(), scale_dtype)
            return replace(rounded, verdict="fallback", notes={"failure": str(error)})

    def describe(self) -> str:
        label = grid_label(self.bits, self.group_size, self.symmetric)
        return " ".join([type(self).__name__, label, *self._describe_options()])

    def _describe_options(self) -> list[str]:
        return []

    @property
    @abstractmethod
    def _rtn(self) -> "UniformQuantizer":
        """Rounding to nearest on the same grid."""

    @property
    def _fallback(self) -> "UniformQuantizer | None":
        """What quantises a layer that cannot be solved; None: that is an error."""
        return None

    def _permutes(self, groups: int) -> bool:
        """Whether columns are assigned to groups by a permutation that must be stored."""
        return False

    @abstractmethod
    def _prepare(self, hessian: Tensor, heldout: HeldOut | None) -> Prepared:
        """As `prepare`."""

    @abstractmethod
    def _solve(self, weight: Tensor, prepared: Prepared, scale_dtype: torch.dtype) -> Solution:
        """As `quantize`, of a finite weight whose in_features the groups divide."""


def hessian_product(out_features: int, in_features: int) -> float:
    """Floating-point operations of W H, (out, in) by (in, in): the unit of what solving a layer costs."""
    return 2.0 * out_features * in_features**2
