"""Descent that stays on the orthogonal matrices, in two parametrisations; any leading dimensions are a batch.

    qr_orth  R = Q of Z = Q U with diag U > 0, and Z descends by SGD with momentum (DartQuant, arXiv 2511.04063,
             section 4.2, whose released code leaves the signs of U to chance)
    lie      R descends along its skew gradient A = (R^T G - G^T R) / 2 by Adam: R <- R (I + hA)^-1 (I - hA), h = lr / 2
             (Cayley), orthogonal however long the step; one Newton-Schulz step takes away what float32 adds

Knows no objective and no data: it is given the gradient with respect to R. float32 inside; `polished` ends in float64.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

ADAM = (0.9, 0.99, 1e-12)  # decays of both moments, and what keeps the first step of a flat direction finite


class Descent(ABC):
    """A rotation (..., n, n) float32 on its way."""

    @property
    @abstractmethod
    def rotation(self) -> Tensor: ...

    @abstractmethod
    def step(self, gradient: Tensor, lr: float) -> None:
        """Goes one step against the gradient (..., n, n) with respect to `rotation`."""


class QrOrth(Descent):
    def __init__(self, start: Tensor, momentum: float) -> None:
        self._z = start.float().clone()
        self._momentum = momentum
        self._velocity = torch.zeros_like(self._z)
        self._factor()

    @property
    def rotation(self) -> Tensor:
        return self._q

    def step(self, gradient: Tensor, lr: float) -> None:
        # dL/dZ = (G + Q copyltu(-G^T Q)) U^-T, copyltu being the lower triangle mirrored upwards (Walter, Lehmann and
        # Lamour, "On evaluating higher-order derivatives of the QR decomposition of tall matrices", 2012).
        skew = -gradient.mT @ self._q
        copied = skew.tril() + skew.tril(-1).mT
        pulled = torch.linalg.solve_triangular(self._u.mT, self._q @ copied + gradient, upper=False, left=False)
        self._velocity = self._momentum * self._velocity + pulled
        self._z = self._z - lr * self._velocity
        self._factor()

    def _factor(self) -> None:
        q, u = torch.linalg.qr(self._z)
        signs = torch.where(u.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
        self._q: Tensor = q * signs[..., None, :]
        self._u: Tensor = u * signs[..., None]


class Lie(Descent):
    def __init__(self, start: Tensor, momentum: float) -> None:
        self._r = start.float().clone()
        self._decay = momentum
        self._mean = torch.zeros_like(self._r)
        self._square = torch.zeros_like(self._r)
        self._steps = 0

    @property
    def rotation(self) -> Tensor:
        return self._r

    def step(self, gradient: Tensor, lr: float) -> None:
        product = self._r.mT @ gradient
        skew = (product - product.mT) / 2
        self._steps += 1
        self._mean.lerp_(skew, 1 - self._decay)
        self._square.lerp_(skew.square(), 1 - ADAM[1])
        mean = self._mean / (1 - self._decay**self._steps)
        square = self._square / (1 - ADAM[1] ** self._steps)
        # R (I - lr A) is the same to first order. But Adam's A has entries near 1 and a spectral norm of up to n: with
        # thousands of channels that is so far from the orthogonal matrices that Newton-Schulz leads away from them.
        half = lr / 2 * mean / (square.sqrt() + ADAM[2])
        eye = torch.eye(half.shape[-1], dtype=half.dtype, device=half.device)
        self._r = newton_schulz(self._r @ torch.linalg.solve(eye + half, eye - half))


DESCENTS: dict[str, type[QrOrth] | type[Lie]] = {"qr_orth": QrOrth, "lie": Lie}


def newton_schulz(matrix: Tensor) -> Tensor:
    """One step towards the nearest orthogonal matrix: M (3 I - M^T M) / 2; quadratic where M is close to one."""
    return 1.5 * matrix - 0.5 * (matrix @ (matrix.mT @ matrix))


def polished(rotation: Tensor) -> Tensor:
    """The orthogonal matrix next to a nearly orthogonal one, float64: |R R^T - I| < 1e-13."""
    rotation = rotation.double()
    for _ in range(4):  # 1e-4 -> 1e-8 -> 1e-16
        rotation = newton_schulz(rotation)
    return rotation
