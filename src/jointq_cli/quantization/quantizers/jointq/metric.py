"""The metric in which JointQ measures errors: the regularised Hessian of one input, H_l = H + lambda R.

A row with error e costs e H_l e'.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from jointq_cli.quantization.quantizers.cholesky import factorize

_DEAD = 1e-6  # H_ii of a dead column, relative to the mean: it is rounded to nearest and does not affect scales
_WELL_CONDITIONED = 1e6  # above it e H_l e' needs float64 (test_jointq_numerics.py)


@dataclass(frozen=True)
class Metric:
    """H_l of one input, with its columns in the order in which they are solved, divided by its mean diagonal.

    order (in,) int64, whose consecutive runs of `columns` are the groups; full (in, in) = H_l. schur (in, in), with U
    the upper Cholesky factor of H_l^-1 (H_l^-1 = U' U): its diagonal blocks are the Schur complements S_t =
    (U_tt' U_tt)^-1, the cost of errors in group t if all later groups are re-optimised for them; the blocks right of
    them are U_tt^-1 U_t,later, which propagate the errors to later groups. Both are float32, or float64 where the
    condition number is large.
    """

    order: Tensor
    columns: int
    full: Tensor
    schur: Tensor
    damping: float
    damping_retries: int
    condition: float

    @property
    def groups(self) -> int:
        return len(self.order) // self.columns

    def span(self, group: int) -> slice:
        return slice(group * self.columns, (group + 1) * self.columns)


def penalty(hessian: Tensor, strength: float, mode: str, gamma: float, floor: float, reference: str) -> Tensor:
    """The diagonal of lambda R (in,) float64, with a lower bound for dead columns.

    R_ii = 1 (mode identity) or max((H_ii / mean diag H)^gamma, floor) (diagonal), times mean diag H where reference
    is mean_diagonal and not absolute.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    profile = torch.ones_like(diagonal)
    if mode == "diagonal" and bool(mean > 0):
        profile = (diagonal / mean).pow(gamma).clamp_min(floor)
    result = strength * profile * (mean if reference == "mean_diagonal" else 1.0)
    return torch.where(diagonal > 0, result, result.clamp_min(_DEAD * mean))


def natural_order(hessian: Tensor, columns: int) -> Tensor:
    """Groups of neighbouring columns, those with the largest activations first, as later groups compensate."""
    energy = hessian.diagonal().view(-1, columns).mean(dim=1)
    groups = torch.argsort(energy, descending=True, stable=True)
    return torch.arange(len(hessian), device=hessian.device).view(-1, columns)[groups].flatten()


def activation_order(hessian: Tensor) -> Tensor:
    """Columns by falling H_ii: columns of a group are alike, but a permutation must be stored."""
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)


def measure(hessian: Tensor, order: Tensor, columns: int, extra: Tensor) -> Metric:
    """The metric of `hessian` (in, in) float64 with `extra` (in,) float64 added to its diagonal.

    Raises NumericsError as `factorize` does; where that adds damping, only `schur` is damped. One group of all columns
    needs no factor: its Schur complement is H_l.
    """
    if columns == len(hessian) and (alone := _of_one_group(hessian, order, extra)):
        return alone
    factor = factorize(hessian, order, 0.0, extra, torch.float64)
    kind = torch.float32 if factor.condition < _WELL_CONDITIONED else torch.float64
    mean = float((hessian.diagonal() + extra).mean())
    upper = factor.upper
    for start in range(0, len(upper), columns):
        stop = start + columns
        square = upper[start:stop, start:stop]
        identity = torch.eye(len(square), dtype=upper.dtype, device=upper.device)
        inverse = torch.linalg.solve_triangular(square, identity, upper=True)
        upper[start:stop, stop:] = inverse @ upper[start:stop, stop:]
        square.copy_(inverse @ inverse.T / mean)
    schur = upper.to(kind)
    del upper
    return Metric(
        order=order,
        columns=columns,
        full=_ordered(hessian, order, extra, mean, kind),
        schur=schur,
        damping=factor.damping,
        damping_retries=factor.damping_retries,
        condition=factor.condition,
    )


def _of_one_group(hessian: Tensor, order: Tensor, extra: Tensor) -> Metric | None:
    """None where H_l may not be well conditioned: by its largest sum of a row over the least of `extra`, which is at
    least the condition number of a Hessian that is positive semidefinite."""
    sums, least = torch.linalg.vector_norm(hessian, ord=1, dim=1) + extra, float(extra.min())
    if not float(sums.max()) < _WELL_CONDITIONED * least or not bool((hessian.diagonal() > 0).any()):
        return None
    diagonal = hessian.diagonal() + extra
    full = _ordered(hessian, order, extra, float(diagonal.mean()), torch.float32)
    return Metric(order, len(order), full, full, 0.0, 0, float(diagonal.max() / diagonal.min()))


def _ordered(hessian: Tensor, order: Tensor, extra: Tensor, mean: float, kind: torch.dtype) -> Tensor:
    result = torch.empty(hessian.shape, dtype=kind, device=hessian.device)
    natural = torch.equal(order, torch.arange(len(order), device=order.device))
    for start in range(0, len(order), 256):  # by rows: a full copy in float64 would be one more Hessian in memory
        span = slice(start, start + 256)
        rows = hessian[span] if natural else hessian.index_select(0, order[span]).index_select(1, order)
        result[span] = rows / mean
    result.diagonal().copy_((hessian.diagonal() + extra)[order] / mean)
    return result
