"""The local search in one block of a K grid, compiled by numba. See `Kernels.k_flip_search`, and `cpu_flips` for names.

With y = a z - b 1, a = d sc and b = dmin mn, the objective is

    f = a^2 o - 2 a q - 2 a b w + b^2 u + 2 b p,    o = z R z, q = h z, w = z R 1, u = 1 R 1, p = h 1

For fixed a the best b is (a w - p) / u, and the best of both is a = (q u - p w) / (o u - w^2).
"""

from typing import Any

import numpy as np

from jointq_cli.kernels.compiled import compiled
from jointq_cli.kernels.cpu_flips import _descend_fixed, _diagonal_and_column_sums, _dots, _sum


@compiled
def _value(a: float, b: float, o: float, q: float, w: float, u: float, p: float) -> float:
    """f, in an order that is accurate near the minimum."""
    return a * (a * o - 2.0 * q - 2.0 * b * w) + b * (b * u + 2.0 * p)


@compiled
def _best_integers(
    sc: float, mn: float, d: float, dmin: float, o: float, q: float, w: float, u: float, p: float, limits: Any
) -> Any:
    """The best of the sc next to the least-squares solution, each with its best mn, and f there; the given ones if
    these are no worse."""
    _, _, least_scale, last_scale, last_min = limits
    best = _value(d * sc, dmin * mn, o, q, w, u, p)
    best_sc, best_mn = sc, mn
    if o <= 0:
        wanted = sc
    elif last_min > 0 and o * u - w * w > 1e-6 * o * u:
        wanted = (q * u - p * w) / (o * u - w * w) / d
    else:
        wanted = (q + dmin * mn * w) / o / d
    for candidate in (np.floor(wanted), np.floor(wanted) + 1.0, sc):
        trial = min(max(candidate, float(least_scale)), float(last_scale))
        if trial == 0.0:
            continue
        shift = mn
        if last_min > 0 and u > 0:
            shift = min(max(np.rint((d * trial * w - p) / u / dmin), 0.0), float(last_min))
        value = _value(d * trial, dmin * shift, o, q, w, u, p)
        if value < best:
            best, best_sc, best_mn = value, trial, shift
    return best_sc, best_mn, best


@compiled
def k_flip_search(
    correlation: Any, metric: Any, products: Any, levels: Any, scales: Any, mins: Any, d: Any, dmin: Any, limits: Any,
    tolerance: float, rounds: int, most: int, steps: Any, fall: Any, bits: Any,
) -> None:  # fmt: skip
    """See `Kernels.k_flip_search`. limits: a tuple of its fields; bits: scratch for c integers of a level's width."""
    kind = levels.dtype.type
    first, last = limits[0], limits[1]
    r, sums = _diagonal_and_column_sums(metric)
    u, trace = _sum(sums), _sum(r)
    gains = bits.view(levels.dtype)
    h, v_before, z_before = np.empty_like(r), np.empty_like(r), np.empty_like(r)
    no_bonus = np.full_like(r, -tolerance)
    for i in range(len(levels)):
        v, z = products[i], levels[i]
        unit, shift_unit = np.float64(d[i]), np.float64(dmin[i])
        sc, mn = np.float64(scales[i]), np.float64(mins[i])
        sc_before, mn_before = sc, mn
        z_before[:], v_before[:] = z, v
        p = _sum(correlation[i])
        steps[i] = 0
        for _ in range(rounds):
            a, b = unit * sc, shift_unit * mn
            sign = kind(1) if a > 0 else kind(-1)
            for j in range(len(h)):
                h[j] = sign * (correlation[i, j] + kind(b) * sums[j])
            box = (first, last, last - first)
            taken = _descend_fixed(h, v, z, metric, r, kind(abs(a)), box, most, no_bonus, gains, bits)
            steps[i] += taken
            q, o, _ = _dots(correlation[i], v, z, r)
            w = _sum(v)
            now = _value(a, b, o, q, w, u, p)
            new_sc, new_mn, value = _best_integers(sc, mn, unit, shift_unit, o, q, w, u, p, limits)
            if now - value <= tolerance * a * a * trace:
                break
            sc, mn = new_sc, new_mn
            steps[i] += 1
        fall[i] = _fall(
            correlation[i], v, z, sums, unit * sc, shift_unit * mn, v_before, z_before, unit * sc_before,
            shift_unit * mn_before,
        )  # fmt: skip
        if not fall[i] > 0:
            z[:], v[:] = z_before, v_before
            steps[i], fall[i] = 0, 0.0
        else:
            scales[i], mins[i] = kind(sc), kind(mn)


@compiled
def _fall(
    h: Any,
    v: Any,
    z: Any,
    sums: Any,
    a: float,
    b: float,
    v_before: Any,
    z_before: Any,
    a_before: float,
    b_before: float,
) -> float:
    """By how much f fell: with u = y - y_before, u (2 h - R y - R y_before), where R y = a v - b R 1."""
    fall = 0.0
    for j in range(len(h)):
        change = (a * z[j] - b) - (a_before * z_before[j] - b_before)
        reached = (a * v[j] - b * sums[j]) + (a_before * v_before[j] - b_before * sums[j])
        fall += change * (2.0 * h[j] - reached)
    return fall
