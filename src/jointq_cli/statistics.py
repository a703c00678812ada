"""What a layer's inputs look like: the Hessian of its output error, streamed. States the convention once.

For inputs X (tokens, in) of a linear layer the Hessian is H = X^T X / tokens (in, in): the mean squared change of a
row's output under a weight change e is e H e^T. Layers that share an input share a Hessian.
"""

import torch
from torch import Tensor

# Products in float32, sums over batches in float64: a bf16 product would round H to 8 bits and lose its small
# eigenvalues, which is where quantisation errors are pushed to.

PANEL = 512  # columns of one product: wide enough for its full speed, narrow enough to save almost half of them


class Hessian:
    """Accumulates X^T X over batches of tokens."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.tokens = 0
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor) -> None:
        """inputs: (..., in), any floating dtype."""
        flat = inputs.reshape(-1, inputs.shape[-1]).float()
        for start in range(0, flat.shape[1], PANEL):  # H is symmetric: the blocks below the diagonal are not computed
            panel = slice(start, start + PANEL)
            self._sum[panel, start:] += flat[:, panel].T @ flat[:, start:]
        self.tokens += len(flat)

    def finish(self) -> Tensor:
        """H = X^T X / tokens, (in, in) float64, in the accumulator's own memory: to be called once, at the end."""
        for start in range(0, len(self._sum), PANEL):
            stop = start + PANEL
            square = self._sum[start:stop, start:stop]
            square.copy_(square.triu() + square.triu(1).T)
            self._sum[stop:, start:stop] = self._sum[start:stop, stop:].T
        return self._sum.div_(max(self.tokens, 1))


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """Relative output error tr(E H E^T) / tr(W H W^T), E = W - W_quantised; weights (out, in) float32."""
    error = _energy(weight - quantized, hessian)
    signal = _energy(weight, hessian)
    return 0.0 if signal == 0 else error / signal


def weight_error(weight: Tensor, quantized: Tensor) -> float:
    """Relative weight error |E|^2 / |W|^2 (Frobenius)."""
    signal = weight.double().square().sum().item()
    return 0.0 if signal == 0 else (weight.double() - quantized.double()).square().sum().item() / signal


def _energy(rows: Tensor, hessian: Tensor) -> float:
    """tr(R H R^T) in float32 products: a figure for people, not one that anything is solved with."""
    product = rows @ hessian.to(rows.dtype)
    return torch.sum(product * rows, dtype=torch.float64).item()
