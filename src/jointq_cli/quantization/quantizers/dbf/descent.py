"""Descent of double binary factorisation in the layer's metric: by turns the rows of S1 with a, the columns of S2, d
and b, the others fixed. No step raises tr(E H_l E'), E = W - diag(a) S1 diag(d) S2 diag(b).

Notation: Y = diag(d) S2 diag(b), L = diag(a) S1 diag(d).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jointq_cli import kernels
from jointq_cli.errors import NumericsError
from jointq_cli.kernels import Box, Rounding
from jointq_cli.quantization.quantizers.dbf.factors import Factors, product, signs

_SIGNS = Box(-0.5, 0.5, 1)
_COLUMNS = 128  # searched between two large updates
_RIDGE = 1e-7  # of the systems of scales, relative to their mean diagonal
_LEAST = 2.0**-40  # of a row's scale during the search: it must be above 0


@dataclass(frozen=True)
class Layer:
    """weight W (out, in), metric H_l (in, in), correlation W H_l (out, in); float32, near 1."""

    weight: Tensor
    metric: Tensor
    correlation: Tensor
    rounding: Rounding  # of a

    @property
    def signal(self) -> float:
        """tr(W H_l W')."""
        return float(torch.sum(self.correlation * self.weight, dtype=torch.float64))

    def cost(self, factors: Factors) -> float:
        """tr(E H_l E')."""
        error = self.weight - factors.values()
        return float(torch.sum(product(error, self.metric).mul_(error), dtype=torch.float64))


def descent(layer: Layer, factors: Factors, rounds: int) -> Iterator[Factors]:
    """The factors after each step, until no sign changes or all rounds are done."""
    factors = fit_rank_scale(layer, fit_in_scale(layer, fit_rank_scale(layer, factors)))
    yield factors
    for _ in range(rounds):
        before = factors
        for step in (search_left, fit_rank_scale, search_right, fit_in_scale, fit_rank_scale):
            factors = step(layer, factors)
            yield factors
        if torch.equal(before.left, factors.left) and torch.equal(before.right, factors.right):
            return


def search_left(layer: Layer, factors: Factors) -> Factors:
    """Each row's signs and scale by JointQ's search, in the metric Y H_l Y'."""
    spread = factors.scaled_right * factors.rank_scale[:, None]
    reached = product(spread, layer.metric)
    metric = product(reached, spread.T)
    unit = metric.diagonal().mean()
    metric = metric.div_(unit)
    correlation = product(layer.weight, reached.T).div_(unit)
    levels = factors.left / 2
    scale = (2 * factors.out_scale).clamp_min(_LEAST)
    kernels.for_device(levels.device).flip_search(
        correlation, metric, product(levels, metric), levels, scale, _SIGNS, layer.rounding, guarded=True
    )
    return replace(factors, left=levels.mul_(2), out_scale=scale / 2)


def fit_out_scale(layer: Layer, factors: Factors) -> Factors:
    """The best a: of each row, h s / s R s."""
    spread = factors.scaled_right * factors.rank_scale[:, None]
    reached = product(spread, layer.metric)
    along = (product(layer.weight, reached.T) * factors.left).sum(dim=1)
    energy = (product(factors.left, product(reached, spread.T)) * factors.left).sum(dim=1)
    scale = torch.where(energy > 0, along / energy, 0.0)
    return replace(factors, left=factors.left * signs(scale)[:, None], out_scale=scale.abs())


def fit_rank_scale(layer: Layer, factors: Factors) -> Factors:
    """The best d: (L'L o Y H_l Y') d = diag(L' W H_l Y') for L and Y with d = 1."""
    left, right = factors.scaled_left, factors.scaled_right
    system = product(left.T, left) * product(product(right, layer.metric), right.T)
    scale = _solved(system, (product(left.T, layer.correlation) * right).sum(dim=1))
    return replace(factors, right=factors.right * signs(scale)[:, None], rank_scale=scale.abs())


def fit_in_scale(layer: Layer, factors: Factors) -> Factors:
    """The best b: (S2' L'L S2 o H_l) b = diag(S2' L' W H_l)."""
    left, right = factors.scaled_left * factors.rank_scale, factors.right
    system = product(product(right.T, product(left.T, left)), right) * layer.metric
    scale = _solved(system, (product(left.T, layer.correlation) * right).sum(dim=0))
    return replace(factors, right=factors.right * signs(scale), in_scale=scale.abs())


def search_right(layer: Layer, factors: Factors) -> Factors:
    """Signs of S2, column after column, each with what the changes of those before do to it: `Kernels.column_flips`
    with the metric L'L and the gradients L' E H_l."""
    left, columns = factors.scaled_left * factors.rank_scale, layer.metric.shape[0]
    metric = product(left.T, left)
    gradient = product(left.T, layer.correlation) - product(product(metric, factors.scaled_right), layer.metric)
    unit = metric.diagonal().mean()
    metric, products = metric.div_(unit), gradient.div_(unit).T.contiguous()
    found = factors.right.T.contiguous()
    for start in range(0, columns, _COLUMNS):
        block, later = slice(start, start + _COLUMNS), slice(start + _COLUMNS, columns)
        change = kernels.for_device(found.device).column_flips(
            products[block], metric, layer.metric[block, block].contiguous(), found[block], factors.in_scale[block]
        )
        if later.start < columns:
            products[later] -= product(layer.metric[later, block], change)
    return replace(factors, right=found.T.contiguous())


def _solved(system: Tensor, wanted: Tensor) -> Tensor:
    """Of a positive semidefinite system, in float64."""
    system = system.double()
    system.diagonal().add_(_RIDGE * system.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(system)
    if int(failed):
        raise NumericsError("the scales of the factors cannot be solved for; raise quantizer.regularization_lambda")
    return torch.cholesky_solve(wanted.double()[:, None], factor)[:, 0].float()
