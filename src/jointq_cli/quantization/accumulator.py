"""Sums of the statistics of a group's input over batches, and the packed form in which a Hessian is kept on disk."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from jointq_cli.errors import NumericsError

PANEL = 512  # columns of one product: wide enough for its full speed, narrow enough to save almost half of them
UNPAIRED = (
    "qep cannot pair its tokens with those that it receives in the original model (a routed expert?); name it in "
    "qep.exclude_layer_keywords, or use qep=none"
)


class Accumulator:
    """Adds up X^T X and, where requested, the cross term (X_o - X)^T X and the drift R^T X (see statistics)."""

    def __init__(
        self,
        in_features: int,
        device: torch.device,
        *,
        cross: bool = False,
        drift: int = 0,
        precision: str | None = None,
    ) -> None:
        """drift: features of R, 0 for none.

        precision: None for float32, or as in torch.set_float32_matmul_precision; "medium" rounds the factors of a
        product, not their sum. A model in bf16 has its activations in bf16, so H without token weights stays as it is;
        what else is rounded is rounded for each token anew, by a 500th of what differs from token to token.
        """
        self._precision = precision
        self.tokens = 0.0  # by weight
        self.rows = 0  # tokens, whatever their weight
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
        """inputs, original: (..., in), residual: (..., out), any floating dtype; weights: (...) float32, None: all 1.

        Raises NumericsError where the cross term is requested and `original` does not have the tokens of `inputs`.
        """
        with _matmul_precision(self._precision):
            self._add(inputs, original, weights, residual)

    def _add(self, inputs: Tensor, original: Tensor | None, weights: Tensor | None, residual: Tensor | None) -> None:
        flat = _flat(inputs)
        weighted = flat if weights is None else flat * weights.flatten()[:, None]
        for start in range(0, flat.shape[1], PANEL):  # H is symmetric: the blocks below the diagonal are not computed
            panel = slice(start, start + PANEL)
            self._square[panel, start:] += weighted[:, panel].T @ flat[:, start:]
        if self._cross is not None:
            if original is None or original.shape != inputs.shape:
                raise NumericsError(UNPAIRED)
            self._cross += (_flat(original) - flat).T @ weighted
        if self._drift is not None:
            assert residual is not None
            self._drift += _flat(residual).T @ weighted
        self.tokens += len(flat) if weights is None else float(weights.sum(dtype=torch.float64))
        self.rows += len(flat)

    def add_share(self, other: "Accumulator", share: float) -> None:
        """Adds the sums of `other`, which has the same shapes, times `share`; `rows` stays."""
        pairs = ((self._square, other._square), (self._cross, other._cross), (self._drift, other._drift))
        for own, added in pairs:
            if own is not None and added is not None:
                own.add_(added, alpha=share)
        self.tokens += share * other.tokens

    def sum_over(self, processes: Callable[[Tensor], Tensor]) -> None:
        """Adds the sums of other processes; `processes` returns the sum of a contiguous tensor over all, in place."""
        for start in range(0, len(self._square), PANEL):
            panel = self._square[start : start + PANEL, start:]
            panel.copy_(processes(panel.contiguous()))
        for sums in (self._cross, self._drift):
            if sums is not None:
                processes(sums)
        counts = torch.tensor([self.tokens, self.rows], dtype=torch.float64, device=self._square.device)
        self.tokens, rows = processes(counts).tolist()
        self.rows = round(rows)

    def hessian(self) -> Tensor:
        """H (in, in) float64, in the accumulator's own memory: call it once, when all batches have been added."""
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
    """The upper panels of a symmetric matrix (n, n), from the diagonal on, flat: little more than half of it."""
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


@contextmanager
def _matmul_precision(precision: str | None) -> Iterator[None]:
    """Inside, float32 products have this precision; None: that which they have anyway."""
    before = torch.get_float32_matmul_precision()
    if precision is None:
        yield
        return
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _flat(tokens: Tensor) -> Tensor:
    return tokens.reshape(-1, tokens.shape[-1]).float()
