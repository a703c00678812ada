"""The local search in one block of a K grid in plain torch. `cpu_flips` has the formulas, and decides the same."""

import torch
from torch import Tensor

from jointq_cli.kernels import K_ROUNDS, TOLERANCE, KLimits
from jointq_cli.kernels.reference_flips import TorchSteps

f64 = torch.float64


def k_flip_search(
    steps: type[TorchSteps],
    correlation: Tensor,
    metric: Tensor,
    products: Tensor,
    levels: Tensor,
    scales: Tensor,
    mins: Tensor,
    d: Tensor,
    dmin: Tensor,
    limits: KLimits,
) -> tuple[Tensor, Tensor]:
    """See `Kernels.k_flip_search`. steps: what descends over the levels."""
    sums = metric.sum(dim=0)
    u, p, trace = sums.sum(dtype=f64), correlation.sum(dim=1, dtype=f64), metric.diagonal().sum(dtype=f64)
    unit, shift_unit = d.to(f64), dmin.to(f64)
    sc, mn = scales.to(f64), mins.to(f64)
    before = (levels.clone(), products.clone(), unit * sc, shift_unit * mn)
    taken = torch.zeros(len(levels), dtype=torch.int64, device=levels.device)
    rows = torch.arange(len(levels), device=levels.device)
    for _ in range(K_ROUNDS):
        a, b = unit[rows] * sc[rows], shift_unit[rows] * mn[rows]
        sign = torch.where(a > 0, 1.0, -1.0).to(levels.dtype)[:, None]
        h = sign * (correlation[rows] + b.to(levels.dtype)[:, None] * sums)
        v, z = products[rows], levels[rows]
        taken[rows] += steps.descend_fixed(h, v, z, metric, a.abs().to(levels.dtype), limits.box)
        products[rows], levels[rows] = v, z
        q = (correlation[rows].to(f64) * z.to(f64)).sum(dim=1)
        o, w = (v.to(f64) * z.to(f64)).sum(dim=1), v.sum(dim=1, dtype=f64)
        terms = (o, q, w, u, p[rows])
        new_sc, new_mn, value = _best_integers(sc[rows], mn[rows], unit[rows], shift_unit[rows], terms, limits)
        gaining = _value(a, b, *terms) - value > TOLERANCE * a * a * trace
        rows = rows[gaining]
        if not len(rows):
            break
        sc[rows], mn[rows] = new_sc[gaining], new_mn[gaining]
        taken[rows] += 1
    fall = _fall(correlation, products, levels, sums, unit * sc, shift_unit * mn, *before)
    kept = fall > 0
    levels.copy_(torch.where(kept[:, None], levels, before[0]))
    products.copy_(torch.where(kept[:, None], products, before[1]))
    scales.copy_(torch.where(kept, sc.to(scales.dtype), scales))
    mins.copy_(torch.where(kept, mn.to(mins.dtype), mins))
    return torch.where(kept, taken, 0), torch.where(kept, fall, 0.0)


def _value(a: Tensor, b: Tensor, o: Tensor, q: Tensor, w: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return a * (a * o - 2.0 * q - 2.0 * b * w) + b * (b * u + 2.0 * p)


def _best_integers(
    sc: Tensor, mn: Tensor, d: Tensor, dmin: Tensor, terms: tuple[Tensor, ...], limits: KLimits
) -> tuple[Tensor, Tensor, Tensor]:
    o, q, w, u, p = terms
    best, best_sc, best_mn = _value(d * sc, dmin * mn, *terms), sc, mn
    alone = (q + dmin * mn * w) / o / d
    determinant = o * u - w * w
    both = (q * u - p * w) / determinant / d
    wanted = torch.where(determinant > 1e-6 * o * u, both, alone) if limits.last_min else alone
    wanted = torch.where(o > 0, wanted, sc)
    for candidate in (torch.floor(wanted), torch.floor(wanted) + 1.0, sc):
        trial = candidate.clamp(limits.least_scale, limits.last_scale)
        shift = mn
        if limits.last_min:
            shift = torch.where(u > 0, torch.round((d * trial * w - p) / u / dmin).clamp(0, limits.last_min), mn)
        value = _value(d * trial, dmin * shift, *terms)
        wins = (value < best) & (trial != 0)
        best, best_sc, best_mn = (
            torch.where(wins, new, old) for new, old in ((value, best), (trial, best_sc), (shift, best_mn))
        )
    return best_sc, best_mn, best


def _fall(
    h: Tensor, v: Tensor, z: Tensor, sums: Tensor, a: Tensor, b: Tensor,
    z_before: Tensor, v_before: Tensor, a_before: Tensor, b_before: Tensor,
) -> Tensor:  # fmt: skip
    a, b, a_before, b_before = (each[:, None] for each in (a, b, a_before, b_before))
    change = (a * z - b) - (a_before * z_before - b_before)
    reached = (a * v - b * sums) + (a_before * v_before - b_before * sums)
    return (change * (2.0 * h - reached)).sum(dim=1)
