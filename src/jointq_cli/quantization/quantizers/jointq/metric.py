"""What JointQ measures errors with: the regularised Hessian of one input, and what its Cholesky factor says of later
groups.

Knows float64 linear algebra, groups of columns and the penalty; no weights, no grid. A row with error e costs
e H_l e' with H_l = H + lambda R.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from jointq_cli.quantization.quantizers.cholesky import factorize

_DEAD = 1e-6  # curvature of a dead column, as a share of the mean: it rounds to nearest and sways no scale
_WELL_CONDITIONED = 1e6  # above it float32 loses too much of e H_l e' (test_jointq_numerics.py)


@dataclass(frozen=True)
class Metric:
    """H_l of one input with columns in the order in which they are solved, divided by its mean diagonal.

    order (in,) int64, whole groups of `columns`; full (in, in) = H_l. schur (in, in), with U the upper Cholesky factor
    of H_l^-1 (H_l^-1 = U' U): its diagonal blocks are S_t = (U_tt' U_tt)^-1, the cost of errors in group t once all
    later groups are solved for again, and the blocks right of them U_tt^-1 U_t,later, which carry the errors there.
    Both float32, or float64 where the condition asks for it.
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
    """The diagonal of lambda R (in,) float64, floored for dead columns.

    R_ii = 1 (mode identity) or max((H_ii / mean diag H)^gamma, floor) (diagonal), times mean diag H where reference
    is mean_diagonal and not absolute.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    shape = torch.ones_like(diagonal)
    if mode == "diagonal" and bool(mean > 0):
        shape = (diagonal / mean).pow(gamma).clamp_min(floor)
    result = strength * shape * (mean if reference == "mean_diagonal" else 1.0)
    return torch.where(diagonal > 0, result, result.clamp_min(_DEAD * mean))


def natural_order(hessian: Tensor, columns: int) -> Tensor:
    """Groups of neighbouring columns, those with most activation energy first: the later ones make up for them."""
    energy = hessian.diagonal().view(-1, columns).mean(dim=1)
    groups = torch.argsort(energy, descending=True, stable=True)
    return torch.arange(len(hessian), device=hessian.device).view(-1, columns)[groups].flatten()


def activation_order(hessian: Tensor) -> Tensor:
    """Columns by falling energy: groups are made of columns alike, and a permutation must be kept."""
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)


def measure(hessian: Tensor, order: Tensor, columns: int, extra: Tensor) -> Metric:
    """The metric of `hessian` (in, in) float64 with `extra` (in,) float64 added to its diagonal.

    Raises NumericsError as `factorize` does; where it has to damp, only `schur` is damped.
    """
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


def _ordered(hessian: Tensor, order: Tensor, extra: Tensor, mean: float, kind: torch.dtype) -> Tensor:
    result = torch.empty(hessian.shape, dtype=kind, device=hessian.device)
    for start in range(0, len(order), 256):  # by rows: a whole copy in float64 would be a Hessian more
        rows = order[start : start + 256]
        result[start : start + 256] = hessian.index_select(0, rows).index_select(1, order).div_(mean)
    result.diagonal().copy_((hessian.diagonal() + extra)[order] / mean)
    return result
