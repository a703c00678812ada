"""The contract between the loop and a quantizer: a frozen dataclass whose fields are its config.

Knows nothing of how a weight is stored, and nothing of models, files, devices or progress. All quantizers measure a
layer by e H e^T per output row, with H = X^T X / tokens (in, in) float64 and e = w - w_quantised.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from jointq_cli.formats.base import StoredWeight
from jointq_cli.quantization.quantizers.statistics import HeldOut

ROWS = 16  # products of multiples of so many rows give each row the same bits, whichever the others are


@dataclass(frozen=True)
class Prepared:
    """What all layers with the same input share. A quantizer that needs more extends it.

    failed: the input cannot be used, and the quantizer falls back to another method.
    """

    failed: ClassVar[bool] = False


@dataclass(frozen=True)
class Solution:
    """A quantised layer and how it was found.

    damping: fraction of the Hessian's mean diagonal that was added, None where none is used. verdict: "ok", "damped"
    (damping had to be raised), "fallback" (rounded to nearest, because the solve failed and `on_failure` is rtn),
    "no input" (rounded to nearest, because all calibration inputs are zero, or none reaches it).
    """

    quantized: StoredWeight
    damping: float | None
    verdict: str
    notes: dict[str, float | int | str | bool] = field(default_factory=dict)
    signal: float = 0.0  # tr(W H W^T), to which errors among the notes are relative


@dataclass(frozen=True)
class Quantizer(ABC):
    """Base of the layer quantizers."""

    @property
    def heldout(self) -> float:
        """The share of the calibration tokens that `prepare` needs as a held-out set; 0: none."""
        return 0.0

    @property
    def seeds(self) -> Mapping[str, int]:
        """The seeds of all random choices, by the key of the recipe."""
        return {}

    @property
    def row_separable(self) -> bool:
        """Whether the rows of a layer may be solved separately, in multiples of ROWS, with the same result."""
        return True

    @property
    @abstractmethod
    def prepare_key(self) -> str:
        """What of the config `prepare` and `ridge` depend on: quantizers with equal keys may share what they return."""

    def check(self, in_features: Mapping[str, int]) -> None:  # noqa: B027 - a config without groups fits every layer
        """in_features by layer name. Raises ConfigError, naming layers, where the config does not fit."""

    @abstractmethod
    def storage(self, out_features: int, in_features: int, dtype: torch.dtype) -> StoredWeight:
        """The form of a result from shapes alone: tensors on the meta device but for its `form_tensors`, so that
        `stored_bits` is what a layer will take. dtype: that of the checkpoint."""

    @abstractmethod
    def cost(self, out_features: int, in_features: int, tokens: int) -> float:
        """Floating-point operations in float32 that take about as long as `quantize`."""

    def for_corrected(self, in_features: int, tokens: int) -> "Quantizer":
        """With what depends on the number of a layer's inputs and of calibration tokens, where QEP corrects layers."""
        return self

    @abstractmethod
    def prepare(self, hessian: Tensor, heldout: HeldOut | None = None) -> Prepared:
        """What depends on the layer's input alone. `hessian` (in, in) float64 is read, never written to.

        `heldout`: moments of a part of the tokens in `hessian`, for a quantizer that needs a held-out set.

        Raises NumericsError where the Hessian cannot be used.
        """

    @abstractmethod
    def quantize(self, weight: Tensor, prepared: Prepared, scale_dtype: torch.dtype) -> Solution:
        """Quantise `weight` (out, in) float32 with scales stored as `scale_dtype`. Deterministic.

        Raises NumericsError where the weight is not finite or a scale does not fit `scale_dtype`, ConfigError where
        the config does not fit in_features (`check` finds that earlier and for all layers).
        """

    def join(self, parts: Sequence[Solution]) -> Solution:
        """The solution of a layer whose rows were solved in parts, all with the same verdict."""
        weights = [part.quantized for part in parts]
        return replace(parts[0], quantized=type(weights[0]).joined(weights))

    def ridge(self, hessian: Tensor) -> Tensor | None:
        """The diagonal (in,) float64 of a penalty on changes of the weight: `quantize` minimises e (H + diag) e^T. None
        where there is no penalty, or where its strength is chosen later."""
        return None

    @abstractmethod
    def describe(self) -> str:
        """One line for people, such as "RTN W4 g128 asymmetric mse"."""
