"""What every layer quantizer is: a frozen dataclass whose fields are its config, with `prepare` and
`quantize`.

Knows the contract with the engine and the checks that all share. Knows nothing of models, files, devices or
progress. All quantizers judge a layer by e H e^T per output row, with H = X^T X / tokens (in, in) float64 and
e = w - w_quantised.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from jointq_cli.errors import NumericsError
from jointq_cli.formats.uniform import Grid, QuantizedWeight, check_bits, check_group_size, group_columns
from jointq_cli.quantization.quantizers.statistics import HeldOut

ROWS = 16  # products of multiples of so many rows give each row the same bits, whichever the others are


@dataclass(frozen=True)
class Prepared:
    """What all layers with the same input share. A quantizer that needs more extends it.

    failed: the input cannot be used, and `on_failure: rtn` was asked for.
    """

    failed: ClassVar[bool] = False


@dataclass(frozen=True)
class FailedPreparation(Prepared):
    """The Hessian could not be used, and `on_failure: rtn` was asked for."""

    failed: ClassVar[bool] = True

    reason: str


@dataclass(frozen=True)
class Solution:
    """A quantised layer and how it went.

    damping: fraction of the Hessian's mean diagonal that was added, None where none is used. verdict: "ok",
    "damped" (the ladder was climbed), "fallback" (RTN, because the solve failed and `on_failure: rtn` asked
    for it).
    """

    quantized: QuantizedWeight
    damping: float | None
    verdict: str
    notes: dict[str, float | int | str | bool] = field(default_factory=dict)
    signal: float = 0.0  # what errors among the notes are shares of


@dataclass(frozen=True)
class Quantizer(ABC):
    """Base of the layer quantizers. group_size null or -1: one scale per row."""

    bits: int
    group_size: int | None
    symmetric: bool

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_group_size(self.group_size, {})

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.symmetric)

    @property
    def heldout(self) -> float:
        """The share of the calibration tokens that `prepare` wants to see apart as well; 0: none."""
        return 0.0

    @property
    def row_separable(self) -> bool:
        """Whether the rows of a layer may be solved apart, in multiples of ROWS, with the same result."""
        return True

    def join(self, parts: Sequence[Solution]) -> Solution:
        """The solution of a layer whose rows were solved in parts, one behind the other, with one verdict."""
        return replace(parts[0], quantized=QuantizedWeight.joined([part.quantized for part in parts]))

    def ridge(self, hessian: Tensor) -> Tensor | None:
        """The diagonal (in,) float64 by which `quantize` pulls to the weight it is given: it minimises e (H + diag) e^T
        with this Hessian. None where it does not, or where the strength is yet to be chosen."""
        return None

    @abstractmethod
    def prepare(self, hessian: Tensor, heldout: HeldOut | None = None) -> Prepared:
        """What depends on the layer's input alone. `hessian` (in, in) float64 is read, never written to.

        `heldout` describes a part of the tokens in `hessian`, for a quantizer that asks for a share of them.

        Raises NumericsError where the Hessian cannot be used.
        """

    @abstractmethod
    def quantize(self, weight: Tensor, prepared: Prepared, scale_dtype: torch.dtype) -> Solution:
        """Quantise `weight` (out, in) float32 with scales stored as `scale_dtype`. Deterministic.

        Raises NumericsError where the weight is not finite or a scale does not fit, ConfigError where
        group_size does not divide in_features (`grid.check_group_size` tells that earlier and for all
        layers).
        """

    def describe(self) -> str:
        """One line for people: "RTN W4 g128 asymmetric mse"."""
        return " ".join([type(self).__name__, f"W{self.bits}", self._describe_groups(), *self._describe_options()])

    def _describe_groups(self) -> str:
        groups = "per-channel" if self.group_size in (None, -1) else f"g{self.group_size}"
        return f"{groups} {'symmetric' if self.symmetric else 'asymmetric'}"

    def _describe_options(self) -> list[str]:
        return []

    def _columns(self, weight: Tensor) -> int:
        """Columns per group for this weight, after the checks that need its values or shape."""
        if not math.isfinite(float(weight.sum())) and not bool(torch.isfinite(weight).all()):
            raise NumericsError("the weight holds NaN or Inf")
        check_group_size(self.group_size, {"this layer": weight.shape[1]})
        return group_columns(self.group_size, weight.shape[1])
