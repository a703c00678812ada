"""Quantization Error Propagation: a layer compensates the quantisation errors of the layers before it.

In the model quantised so far a layer receives x_q, in the original model x. QEP (Arai, Ichikawa, "Quantization Error
Propagation", NeurIPS 2025) quantises not the weight W but

    W* = W + alpha W C (H + R)^-1,     C = sum (x - x_q) x_q^T / tokens,     H = sum x_q x_q^T / tokens,

a step of length alpha towards the minimiser of |W X - W* X_q|^2, which alpha = 1 and R = 0 is. With R the identity
times `percdamp` of H's mean diagonal this is the method of the paper. With R = lambda R_JointQ and alpha = 1 the
objective of JointQ, e (H + R) e^T with e = W* - W_q, is, up to a constant,

    |W X - W_q X_q|^2 / tokens + |(W - W_q) R^1/2|^2:

codes and scales are chosen for the original layer's output, and the regulariser pulls to W.

With `perccorr_mode` shrinkage each row of the step is shortened by the part that comes from the sampling of tokens.

`residual` extends this to layers whose output is added to the residual stream, where the quantised layers before have
already caused an error S - S_q. The layer compensates that too: W* has the further term beta D (H + R)^-1, where
D = sum (s - s_q) x_q^T / tokens is the drift. With alpha = beta = 1 that is the minimiser of
|(S + W X) - (S_q + W* X_q)|^2, the error of the residual stream that the next layers read.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from jointq_cli.errors import ConfigError
from jointq_cli.quantization.quantizers.cholesky import Factor, factorize
from jointq_cli.quantization.quantizers.statistics import Statistics
from jointq_cli.setting_rules import check_settings, setting


@dataclass(frozen=True)
class Corrected:
    """The weight (out, in) float32 to quantise instead of a layer's own, and notes for its record."""

    weight: Tensor
    notes: dict[str, float] = field(default_factory=dict)


class Correction(ABC):
    """What QEP does to the layers that share an input."""

    @property
    def row_separable(self) -> bool:
        """Whether the rows of a layer may be corrected separately."""
        return True

    def of_rows(self, rows: slice) -> "Correction":
        """The correction of these rows."""
        return self

    @abstractmethod
    def apply(self, weight: Tensor) -> Corrected:
        """weight: (out, in) float32."""


class NoCorrection(Correction):
    """The weight stays as it is."""

    def apply(self, weight: Tensor) -> Corrected:
        return Corrected(weight)


@dataclass(frozen=True)
class QepCorrection(Correction):
    """W* = W + (alpha W C + beta D) (H + R)^-1, where a selector may choose alpha for each layer."""

    factor: Factor  # of H + R
    cross: Tensor  # C (in, in) float64
    drift: Tensor | None  # D (out, in) float64
    alpha: float
    beta: float
    selector: "AlphaSelector | None"
    shrinkage: "Shrinkage | None" = None

    @property
    def row_separable(self) -> bool:
        return self.selector is None and self.shrinkage is None  # their notes are of all rows, as is alpha

    def of_rows(self, rows: slice) -> Correction:
        return self if self.drift is None else replace(self, drift=self.drift[rows])

    def apply(self, weight: Tensor) -> Corrected:
        exact = weight.double()
        alpha = self.alpha if self.selector is None else self.selector.alpha(exact)
        step = alpha * (exact @ self.cross)
        notes: dict[str, float] = {"alpha": alpha}
        if self.drift is not None:
            step += self.beta * self.drift
            notes["beta"] = self.beta
        if self.factor.damping_retries:
            notes["qep_damping"] = self.factor.damping
        change = self.factor.times_inverse(step)
        if self.shrinkage is not None:
            gained = torch.sum(change * step, dim=1)
            kept = self.shrinkage.kept(exact, change, gained)
            change *= kept[:, None]
            notes["kept"] = (kept @ gained / gained.sum()).item() if gained.any() else 1.0
        return Corrected((exact + change).float(), notes)


