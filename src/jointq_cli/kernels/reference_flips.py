"""JointQ's coordinate descent over levels in plain torch: in each iteration, every row that still gains takes a step.

`reference` adds the rounding of scales and the guard. Decisions are exactly those of `cpu_flips`, where the formulas
are derived. Correlation h (rows, d), metric R (d, d), products v = z R and levels z (rows, d) have one dtype; v and z
are updated in place. Scalars of a row are float64.
"""

import torch
from torch import Tensor

from jointq_cli.kernels import CANCELLED, TOLERANCE, Box

f64 = torch.float64


class TorchSteps:
    """The loops over steps and over candidates; on a GPU `cuda.TritonSteps` replaces them."""

    @staticmethod
    def descend_profiled(h: Tensor, v: Tensor, z: Tensor, metric: Tensor, box: Box) -> tuple[Tensor, Tensor]:
        """Steps with the scale profiled out, until none gains.

        Returns the number of steps (rows,) int64, and the best scale (rows,) float64, 0 where there is none.
        """
        r, sums = metric.diagonal(), metric.sum(dim=0)
        total, trace = sums.sum(dtype=f64), r.sum(dtype=f64)
        q, o, e = dots(h, v, z, r)
        cancelled = CANCELLED * torch.finfo(z.dtype).eps
        inexact = (e > 0) & (o <= cancelled * e)
        # The best scale is 0, so all levels may be 0 as well, or have the other sign.
        unscalable = (o > 0) & (q <= 0) & ~inexact
        flip = -1.0 if box.fraction else 0.0
        for each in (v, z, q):
            each[unscalable] *= flip
        o[unscalable] *= abs(flip)
        h_sum, v_sum = h.sum(dim=1, dtype=f64), v.sum(dim=1, dtype=f64)
        taken = torch.zeros(len(h), dtype=torch.int64, device=h.device)
        rows = torch.nonzero(~inexact)[:, 0]
        for _ in range(box.most_steps(h.shape[1])):
            s = torch.where((o > 0) & (q > 0), q / o, 0.0)[rows]
            _, _, e = dots(h[rows], v[rows], z[rows], r)
            gains, signs = _profiled_gains(h[rows], v[rows], z[rows], r, s, o[rows], q[rows], e, box)
            best, j = gains.max(dim=1)
            best = best.to(f64)
            shift = torch.zeros_like(best)
            for sign in (1.0, -1.0):
                a, b = sign * h_sum[rows], sign * 2.0 * v_sum[rows] + total
                gain = _shift_gain(a, b, s, o[rows], q[rows], total, h.shape[1], cancelled * (e + trace))
                wins = (gain > best) & _fits(z[rows], sign, box)
                best, shift = torch.where(wins, gain, best), torch.where(wins, sign, shift)
            single = shift == 0
            step = torch.where(single, signs.gather(1, j[:, None])[:, 0].to(f64), 0.0)
            a = torch.where(single, step * h[rows, j], shift * h_sum[rows])
            b = torch.where(single, step * 2.0 * v[rows, j] + r[j], shift * 2.0 * v_sum[rows] + total)
            gain = (q[rows] + a).square() / (o[rows] + b) - s * q[rows]
            gaining = (best > 0) & (~single | (gain > TOLERANCE * s * s * r[j]))  # in float64 too
            rows, j, shift, step, a, b = (each[gaining] for each in (rows, j, shift, step, a, b))
            if not len(rows):
                break
            q[rows] += a
            o[rows] += b
            v_sum[rows] += step * sums[j] + shift * total
            z[rows] += shift[:, None].to(z.dtype)
            z[rows, j] += step.to(z.dtype)
            v[rows] += step[:, None].to(v.dtype) * metric[j] + shift[:, None].to(v.dtype) * sums
            taken[rows] += 1
        return taken, torch.where((o > 0) & (q > 0) & ~inexact, q / o, 0.0)

    @staticmethod
    def descend_fixed(h: Tensor, v: Tensor, z: Tensor, metric: Tensor, s: Tensor, box: Box) -> Tensor:
        """Steps at the fixed scale s (rows,) of the levels' dtype, until none gains. Returns their number (rows,)."""
        taken = torch.zeros(len(h), dtype=torch.int64, device=h.device)
        rows = torch.arange(len(h), device=h.device)
        bonus = torch.full_like(metric[0], -TOLERANCE)
        for _ in range(box.most_steps(h.shape[1])):
            rows = _fixed_step(h, v, z, metric, s, box, bonus, rows)
            if not len(rows):
                break
            taken[rows] += 1
        return taken

    @staticmethod
    def anneal_fixed(h: Tensor, v: Tensor, z: Tensor, metric: Tensor, s: Tensor, box: Box, bonus: Tensor) -> None:
        """For each row of bonus (steps, d) a step at the fixed scale s, if gain and bonus together are positive."""
        rows = torch.arange(len(h), device=h.device)
        for own in bonus:
            _fixed_step(h, v, z, metric, s, box, own, rows)

    @staticmethod
    def best_scale(values: Tensor, weights: Tensor, floor: Tensor, trials: Tensor, box: Box) -> Tensor:
        """Indices (rows,) of the scales in trials (rows, candidates) with the least weighted error; first of equals."""
        losses = torch.empty_like(trials)
        for k in range(trials.shape[1]):
            scale = trials[:, k]
            errors = values - nearest(values, scale, floor, box).mul_(scale[:, None])
            losses[:, k] = (weights * errors).mul_(errors).sum(dim=1)
        return losses.argmin(dim=1)


