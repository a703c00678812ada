"""TokenWeights: from statistics.py."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


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
    def canonical(self) -> "TokenWeights":
        """The same weights, with nothing said that does not matter."""
        return replace(self, power=0.0) if self.weighting == "uniform" else self

    def per_token(self, inputs: Tensor, behind: Tensor | None, tokens: int) -> Tensor | None:
        """inputs (..., in), tokens of windows of so many; behind (..., hidden), None where the layer does not write.

        Returns (...) float32, or None where all count the same. Where a layer is given a part of the tokens only (a
        routed expert), none counts as the first one.
        """
        canonical = {"uniform": None, "input": inputs, "residual": behind}[self.weighting]
        if canonical is None and self.first_token == 1:
            return None
        weights = torch.ones(inputs.shape[:-1], device=inputs.device)
        if canonical is not None:
            energy = canonical.float().square().mean(dim=-1)
            weights = torch.where(energy > 0, energy.pow(-self.power / 2), 0.0)
        if weights.numel() % tokens == 0:
            weights.view(-1, tokens)[:, 0] *= self.first_token
        return weights
