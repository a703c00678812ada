"""The upper Cholesky factor U of an inverse Hessian, H^-1 = U^T U, which drives GPTQ's error propagation.

Knows float64 linear algebra. Knows no weights and no grid.

With J the reversal of rows and of columns and J H J = L L^T, H = (J L J)(J L^T J), so U = (J L J)^-1 = J L^-1
J: one Cholesky factorisation and one triangular inverse, 2/3 n^3 flops, where the textbook's Cholesky,
inverse, Cholesky take 4/3 n^3 and lose accuracy twice. Peak memory beyond `hessian`: two (n, n) float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from jointq_cli.errors import NumericsError

LADDER = 5  # how often damping is multiplied by ten before the layer is given up
_LOWEST_RUNG = 1e-7  # where the ladder starts if no damping was asked for
_LEAF = 128  # columns below which a triangular inverse is left to LAPACK


@dataclass(frozen=True)
class Factor:
    """U (n, n) upper triangular with H^-1 = U^T U, H damped and with rows and columns in `order`.

    damping is the fraction of the mean live diagonal that it took, rungs how often it was raised. condition
    is the largest norm of a row of the damped Hessian times the mean diagonal of its inverse: a lower bound of
    its condition number, and near what float32 loses. The factor's own diagonal misses a loud direction that is
    spread over many columns.
    """

    upper: Tensor
    damping: float
    damping_retries: int
    condition: float


def factorize(
    hessian: Tensor,
    order: Tensor,
    damping: float,
    penalty: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    key: str = "quantizer.damping",
) -> Factor:
    """Factorise `hessian` (n, n) float64 with rows and columns taken in `order` (n,) int64; U comes as `dtype`.

    `penalty` (n,) float64, in the original order, is added to the diagonal, before the mean is taken and besides any
    damping.

    key: what the damping is called in an error.

    Dead columns (H_ii = 0) get the mean of the live diagonal, which changes nothing for the others.
    Raises NumericsError where the Hessian is empty, not finite, or singular at the top of the damping ladder.
    """
    diagonal = hessian.diagonal() if penalty is None else hessian.diagonal() + penalty
    if not bool(torch.isfinite(hessian.sum())) and not bool(torch.isfinite(hessian).all()):
        raise NumericsError("the Hessian holds NaN or Inf")
    if not bool((hessian.diagonal() > 0).any()):
        raise NumericsError("the Hessian is zero: no calibration token reached this layer")
    mean = float(diagonal[diagonal > 0].mean())
    for rung, fraction in enumerate(_ladder(damping)):
        lower = _cholesky(_reversed(hessian, order, diagonal, fraction * mean, mean))
        if lower is not None:
            invert_lower(lower)
            damped = torch.where(diagonal == 0, mean, diagonal) + fraction * mean
            return Factor(_upper(lower, dtype), fraction, rung, _condition(hessian, damped, lower))
    raise NumericsError(f"{key}={damping:g}: the Hessian is singular even with {fraction:g} of its mean diagonal added")


def _ladder(damping: float) -> Iterator[float]:
    yield damping
    for rung in range(1, LADDER + 1):
        yield max(damping, _LOWEST_RUNG) * 10**rung


def _reversed(hessian: Tensor, order: Tensor, diagonal: Tensor, damping: float, dead: float) -> Tensor:
    """The Hessian with this diagonal, damped, rows and columns in the reverse of `order`; as new memory."""
    backwards = order.flip(0)
    result = hessian.index_select(0, backwards)
    for start in range(0, len(result), 256):  # in place, for a second full copy would be a third matrix
        rows = result[start : start + 256]
        rows.copy_(rows.index_select(1, backwards))
    live = torch.where(diagonal == 0, dead, diagonal)
    result.diagonal().copy_(live[backwards] + damping)
    return result


def _cholesky(matrix: Tensor) -> Tensor | None:
    """The lower factor, or None where `matrix` is not positive definite beyond rounding."""
    lower, info = torch.linalg.cholesky_ex(matrix)
    pivots = lower.diagonal()
    # A singular matrix can pass by luck of rounding, with pivots that are noise.
    noise = torch.finfo(matrix.dtype).eps * len(matrix) * matrix.diagonal().max()
    sound = int(info) == 0 and bool((pivots.square() > noise).all())
    return lower if sound else None


def _upper(inverse: Tensor, dtype: torch.dtype) -> Tensor:
    """J L^-1 J as `dtype`, row-major for the kernels; L^-1 is column-major as LAPACK left it."""
    return inverse.to(dtype, memory_format=torch.contiguous_format).flip(0, 1)


def _condition(hessian: Tensor, diagonal: Tensor, inverse: Tensor) -> float:
    """See `Factor`; of `hessian` with this diagonal, whose inverse has the trace |L^-1|^2."""
    rows = torch.linalg.vector_norm(hessian, dim=1).square() - hessian.diagonal().square() + diagonal.square()
    return float(rows.max().sqrt() * torch.linalg.vector_norm(inverse).square() / len(inverse))


def invert_lower(lower: Tensor) -> None:
    """Invert a lower triangular matrix in place, by halves: almost all of it is matrix products."""
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
