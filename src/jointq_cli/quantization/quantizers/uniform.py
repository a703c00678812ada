"""What quantizers on integer grids share: bits, groups, checks, and rounding to nearest where a solve fails.

A grid is uniform, with a scale of its own for every group, or one of llama.cpp's K grids, whose scales are quantised
too.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from jointq_cli.errors import ConfigError, NumericsError
from jointq_cli.formats.base import StoredWeight
from jointq_cli.formats.k_quant import K_GRIDS, SUPER_BLOCK, KGrid, KQuantWeight
from jointq_cli.formats.turned import TurnedWeight, random_signs, turned, turned_label
from jointq_cli.formats.uniform import (
    MOST_NAMED,
    ZERO_POINTS,
    Grid,
    UniformWeight,
    check_group_size,
    grid_label,
    group_columns,
)
from jointq_cli.quantization.quantizers.base import Prepared, Quantizer, Solution
from jointq_cli.quantization.quantizers.statistics import HeldOut
from jointq_cli.setting_rules import check_settings, setting

INCOHERENCE = ("auto", "none", "input")


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


def _may_be_turned(quantizer: "UniformQuantizer") -> bool:
    return quantizer.incoherence != "none"


def is_uniform(quantizer: "UniformQuantizer") -> bool:
    return quantizer.grid is None


@dataclass(frozen=True)
class UniformQuantizer(Quantizer):
    """Base of the quantizers whose result is a UniformWeight, or a KQuantWeight if `grid` names a K grid. group_size
    null or -1: one scale per row."""

    bits: int = setting(4, least=1, most=8, used=is_uniform)
    group_size: int | None = setting(128, used=is_uniform)
    symmetric: bool = setting(False, used=is_uniform)
    _: KW_ONLY
    # Of asymmetric grids: half-integer levels around zero need no zero-points, real ones 16 bits of each group.
    # auto: half with one bit, and with two in a turned basis; docs/low_bits.md has what each gives.
    zero_point: str | None = setting("auto", choices=("auto", *ZERO_POINTS), null="for integer", used=is_uniform)
    # input: codes and scales are those of the weight times random signs and a Hadamard matrix, as in QuIP. auto: a
    # recipe decides; a quantizer by itself does not turn.
    incoherence: str = setting("none", choices=INCOHERENCE, used=is_uniform)
    incoherence_seed: int = setting(0, least=0, most=2**63 - 1, used=_may_be_turned)
    # Of blocks the inputs are turned at run time for little: a product with N columns, where else it is with all.
    incoherence_block: int | None = setting(None, least=2, null="for all columns", used=_may_be_turned)
    grid: str | None = setting(None, choices=tuple(K_GRIDS), null="for bits, group_size and symmetric")

    def __post_init__(self) -> None:
        check_settings(self, "quantizer")
        check_group_size(self.group_size, {})
        if self.symmetric and self.zero_point in ("half", "real"):
            raise ConfigError(
                f"quantizer.zero_point={self.zero_point}: does not go with symmetric=true; symmetric=false"
            )
        if self.grid and self.is_turned:
            raise ConfigError(
                f"quantizer.grid={self.grid}: does not go with incoherence=input; quantizer.incoherence=none"
            )

    @property
    def integer_grid(self) -> Grid:
        if self.zero_point == "auto":
            is_half = self.bits == 1 or (self.bits == 2 and self.is_turned)
            zero = "half" if is_half and not self.symmetric else "integer"
        else:
            zero = self.zero_point or "integer"
        return Grid(self.bits, self.symmetric, zero)

    @property
    def is_turned(self) -> bool:
        return self.incoherence == "input"

    @property
    def turnable(self) -> bool:
        """Whether the other settings go with incoherence=input."""
        return self.grid is None

    @property
    def k_grid(self) -> KGrid | None:
        return None if self.grid is None else K_GRIDS[self.grid]

    @property
    def prepare_key(self) -> str:
        # `_prepare` sees no codes, and all super-blocks are alike.
        if self.k_grid:
            return repr(replace(self, bits=1, group_size=None, symmetric=False, zero_point=None, grid="q4_k"))
        return repr(replace(self, bits=1, symmetric=False, zero_point=None))

    @property
    def seeds(self) -> Mapping[str, int]:
        return {"quantizer.incoherence_seed": self.incoherence_seed} if self.is_turned else {}

    def check(self, in_features: Mapping[str, int]) -> None:
        if self.k_grid is None:
            check_group_size(self.group_size, in_features)
        if self.k_grid:
            _check_multiples(f"quantizer.grid={self.grid}", SUPER_BLOCK, in_features)
        if self.is_turned and self.incoherence_block:
            _check_multiples(
                f"quantizer.incoherence_block={self.incoherence_block}", self.incoherence_block, in_features
            )

    def storage(self, out_features: int, in_features: int, dtype: torch.dtype) -> StoredWeight:
        if self.k_grid:
            return KQuantWeight.empty(out_features, in_features, self.k_grid, torch.device("meta"))
        groups = in_features // group_columns(self.group_size, in_features)
        meta = torch.device("meta")
        found = UniformWeight(
            codes=torch.empty(out_features, in_features, dtype=self.integer_grid.code_dtype, device=meta),
            scale=torch.empty(out_features, groups, dtype=dtype, device=meta),
            zero_point=self.integer_grid.stored_zero_point(torch.empty(out_features, groups, device=meta), dtype),
            permutation=torch.empty(in_features, dtype=torch.int32, device=meta) if self._permutes(groups) else None,
            bits=self.bits,
            symmetric=self.symmetric,
        )
        if not self.is_turned:
            return found
        return TurnedWeight(found, self._signs(in_features, torch.device("cpu")))

    def prepare(self, hessian: Tensor, heldout: HeldOut | None = None) -> Prepared:
        if not bool(hessian.diagonal().any()):
            return NoInput()
        if self.is_turned:
            return self._plain.prepare(self._turned(hessian))
        try:
            return self._prepare(hessian, heldout)
        except NumericsError as error:
            if self._fallback is None:
                raise
            return FailedPreparation(str(error))

    def quantize(self, weight: Tensor, prepared: Prepared, scale_dtype: torch.dtype) -> Solution:
        if not math.isfinite(float(weight.sum())) and not bool(torch.isfinite(weight).all()):
            raise NumericsError("the weight holds NaN or Inf")
        if self.is_turned:
            self.check({"this layer": weight.shape[1]})
            signs = self._signs(weight.shape[1], weight.device)
            found = self._plain.quantize(turned(weight, signs).float(), prepared, scale_dtype)
            assert isinstance(found.quantized, UniformWeight)
            return replace(found, quantized=TurnedWeight(found.quantized, signs))
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

    @property
    def _plain(self) -> "UniformQuantizer":
        """What solves the turned layer, whose Hessian has the `ridge` already."""
        return replace(self, incoherence="none", zero_point=self.integer_grid.zero)

    def _turned(self, hessian: Tensor) -> Tensor:
        """Q^T (H + ridge) Q. The ridge is added before, since the diagonal of a turned matrix is flat."""
        ridge, signs = self.ridge(hessian), self._signs(len(hessian), hessian.device)
        whole = hessian if ridge is None else hessian + torch.diag(ridge)
        return turned(turned(whole, signs).T.contiguous(), signs)

    def _signs(self, in_features: int, device: torch.device) -> Tensor:
        return random_signs(self.incoherence_block or in_features, self.incoherence_seed, device)

    def describe(self) -> str:
        label = self.k_grid.label if self.k_grid else grid_label(self.integer_grid, self.group_size)
        label += turned_label(self.incoherence_block) * self.is_turned
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


def _check_multiples(key: str, columns: int, in_features: Mapping[str, int]) -> None:
    offending = [f"{name} ({size})" for name, size in in_features.items() if size % columns]
    if offending:
        more = f" and {len(offending) - MOST_NAMED} more" if len(offending) > MOST_NAMED else ""
        raise ConfigError(
            f"{key}: in_features must be a multiple of {columns}, and is not for "
            f"{', '.join(offending[:MOST_NAMED])}{more}"
        )


def hessian_product(out_features: int, in_features: int) -> float:
    """Floating-point operations of W H, (out, in) by (in, in): the unit of what solving a layer costs."""
    return 2.0 * out_features * in_features**2


def with_incoherence(quantizer: Quantizer, turn: bool) -> Quantizer:
    """With incoherence=auto decided: input if layers are to be turned and the other settings allow it, else none.

    Raises ConfigError where none leaves an incoherence_block without effect.
    """
    if not isinstance(quantizer, UniformQuantizer) or quantizer.incoherence != "auto":
        return quantizer
    turns = turn and quantizer.turnable
    if quantizer.incoherence_block and not turns:
        raise ConfigError(
            f"quantizer.incoherence_block={quantizer.incoherence_block}: incoherence=auto turns nothing beside the "
            "other settings; quantizer.incoherence=input"
        )
    return replace(quantizer, incoherence="input" if turns else "none")