@dataclass(frozen=True)
class AlphaSelector:
    """Chooses alpha on held-out tokens, for steps that are computed from the other tokens."""

    factor: Factor  # of H + R over the other tokens, as `cross` and `drift`
    cross: Tensor
    drift: Tensor | None
    held_hessian: Tensor
    held_cross: Tensor
    held_drift: Tensor | None

    def alpha(self, weight: Tensor) -> float:
        """The alpha in [0, 1] that minimises |beta (S - S_q) + W X - W* X_q|^2 on held-out tokens; weight: (out, in).

        A parabola in alpha: with the layer's own step A = W C (H + R)^-1 and B = beta D (H + R)^-1 the error is
        |(W (X - X_q) + beta (S - S_q) - B X_q) - alpha A X_q|^2.
        """
        step = self.factor.times_inverse(weight @ self.cross)
        wanted = weight @ self.held_cross
        if self.drift is not None and self.held_drift is not None:
            wanted += self.held_drift - self.factor.times_inverse(self.drift) @ self.held_hessian
        curvature = torch.sum((step @ self.held_hessian) * step).item()
        slope = torch.sum(wanted * step).item()
        return min(1.0, max(0.0, slope / curvature)) if curvature > 0 else 0.0


@dataclass(frozen=True)
class Shrinkage:
    """Shortens each row of a step by the part of its cross terms that comes from the sampling of tokens.

    In the metric of (H + R)^-1, in which a row's gradient g = alpha w C + beta d has the length of what its step gains,
    the expected square of the estimated g is that of the true one plus its noise. The step that gains most on other
    tokens is so 1 - noise / g (H + R)^-1 g^T of the estimated one, and none where the noise is larger: the shrinkage of
    James and Stein. The noise is that of the residual's products, g - step H, and is estimated by how much those of the
    held-out tokens differ from those of all tokens.
    """

    factor: Factor  # of H + R
    hessian: Tensor  # held-out minus all tokens, as `cross` and `drift`
    cross: Tensor  # times alpha
    drift: Tensor | None  # times beta
    share: float  # of the held-out tokens

    def kept(self, weight: Tensor, step: Tensor, gained: Tensor) -> Tensor:
        """The factor (out,) in [0, 1] of each row of `step`; weight, step: (out, in); gained: g (H + R)^-1 g^T (out,).

        For independent tokens the difference of a share h from all has (1 - h) / h times the variance of all.
        """
        difference = weight @ self.cross - step @ self.hessian
        if self.drift is not None:
            difference += self.drift
        noise = (difference @ self.factor.upper.T).square().sum(dim=1) * (self.share / (1.0 - self.share))
        return torch.where(gained > noise, 1.0 - noise / gained, 0.0)


@dataclass(frozen=True)
class QepSettings(ABC):
    """Base of the settings under `qep`."""

    @property
    def heldout(self) -> float:
        """The share of the calibration tokens whose statistics `correction` also needs separately; 0: none."""
        return 0.0

    @abstractmethod
    def describe(self) -> str:
        """A few words for the report, "" if no layer is corrected."""

    def check_inputs(self, inputs: str) -> None:
        """Raises ConfigError where `calibration.inputs` does not fit."""
        return None

    @property
    def needs_drift(self) -> bool:
        """Whether `correction` also needs the drift of the residual stream."""
        return False

    @abstractmethod
    def corrects(self, layer: str) -> bool:
        """Whether the layer of this full name is corrected, so that the cross term C of its input is needed."""

    @abstractmethod
    def correction(self, statistics: Statistics, ridge: Tensor | None) -> Correction:
        """The correction of all layers with this input; `statistics` must have the cross term.

        ridge: (in,) float64, the diagonal of the quantizer's regulariser (`Quantizer.ridge`), None if it has none.
        Raises NumericsError where H + R cannot be inverted.
        """


@dataclass(frozen=True)
class NoQep(QepSettings):
    """No layer is corrected."""

    def describe(self) -> str:
        return ""

    def corrects(self, layer: str) -> bool:
        return False

    def correction(self, statistics: Statistics, ridge: Tensor | None) -> Correction:
        return NoCorrection()


