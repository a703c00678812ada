"""The upper Cholesky factor U of an inverse Hessian, H^-1 = U^T U, which drives GPTQ's error propagation.

With J the reversal of rows and of columns and J H J = L L^T, H = (J L J)(J L^T J), so U = (J L J)^-1 = J L^-1
J: one Cholesky factorisation and one triangular inverse, 2/3 n^3 flops, where the textbook's Cholesky,
inverse, Cholesky take 4/3 n^3 and lose accuracy twice. Peak memory beyond `hessian`: two (n, n) float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from jointq_cli.errors import NumericsError

DAMPING_RETRIES = 5  # each with ten times the damping
_LEAST_DAMPING = 1e-7  # of which the retries are multiples if the damping is smaller
_LEAF = 128  # columns up to which LAPACK inverts a triangle


@dataclass(frozen=True)
class Factor:
    """U (n, n) upper triangular with H^-1 = U^T U, H damped and with rows and columns in `order`.

    damping is the fraction of the mean nonzero diagonal that was added, damping_retries how often it was raised.
    condition is the largest norm of a row of the damped Hessian times the mean diagonal of its inverse: a lower bound
    of the condition number, and near the relative error that float32 adds. (The ratio of the factor's own diagonal
    entries would miss a large eigenvalue whose eigenvector is spread over many columns.)
    """

    upper: Tensor
    damping: float
    damping_retries: int
    condition: float

    def times_inverse(self, rows: Tensor) -> Tensor:
        """rows (..., n) H^-1, for a factor in the original order."""
        return rows @ self.upper.T @ self.upper


def factorize(
    hessian: Tensor,
    order: Tensor,
    damping: float,
    penalty: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    key: str = "quantizer.damping",
) -> Factor:
    """Factorise `hessian` (n, n) float64 with rows and columns taken in `order` (n,) int64; U is returned as `dtype`.

    damping: the fraction of the mean nonzero diagonal to add; raised where the Hessian is singular. penalty (n,)
    float64, in the original order: added to the diagonal before that mean is taken. key: the config key of the damping,
    for errors.

    Dead columns (H_ii = 0) get the mean nonzero diagonal, which does not affect the other columns.
    Raises NumericsError where the Hessian is zero, not finite, or singular after all retries.
    """
    diagonal = hessian.diagonal() if penalty is None else hessian.diagonal() + penalty
    if not bool(torch.isfinite(hessian.sum())) and not bool(torch.isfinite(hessian).all()):
        raise NumericsError("the Hessian holds NaN or Inf")
    if not bool((hessian.diagonal() > 0).any()):
        raise NumericsError("the Hessian is zero: no calibration token reached this layer")
    mean = float(diagonal[diagonal > 0].mean())
    for retries, fraction in enumerate(_dampings(damping)):
        lower = _cholesky(_reversed(hessian, order, diagonal, fraction * mean, mean))
        if lower is not None:
            invert_lower(lower)
            damped = torch.where(diagonal == 0, mean, diagonal) + fraction * mean
            return Factor(_upper(lower, dtype), fraction, retries, _condition(hessian, damped, lower))
    raise NumericsError(f"{key}={damping:g}: the Hessian is singular even with {fraction:g} of its mean diagonal added")


def damped(hessian: Tensor, damping: float) -> Tensor:
    """What `factorize` factorises, without a penalty, in the original order; damping: as `Factor` has it."""
    diagonal, result = hessian.diagonal(), hessian.clone()
    mean = float(diagonal[diagonal > 0].mean())
    result.diagonal().copy_(torch.where(diagonal == 0, mean, diagonal) + damping * mean)
    return result


def _dampings(damping: float) -> Iterator[float]:
    yield damping
    for retry in range(1, DAMPING_RETRIES + 1):
        yield max(damping, _LEAST_DAMPING) * 10**retry


def _reversed(hessian: Tensor, order: Tensor, diagonal: Tensor, damping: float, dead: float) -> Tensor:
    """A copy of the Hessian with this diagonal, damped, and with rows and columns in the reverse of `order`."""
    reverse = order.flip(0)
    result = hessian.index_select(0, reverse)
    for start in range(0, len(result), 256):  # in place: a second full copy would be a third matrix
        rows = result[start : start + 256]
        rows.copy_(rows.index_select(1, reverse))
    filled = torch.where(diagonal == 0, dead, diagonal)
    result.diagonal().copy_(filled[reverse] + damping)
    return result


def _cholesky(matrix: Tensor) -> Tensor | None:
    """The lower factor, or None where `matrix` is not positive definite beyond rounding."""
    lower, info = torch.linalg.cholesky_ex(matrix)
    pivots = lower.diagonal()
    # By chance of rounding, LAPACK can factorise a singular matrix; then some pivots are noise.
    noise = torch.finfo(matrix.dtype).eps * len(matrix) * matrix.diagonal().max()
    positive = int(info) == 0 and bool((pivots.square() > noise).all())
    return lower if positive else None


def _upper(inverse: Tensor, dtype: torch.dtype) -> Tensor:
    """J L^-1 J as `dtype`, row-major for the kernels; LAPACK returns L^-1 column-major."""
    return inverse.to(dtype, memory_format=torch.contiguous_format).flip(0, 1)


def _condition(hessian: Tensor, diagonal: Tensor, inverse: Tensor) -> float:
    """`Factor.condition` of `hessian` with this diagonal, whose inverse has the trace |L^-1|^2."""
    rows = torch.linalg.vector_norm(hessian, dim=1).square() - hessian.diagonal().square() + diagonal.square()
    return float(rows.max().sqrt() * torch.linalg.vector_norm(inverse).square() / len(inverse))


def invert_lower(lower: Tensor) -> None:
    """Invert a lower triangular matrix in place, recursively by halves: almost all the work is matrix products."""
    n = len(lower)
    if n <= _LEAF:
        identity = torch.eye(n, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = n // 2
    first, corner, second = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    invert_lower(first)
    invert_lower(second)
    product = corner @ first
    torch.matmul(second, product, out=corner)
    corner.neg_()
