"""Gradient descent over the orthogonal matrices, in two parametrisations; any leading dimensions are a batch.

    qr_orth  R = Q of Z = Q U with diag U > 0, and Z descends by SGD with momentum (DartQuant, arXiv 2511.04063,
             section 4.2; its released code leaves the signs of U to LAPACK)
    lie      R descends along its skew-symmetric gradient A = (R^T G - G^T R) / 2 by Adam, with a Cayley transform as
             the step: R <- R (I + hA)^-1 (I - hA), h = lr / 2 (as in Li et al., arXiv 2002.01113), orthogonal for any
             step length; one Newton-Schulz step removes the rounding errors of float32

An optimizer receives gradients with respect to R and knows no objective. float32; `orthogonalize` ends in float64.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

BETA2, EPSILON = 0.99, 1e-12  # Adam's; EPSILON keeps the first step along a zero gradient finite


class RotationOptimizer(ABC):
    """Updates a rotation (..., n, n) float32."""

    @property
    @abstractmethod
    def rotation(self) -> Tensor: ...

    @abstractmethod
    def step(self, gradient: Tensor, lr: float) -> None:
        """One step of descent; gradient: (..., n, n) float32, with respect to `rotation`."""


class QrOrth(RotationOptimizer):
    def __init__(self, start: Tensor, momentum: float) -> None:
        self._z = start.float().clone()
        self._momentum = momentum
        self._velocity = torch.zeros_like(self._z)
        self._factorize()

    @property
    def rotation(self) -> Tensor:
        return self._q

    def step(self, gradient: Tensor, lr: float) -> None:
        # dL/dZ = (G + Q copyltu(-G^T Q)) U^-T, copyltu being the lower triangle mirrored upwards (Walter, Lehmann and
        # Lamour, "On evaluating higher-order derivatives of the QR decomposition of tall matrices", 2012).
        product = -gradient.mT @ self._q
        mirrored = product.tril() + product.tril(-1).mT
        z_gradient = torch.linalg.solve_triangular(self._u.mT, self._q @ mirrored + gradient, upper=False, left=False)
        self._velocity = self._momentum * self._velocity + z_gradient
        self._z = self._z - lr * self._velocity
        self._factorize()

    def _factorize(self) -> None:
        q, u = torch.linalg.qr(self._z)
        signs = torch.where(u.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
        self._q: Tensor = q * signs[..., None, :]
        self._u: Tensor = u * signs[..., None]


class CayleyAdam(RotationOptimizer):
    def __init__(self, start: Tensor, momentum: float) -> None:
        self._rotation = start.float().clone()
        self._beta1 = momentum
        self._mean = torch.zeros_like(self._rotation)
        self._square = torch.zeros_like(self._rotation)
        self._steps = 0

    @property
    def rotation(self) -> Tensor:
        return self._rotation

    def step(self, gradient: Tensor, lr: float) -> None:
        product = self._rotation.mT @ gradient
        skew = (product - product.mT) / 2
        self._steps += 1
        self._mean.lerp_(skew, 1 - self._beta1)
        self._square.lerp_(skew.square(), 1 - BETA2)
        mean = self._mean / (1 - self._beta1**self._steps)
        square = self._square / (1 - BETA2**self._steps)
        # R (I - lr A) is the same to first order. But Adam's A has entries near 1 and a spectral norm of up to n: with
        # thousands of channels that is so far from orthogonal that Newton-Schulz diverges.
        half = lr / 2 * mean / (square.sqrt() + EPSILON)
        eye = torch.eye(half.shape[-1], dtype=half.dtype, device=half.device)
        self._rotation = newton_schulz(self._rotation @ torch.linalg.solve(eye + half, eye - half))


OPTIMIZERS: dict[str, type[QrOrth] | type[CayleyAdam]] = {"qr_orth": QrOrth, "lie": CayleyAdam}


def newton_schulz(matrix: Tensor) -> Tensor:
    """One step towards the nearest orthogonal matrix, M (3 I - M^T M) / 2: converges quadratically if M is close to it.

    Björck and Bowie, "An iterative algorithm for computing the best estimate of an orthogonal matrix", 1971.
    """
    return 1.5 * matrix - 0.5 * (matrix @ (matrix.mT @ matrix))


def orthogonalize(rotation: Tensor) -> Tensor:
    """The nearest orthogonal matrix to a nearly orthogonal one (..., n, n), float64: |R R^T - I| < 1e-13."""
    rotation = rotation.double()
    for _ in range(4):  # 1e-4 -> 1e-8 -> 1e-16
        rotation = newton_schulz(rotation)
    return rotation