@dataclass(frozen=True)
class Qep(QepSettings):
    """The fields are described in configs/qep/full.yaml, the method at the top of this module."""

    perccorr: float = setting(1.0, least=0, most=1)
    residual: float = setting(0.5, least=0, most=1)
    perccorr_mode: str = setting("fixed", choices=("fixed", "heldout", "shrinkage"))
    heldout_share: float = setting(0.25, above=0, below=1)
    percdamp: float = setting(0.01, least=0)
    pull: str = setting("original", choices=("original", "corrected"))
    exclude_layer_keywords: list[str] = setting([])

    def __post_init__(self) -> None:
        check_settings(self, "qep")
        if "" in self.exclude_layer_keywords:
            raise ConfigError("qep.exclude_layer_keywords=['']: every name contains an empty keyword; use qep=none")

    @property
    def heldout(self) -> float:
        return self.heldout_share if self.perccorr_mode != "fixed" else 0.0

    def check_inputs(self, inputs: str) -> None:
        if inputs != "quantized":
            raise ConfigError(
                f"calibration.inputs={inputs}: must be quantized with qep, which compares the inputs of a layer with "
                "those in the original model; or qep=none"
            )

    @property
    def needs_drift(self) -> bool:
        return self.residual > 0

    def describe(self) -> str:
        alpha = "heldout" if self.perccorr_mode == "heldout" else f"{self.perccorr:g}"
        alpha += " shrunk" if self.perccorr_mode == "shrinkage" else ""
        without = [f"without {', '.join(self.exclude_layer_keywords)}"] if self.exclude_layer_keywords else []
        residual = [f"residual={self.residual:g}"] if self.residual else []
        return " ".join([f"QEP alpha={alpha}", *residual, *without])

    def corrects(self, layer: str) -> bool:
        return not any(keyword in layer for keyword in self.exclude_layer_keywords)

    def correction(self, statistics: Statistics, ridge: Tensor | None) -> Correction:
        assert statistics.cross is not None  # because of `corrects`
        factor = self._factor(statistics.hessian, ridge)
        selector, shrinkage = self._selector(statistics, ridge), self._shrinkage(statistics, factor)
        return QepCorrection(
            factor, statistics.cross, statistics.drift, self.perccorr, self.residual, selector, shrinkage
        )

    def _shrinkage(self, statistics: Statistics, factor: Factor) -> Shrinkage | None:
        if self.perccorr_mode != "shrinkage":
            return None
        held, cross, drift = statistics.heldout, statistics.cross, statistics.drift
        assert held is not None  # because of `heldout`
        assert held.cross is not None
        assert cross is not None
        return Shrinkage(
            factor=factor,
            hessian=held.hessian - statistics.hessian,
            cross=self.perccorr * (held.cross - cross),
            drift=None if drift is None or held.drift is None else self.residual * (held.drift - drift),
            share=held.share,
        )

    def _selector(self, statistics: Statistics, ridge: Tensor | None) -> AlphaSelector | None:
        if self.perccorr_mode != "heldout":
            return None
        held, cross, drift = statistics.heldout, statistics.cross, statistics.drift
        assert held is not None  # because of `heldout`
        assert held.cross is not None
        assert cross is not None
        drifts = None if drift is None or held.drift is None else (drift, held.drift)
        return AlphaSelector(
            factor=self._factor(held.complement(statistics.hessian), ridge),
            cross=held.without(cross, held.cross),
            drift=None if drifts is None else self.residual * held.without(*drifts),
            held_hessian=held.hessian,
            held_cross=held.cross,
            held_drift=None if drifts is None else self.residual * drifts[1],
        )

    def _factor(self, hessian: Tensor, ridge: Tensor | None) -> Factor:
        order = torch.arange(len(hessian), device=hessian.device)
        extra = ridge if self.pull == "original" else None
        damping = self.percdamp if extra is None else 0.0
        return factorize(hessian, order, damping, extra, torch.float64, key="qep.percdamp")