def nearest(values: Tensor, scale: Tensor, floor: Tensor, box: Box) -> Tensor:
    """Nearest levels (rows, d) in the window of span + 1 levels that begins at `floor` (rows,)."""
    low = floor[:, None]
    levels = torch.round((values * (1.0 / scale)[:, None]).sub_(box.fraction)).add_(box.fraction)
    return levels.clamp_(low, low + box.span)


def dots(h: Tensor, v: Tensor, z: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q = h z, o = v z and e = sum_j R_jj z_j^2 of each row, (rows,) float64."""
    wide = z.to(f64)
    return (h * wide).sum(dim=1), (v * wide).sum(dim=1), (r * wide * wide).sum(dim=1)


def _limits(z: Tensor, box: Box) -> tuple[Tensor, Tensor]:
    """The lowest and highest value that a level may take while all others stay, (rows, 1) each."""
    least, most = torch.aminmax(z, dim=1, keepdim=True)
    return (most - box.span).clamp_min_(box.first), (least + box.span).clamp_max_(box.last)


def _fits(z: Tensor, shift: float, box: Box) -> Tensor:
    least, most = torch.aminmax(z, dim=1)
    return (least + shift >= box.first) & (most + shift <= box.last)


def _profiled_gains(
    h: Tensor, v: Tensor, z: Tensor, r: Tensor, s: Tensor, o: Tensor, q: Tensor, e: Tensor, box: Box
) -> tuple[Tensor, Tensor]:
    """See `cpu_flips._profiled_gains`. Returns gains and signs of the steps, (rows, d) each."""
    low, high = _limits(z, box)
    s, o, q, e = (each[:, None].to(h.dtype) for each in (s, o, q, e))
    g = h - s * v
    signs = torch.where(g > 0, 1.0, -1.0).to(h.dtype)
    rest = o + 2.0 * signs * v + r
    gains = (o * s * (2.0 * g.abs() - s * r) + h * h) / rest - TOLERANCE * s * s * r
    allowed = (
        (z + signs >= low)
        & (z + signs <= high)
        & (q + signs * h > 0)
        & (rest > CANCELLED * torch.finfo(r.dtype).eps * (e + r))
    )
    return torch.where(allowed & (gains > 0), gains, 0.0), signs


def _shift_gain(
    a: Tensor, b: Tensor, s: Tensor, o: Tensor, q: Tensor, total: Tensor, columns: int, least: Tensor
) -> Tensor:
    """The gain of moving all levels by 1, which adds a to q and b to o; 0 where it is not allowed."""
    gain = (o * s * (2.0 * a - s * b) + a * a) / (o + b) - TOLERANCE * s * s * total / columns
    return torch.where((q + a > 0) & (o + b > least), gain, 0.0)


def _fixed_step(
    h: Tensor, v: Tensor, z: Tensor, metric: Tensor, s: Tensor, box: Box, bonus: Tensor, rows: Tensor
) -> Tensor:
    """Takes the step at the scale s with the largest gain plus bonus (d,). Returns those of `rows` that took one."""
    low, high = _limits(z[rows], box)
    scale, r = s[rows, None], metric.diagonal()
    g = h[rows] - scale * v[rows]
    signs = torch.where(g > 0, 1.0, -1.0).to(h.dtype)
    level = z[rows] + signs
    gains = 2.0 * g.abs() - scale * r + scale * r * bonus
    best, j = torch.where((level >= low) & (level <= high), gains, 0.0).max(dim=1)
    gaining = best > 0
    rows, j, signs = rows[gaining], j[gaining], signs[gaining]
    step = signs.gather(1, j[:, None])
    z[rows, j] += step[:, 0]
    v[rows] += step * metric[j]
    return rows
