"""What a layer's inputs look like: the moments that decide its output error, streamed. States the conventions once.

For inputs X (tokens, in) of a linear layer the Hessian is H = X^T X / tokens (in, in): the mean squared change of a
row's output under a weight change e is e H e^T. Where the layer is given X while the original model gave it X_o, the
cross term is C = (X_o - X)^T X / tokens (in, in). Where the layer's output is added to a residual stream that has lost
R = S_o - S (tokens, out) by then, the drift is D = R^T X / tokens (out, in). Tokens may have weights: then each counts
as often as it weighs, in sums and in `tokens`. Layers that share an input share its moments.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor

from jointq_cli.errors import NumericsError

# Products in float32, sums over batches in float64: a bf16 product would round H to 8 bits and lose its small
# eigenvalues, which is where quantisation errors are pushed to.

PANEL = 512  # columns of one product: wide enough for its full speed, narrow enough to save almost half of them


@dataclass(frozen=True)
class TokenWeights:
    """How much each calibration token counts.

    weighting: uniform, all the same; input, rms(x)^-power of what the layer is given; residual, rms(s)^-power of the
    residual stream behind a layer that writes into it (the next norm divides the layer's error by just that), and all
    the same for other layers. Massive activations are those of a few tokens, and make up most of H where all tokens
    count the same. first_token: what the first token of a window counts besides.
    """

    weighting: str
    power: float
    first_token: float

    @property
    def of_residual(self) -> bool:
        return self.weighting == "residual"

    @property
    def decisive(self) -> "TokenWeights":
        """The same weights, with nothing said that does not matter."""
        return replace(self, power=0.0) if self.weighting == "uniform" else self

    def of(self, inputs: Tensor, behind: Tensor | None, tokens: int) -> Tensor | None:
        """inputs (..., in), tokens of windows of so many; behind (..., hidden), None where the layer does not write.

        Returns (...) float32, or None where all count the same. Where a layer is given a part of the tokens only (a
        routed expert), none counts as the first one.
        """
        decisive = {"uniform": None, "input": inputs, "residual": behind}[self.weighting]
        if decisive is None and self.first_token == 1:
            return None
        weights = torch.ones(inputs.shape[:-1], device=inputs.device)
        if decisive is not None:
            energy = decisive.float().square().mean(dim=-1)
            weights = torch.where(energy > 0, energy.pow(-self.power / 2), 0.0)
        if weights.numel() % tokens == 0:
            weights.view(-1, tokens)[:, 0] *= self.first_token
        return weights


@dataclass(frozen=True)
class HeldOut:
    """The moments of a part of the calibration tokens, and its share of all of them (of their weight)."""

    hessian: Tensor
    share: float
    cross: Tensor | None = None
    drift: Tensor | None = None

    def complement(self, everything: Tensor) -> Tensor:
        """The Hessian of the other tokens, given that of all; new memory."""
        rest = (everything - self.share * self.hessian).div_(1.0 - self.share)
        # Columns that no other token reaches hold what rounding left, of either sign.
        unreached = rest.diagonal() <= 1e-12 * everything.diagonal()
        rest[unreached] = 0.0
        rest[:, unreached] = 0.0
        return rest

    def without(self, everything: Tensor, held: Tensor) -> Tensor:
        """The cross term or drift of the other tokens, given that of all and that of these; new memory."""
        return (everything - self.share * held).div_(1.0 - self.share)


@dataclass(frozen=True)
class Statistics:
    """What was collected of one input: (in, in) float64 each."""

    hessian: Tensor
    cross: Tensor | None = None
    drift: Tensor | None = None  # (out, in)
    heldout: HeldOut | None = None


class Accumulator:
    """Adds up X^T X and, where they are asked for, (X_o - X)^T X and R^T X, batch by batch."""

    def __init__(self, in_features: int, device: torch.device, *, cross: bool = False, drift: int = 0) -> None:
        """drift: features of R, 0 for none."""
        self.tokens = 0.0  # by weight
        self._square = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self._cross = torch.zeros_like(self._square) if cross else None
        self._drift = self._square.new_zeros(drift, in_features) if drift else None

    def add(
        self,
        inputs: Tensor,
        original: Tensor | None = None,
        weights: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> None:
        """inputs, original: (..., in), residual: (..., out), any floating dtype; weights (...) float32, 1 for each
        token if None."""
        flat = _flat(inputs)
        weighted = flat if weights is None else flat * weights.flatten()[:, None]
        for start in range(0, flat.shape[1], PANEL):  # H is symmetric: the blocks below the diagonal are not computed
            panel = slice(start, start + PANEL)
            self._square[panel, start:] += weighted[:, panel].T @ flat[:, start:]
        if self._cross is not None:
            if original is None or original.shape != inputs.shape:
                raise NumericsError(
                    "qep cannot pair its tokens with those that the original model gives it (a routed expert?); name "
                    "it in qep.exclude_layer_keywords, or use qep=none"
                )
            self._cross += (_flat(original) - flat).T @ weighted
        if self._drift is not None:
            assert residual is not None  # whoever asked for the drift has it
            self._drift += _flat(residual).T @ weighted
        self.tokens += len(flat) if weights is None else float(weights.sum(dtype=torch.float64))

    def sum_over(self, processes: Callable[[Tensor], Tensor]) -> None:
        """Adds what other processes have accumulated; `processes` gives the sum of a contiguous tensor over all."""
        for start in range(0, len(self._square), PANEL):
            panel = self._square[start : start + PANEL, start:]
            panel.copy_(processes(panel.contiguous()))
        for moments in (self._cross, self._drift):
            if moments is not None:
                processes(moments)
        self.tokens = float(processes(torch.tensor([self.tokens], dtype=torch.float64, device=self._square.device)))

    def hessian(self) -> Tensor:
        """H (in, in) float64, in the accumulator's own memory: to be called once, at the end."""
        for start in range(0, len(self._square), PANEL):
            stop = start + PANEL
            square = self._square[start:stop, start:stop]
            square.copy_(square.triu() + square.triu(1).T)
            self._square[stop:, start:stop] = self._square[start:stop, stop:].T
        return self._square.div_(self.tokens or 1.0)

    def cross(self) -> Tensor | None:
        """C (in, in) float64, likewise."""
        return None if self._cross is None else self._cross.div_(self.tokens or 1.0)

    def drift(self) -> Tensor | None:
        """D (out, in) float64, likewise."""
        return None if self._drift is None else self._drift.div_(self.tokens or 1.0)


def packed(hessian: Tensor) -> Tensor:
    """The panels of a symmetric matrix (n, n) from the diagonal on, flat: little more than half of it."""
    starts = range(0, len(hessian), PANEL)
    return torch.cat([hessian[start : start + PANEL, start:].flatten() for start in starts])


def packed_size(size: int) -> int:
    """Elements of a packed matrix (size, size)."""
    return sum(min(PANEL, size - start) * (size - start) for start in range(0, size, PANEL))


def unpacked(flat: Tensor, size: int) -> Tensor:
    """The inverse of `packed`: (size, size), with the same bits."""
    hessian = flat.new_empty(size, size)
    parts = flat.split([min(PANEL, size - start) * (size - start) for start in range(0, size, PANEL)])
    for start, part in zip(range(0, size, PANEL), parts, strict=True):
        stop = start + PANEL
        panel = part.view(-1, size - start)
        hessian[start:stop, start:] = panel
        hessian[stop:, start:stop] = panel[:, PANEL:].T
    return hessian


@dataclass(frozen=True)
class Energies:
    """What the relative errors of some rows of a layer are made of, to be added up over all its rows."""

    output_error: float  # tr(E H E^T), E = W - W_quantised
    output: float  # tr(W H W^T)
    weight_error: float  # |E|^2
    weight: float  # |W|^2

    @classmethod
    def of(cls, weight: Tensor, quantized: Tensor, hessian: Tensor) -> "Energies":
        """weight, quantized (rows, in) float32."""
        error = weight - quantized
        squares = (rows.double().square().sum().item() for rows in (weight.double() - quantized.double(), weight))
        return cls(_energy(error, hessian), _energy(weight, hessian), *squares)

    def __add__(self, other: "Energies") -> "Energies":
        return Energies(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    def relative(self) -> tuple[float, float]:
        """The relative errors of output and weight, 0 where there is nothing to be relative to."""
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
    """tr(R H R^T) in float32 products: a figure for people, not one that anything is solved with."""
    product = rows @ hessian.to(rows.dtype)
    return torch.sum(product * rows, dtype=torch.float64).item()


def _flat(tokens: Tensor) -> Tensor:
    return tokens.reshape(-1, tokens.shape[-1]).float()
