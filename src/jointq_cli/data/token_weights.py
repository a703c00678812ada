"""The weight of each calibration token in the Hessian and the other statistics of a layer."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenWeights:
    """How calibration tokens are weighted: H = sum_t w_t x_t x_t^T.

    weighting: uniform, w = 1; input, w = rms(x)^-power of the layer's input x; residual, w = rms(s)^-power of the
    residual stream s after a layer that writes into it (the next norm divides the layer's error by rms(s)), and 1 for
    other layers. With equal weights, the massive activations of a few tokens dominate H. first_token: an additional
    factor for the first token of each window.
    """

    weighting: str
    power: float
    first_token: float

    @property
    def of_residual(self) -> bool:
        return self.weighting == "residual"

    @property
    def canonical(self) -> "TokenWeights":
        """An equal value for all settings with the same weights, for keys of the store."""
        return replace(self, power=0.0) if self.weighting == "uniform" else self

    def per_token(self, inputs: Tensor, residual: Tensor | None, tokens: int) -> Tensor | None:
        """Weights (...) float32 for the tokens of a batch, or None where all weights are 1.

        inputs: (..., in), the layer's inputs for windows of `tokens` tokens. residual: (..., hidden), the residual
        stream after the layer, None where the layer does not write into it. Where a layer sees only a part of the
        tokens (a routed expert), no token counts as the first of its window.
        """
        reference = {"uniform": None, "input": inputs, "residual": residual}[self.weighting]
        if reference is None and self.first_token == 1:
            return None
        weights = torch.ones(inputs.shape[:-1], device=inputs.device)
        if reference is not None:
            energy = reference.float().square().mean(dim=-1)
            weights = torch.where(energy > 0, energy.pow(-self.power / 2), 0.0)
        if weights.numel() % tokens == 0:
            weights.view(-1, tokens)[:, 0] *= self.first_token
        return weights


def weighted_by_energy(weights: Tensor | None, energies: Tensor, share: float) -> Tensor:
    """weights^(1 - share) energies^share: weights (windows, tokens) of any scale, None for 1; energies of mean 1."""
    mixed = energies.pow(share)
    return mixed if weights is None else weights.pow(1.0 - share) * mixed
