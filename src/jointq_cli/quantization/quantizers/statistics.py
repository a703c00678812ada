"""Second moments of a layer's inputs, and errors measured with them. The conventions for all quantizers:

For inputs X (tokens, in) of a linear layer the Hessian is H = X^T X / tokens (in, in): the mean squared change of a
row's output under a weight change e is e H e^T. If the layer's inputs are X, and X_o in the original model, the cross
term is C = (X_o - X)^T X / tokens (in, in). If the layer's output is added to a residual stream S (tokens, out), S_o in
the original model, the drift is D = (S_o - S)^T X / tokens (out, in). With token weights, each token counts with its
weight in sums and in `tokens`. Layers that share an input share its moments.
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

# Products in float32, sums over batches in float64: a bf16 product would round H to 8 bits and lose its small
# eigenvalues, in whose directions quantizers put their errors.


@dataclass(frozen=True)
class HeldOut:
    """The moments of the held-out calibration tokens, and their share of all of them (of their weight)."""

    hessian: Tensor
    share: float
    cross: Tensor | None = None
    drift: Tensor | None = None

    def complement(self, everything: Tensor) -> Tensor:
        """The Hessian (in, in) of the other tokens, from that of all tokens; new memory."""
        rest = self.without(everything, self.hessian)
        # Columns that are zero for all other tokens contain rounding errors of either sign.
        unreached = rest.diagonal() <= 1e-12 * everything.diagonal()
        rest[unreached] = 0.0
        rest[:, unreached] = 0.0
        return rest

    def without(self, everything: Tensor, held: Tensor) -> Tensor:
        """The cross term or drift of the other tokens, from that of all tokens and the held-out ones; new memory."""
        return (everything - self.share * held).div_(1.0 - self.share)


@dataclass(frozen=True)
class ExpertTokens:
    """Of the layers of experts. counts: how many calibration tokens are routed to each layer's expert, by its name.
    block_share: of tokens that enter the block's experts, routed to this one or not, in the weight of all tokens."""

    counts: Mapping[str, int]
    block_share: float


@dataclass(frozen=True)
class Statistics:
    """The moments of one input: (in, in) float64 each."""

    hessian: Tensor
    cross: Tensor | None = None
    drift: Tensor | None = None  # (out, in)
    heldout: HeldOut | None = None
    tokens: ExpertTokens | None = None


@dataclass(frozen=True)
class Energies:
    """Numerators and denominators of the relative errors of some rows of a layer, to be summed over all rows."""

    output_error: float  # tr(E H E^T), E = W - W_quantised
    output: float  # tr(W H W^T)
    weight_error: float  # |E|^2
    weight: float  # |W|^2

    @classmethod
    def of(cls, weight: Tensor, quantized: Tensor, hessian: Tensor) -> "Energies":
        """weight, quantized (rows, in) float32; hessian (in, in)."""
        error = weight - quantized
        squares = (rows.double().square().sum().item() for rows in (weight.double() - quantized.double(), weight))
        return cls(_energy(error, hessian), _energy(weight, hessian), *squares)

    def __add__(self, other: "Energies") -> "Energies":
        return Energies(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    def relative(self) -> tuple[float, float]:
        """The relative errors of output and weight; 0 where the denominator is 0."""
        return _ratio(self.output_error, self.output), _ratio(self.weight_error, self.weight)


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """Relative output error tr(E H E^T) / tr(W H W^T), E = W - W_quantised; weights (out, in) float32."""
    return _ratio(_energy(weight - quantized, hessian), _energy(weight, hessian))


def weight_error(weight: Tensor, quantized: Tensor) -> float:
    """Relative weight error |E|^2 / |W|^2 (Frobenius)."""
    error = (weight.double() - quantized.double()).square().sum().item()
    return _ratio(error, weight.double().square().sum().item())


def _ratio(error: float, signal: float) -> float:
    return 0.0 if signal == 0 else error / signal


def _energy(rows: Tensor, hessian: Tensor) -> float:
    """tr(R H R^T) with float32 products: precise enough for reports; nothing is solved with it."""
    product = rows @ hessian.to(rows.dtype)
    return torch.sum(product * rows, dtype=torch.float64).item()
