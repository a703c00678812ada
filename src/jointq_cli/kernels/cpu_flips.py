"""JointQ's loops over one row and group, compiled by numba; `cpu` distributes the rows over threads.

A row has correlation h (d,), products v = z R (d,), levels z (d,) and scale s; the metric R (d, d) is shared, r is its
diagonal. q = h z, o = z R z and e = sum_j R_jj z_j^2 are float64. The objective is f(s, z) = s^2 o - 2 s q, and with
the best scale for given levels, s = q / o, it is f = -q^2 / o (the scale is "profiled out"). A step z_j += sign changes
q by a = sign h_j and o by b = 2 sign v_j + R_jj.

Arrays have one floating type, float32 or float64, and every constant takes it: a float64 constant would turn a
vectorised float32 loop into a slow one. Loops over columns vectorise without reordering any sum: first all gains, then
their maximum (which vectorises for integers only), then its index. `tolerances` is (TOLERANCE, CANCELLED times the
machine epsilon): an argument, as numba's cache does not notice when a constant of another module changes; nor does it
notice another function, so that all which call each other are here.

In a block of a K grid, levels z represent y = a z - b 1, with a = d sc and b = dmin mn. The objective is

    f = a^2 o - 2 a q - 2 a b w + b^2 u + 2 b p,    o = z R z, q = h z, w = z R 1, u = 1 R 1, p = h 1

For fixed a the best b is (a w - p) / u, and the best of both is a = (q u - p w) / (o u - w^2).
"""

import math
from typing import Any

import numpy as np

from jointq_cli.kernels.compiled import compiled


@compiled
def rounded(scale: float, rounding: Any) -> Any:
    """`scale` > 0 rounded to the format in which it is stored: to nearest, ties to even, never 0."""
    digits, min_exponent, least = rounding
    step = math.ldexp(1.0, max(math.frexp(scale)[1] - 1, min_exponent) - digits)
    return max(np.rint(scale / step) * step, least)


@compiled
def _profiled_gains(
    h: Any, v: Any, z: Any, r: Any, s: Any, o: Any, q: Any, e: Any, low: Any, high: Any, tolerances: Any, gains: Any
) -> None:
    """Writes the gains of the steps z_j +- 1 with the scale profiled out, less the tolerance; 0 if not positive.

    The gain is (q + a)^2 / (o + b) - q^2 / o, a difference of nearly equal numbers. Over the common denominator, with
    q = s o, its numerator is 2 s o a + a^2 - s^2 o b = o s (2 a - s b) + a^2; with the residual g = h - s v and
    sign = sign of g_j, 2 a - s b = 2 |g_j| - s R_jj and a^2 = h_j^2: (o s (2 |g_j| - s R_jj) + h_j^2) / (o + b).
    """
    one, two, none = r.dtype.type(1), r.dtype.type(2), r.dtype.type(0)
    tolerance, cancelled = r.dtype.type(tolerances[0]), r.dtype.type(tolerances[1])
    energy = o * s
    slack = tolerance * s * s
    for j in range(len(h)):
        g = h[j] - s * v[j]
        sign = one if g > none else -one
        level = z[j] + sign
        rest = o + two * sign * v[j] + r[j]
        gain = (energy * (two * abs(g) - s * r[j]) + h[j] * h[j]) / rest - slack * r[j]
        allowed = (level >= low) & (level <= high) & (q + sign * h[j] > none) & (rest > cancelled * (e + r[j]))
        gains[j] = gain if allowed & (gain > none) else none


@compiled
def _fixed_gains(h: Any, v: Any, z: Any, r: Any, s: Any, low: Any, high: Any, bonus: Any, gains: Any) -> None:
    """Writes the gains at the fixed scale s, in units of s, plus s R_jj times a bonus; 0 where that is not positive.

    f falls by 2 s a - s^2 b, which is s (2 |g_j| - s R_jj).
    """
    one, two, none = r.dtype.type(1), r.dtype.type(2), r.dtype.type(0)
    for j in range(len(h)):
        g = h[j] - s * v[j]
        level = z[j] + (one if g > none else -one)
        gain = two * abs(g) - s * r[j] + s * r[j] * bonus[j]
        gains[j] = gain if (level >= low) & (level <= high) & (gain > none) else none


@compiled
def _first_largest(gains: Any, bits: Any) -> int:
    """The index of the largest gain, the first of equals.

    `bits` views `gains` as integers: floats that are not negative have the same order as their bits.
    """
    largest = bits[0]
    for j in range(len(bits)):
        largest = max(largest, bits[j])
    place = len(bits)
    for j in range(len(bits)):
        place = min(place, j if bits[j] == largest else len(bits))
    return place


@compiled
def _extremes(z: Any) -> Any:
    kind = z.dtype.type
    low = high = np.int32(z[0])  # half-integers lose their halves, which changes no comparison with first and last
    for j in range(len(z)):
        low = min(low, np.int32(z[j]))
        high = max(high, np.int32(z[j]))
    return kind(low), kind(high)


@compiled
def _sign(h: Any, v: Any, s: Any, j: int) -> Any:
    """The direction in which a step of z_j lowers f."""
    one = v.dtype.type(1)
    return one if h[j] - s * v[j] > v.dtype.type(0) else -one


@compiled
def _step(v: Any, z: Any, row: Any, j: int, sign: Any) -> None:
    z[j] += sign
    for k in range(len(v)):
        v[k] += sign * row[k]


@compiled
def _dots(h: Any, v: Any, z: Any, r: Any) -> Any:
    """q = h z, o = v z and e = sum_j R_jj z_j^2, in float64."""
    q = o = e = 0.0
    for j in range(len(h)):
        q += np.float64(h[j]) * np.float64(z[j])
        o += np.float64(v[j]) * np.float64(z[j])
        e += np.float64(r[j]) * np.float64(z[j]) * np.float64(z[j])
    return q, o, e


@compiled
def _sum(values: Any) -> float:
    total = 0.0
    for j in range(len(values)):
        total += values[j]
    return total


@compiled
def _descend_profiled(
    h: Any, v: Any, z: Any, metric: Any, r: Any, sums: Any, box: Any, tolerances: Any, most: int, gains: Any, bits: Any
) -> Any:
    """Steps with the scale profiled out, until none gains. Returns their number, and the best scale or 0 for none."""
    kind = v.dtype.type
    first, last, span = kind(box[0]), kind(box[1]), kind(box[2])
    tolerance, cancelled = tolerances
    q, o, e = _dots(h, v, z, r)
    if e > 0 and o <= cancelled * e:
        return 0, 0.0
    if o > 0 and q <= 0:  # the best scale is 0, so all levels may be 0 as well, or have the other sign
        flip = kind(0) if first == np.rint(first) else -kind(1)
        for k in range(len(z)):
            z[k] *= flip
            v[k] *= flip
        q *= flip
        o *= abs(flip)
        e *= abs(flip)
    h_sum, v_sum, total, trace = _sum(h), _sum(v), _sum(sums), _sum(r)
    for taken in range(most):
        s = q / o if o > 0 and q > 0 else 0.0
        zmin, zmax = _extremes(z)
        low, high = max(first, zmax - span), min(last, zmin + span)
        _profiled_gains(h, v, z, r, kind(s), kind(o), kind(q), kind(e), low, high, tolerances, gains)
        j = _first_largest(gains, bits)
        best = np.float64(gains[j])
        shift = 0
        for sign in (1, -1):
            a, b = sign * h_sum, sign * 2.0 * v_sum + total
            if first <= zmin + sign and zmax + sign <= last and q + a > 0 and o + b > cancelled * (e + trace):
                gain = (o * s * (2.0 * a - s * b) + a * a) / (o + b) - tolerance * s * s * total / len(h)
                if gain > best:
                    best, shift = gain, sign
        if best <= 0:
            return taken, s
        if shift != 0:
            for k in range(len(v)):
                z[k] += kind(shift)
                v[k] += kind(shift) * sums[k]
            q += shift * h_sum
            o += shift * 2.0 * v_sum + total
            v_sum += shift * total
            e = _dots(h, v, z, r)[2]
        else:
            sign_j = _sign(h, v, kind(s), j)
            step = np.float64(sign_j)
            a, b = step * h[j], step * 2.0 * v[j] + r[j]
            if (q + a) * (q + a) / (o + b) - s * q <= tolerance * s * s * r[j]:
                return taken, s  # no gain in float64
            q += a
            o += b
            v_sum += step * sums[j]
            e += (step * 2.0 * z[j] + 1.0) * r[j]
            _step(v, z, metric[j], j, sign_j)
    return most, q / o if o > 0 and q > 0 else 0.0


@compiled
def _descend_fixed(
    h: Any, v: Any, z: Any, metric: Any, r: Any, s: Any, box: Any, most: int, bonus: Any, gains: Any, bits: Any
) -> int:
    """Steps at the fixed scale s, until none gains. Returns their number."""
    kind = v.dtype.type
    first, last, span = kind(box[0]), kind(box[1]), kind(box[2])
    for taken in range(most):
        zmin, zmax = _extremes(z)
        _fixed_gains(h, v, z, r, s, max(first, zmax - span), min(last, zmin + span), bonus, gains)
        j = _first_largest(gains, bits)
        if gains[j] <= 0:
            return taken
        _step(v, z, metric[j], j, _sign(h, v, s, j))
    return most


@compiled
def _fall(h: Any, v: Any, z: Any, s: float, v_before: Any, z_before: Any, s_before: float) -> float:
    """By how much f fell.

    With y = s z, f = y R y - 2 h y. The two f agree in many digits, so the fall is computed from u = y - y_before:
    f_before - f = u (2 h - R y - R y_before), where R y = s v. If nothing changed, it is 0 whatever the rounding of v.
    """
    fall = 0.0
    for j in range(len(h)):
        change = s * z[j] - s_before * z_before[j]
        fall += change * (2.0 * h[j] - s * v[j] - s_before * v_before[j])
    return fall


@compiled
def _diagonal_and_column_sums(metric: Any) -> Any:
    diagonal = np.empty(len(metric), metric.dtype)
    sums = np.zeros(len(metric), metric.dtype)
    for j in range(len(metric)):
        diagonal[j] = metric[j, j]
        for k in range(len(metric)):
            sums[k] += metric[j, k]
    return diagonal, sums


@compiled
def flip_search(
    correlation: Any, metric: Any, products: Any, levels: Any, scale: Any, box: Any, rounding: Any, tolerances: Any,
    most: int, guarded: bool, steps: Any, fall: Any, bits: Any,
) -> None:  # fmt: skip
    """See `Kernels.flip_search`. box and rounding: tuples of their fields; bits: scratch for d integers of a level's
    width."""
    kind = levels.dtype.type
    r, sums = _diagonal_and_column_sums(metric)
    gains = bits.view(levels.dtype)
    z_before, v_before = np.empty_like(r), np.empty_like(r)
    no_bonus = np.full_like(r, -tolerances[0])
    for i in range(len(levels)):
        h, v, z, s_before = correlation[i], products[i], levels[i], np.float64(scale[i])
        z_before[:], v_before[:] = z, v
        taken, best = _descend_profiled(h, v, z, metric, r, sums, box, tolerances, most, gains, bits)
        s = kind(rounded(best, rounding)) if best > 0 else scale[i]
        taken += _descend_fixed(h, v, z, metric, r, s, box, most, no_bonus, gains, bits)
        fall[i] = _fall(h, v, z, np.float64(s), v_before, z_before, s_before)
        steps[i] = max(taken, 1) if fall[i] != 0 else 0
        if guarded and not fall[i] > 0:
            z[:] = z_before
            steps[i], fall[i] = 0, 0.0
        else:
            scale[i] = s


@compiled
def anneal(
    correlation: Any, metric: Any, products: Any, levels: Any, scale: Any, box: Any, rounding: Any, tolerances: Any,
    bonus: Any, bits: Any,
) -> None:  # fmt: skip
    """See `Kernels.anneal`. bonus: noise times temperature; bits: as in `flip_search`."""
    kind = levels.dtype.type
    first, last, span = kind(box[0]), kind(box[1]), kind(box[2])
    r, _ = _diagonal_and_column_sums(metric)
    gains = bits.view(levels.dtype)
    for i in range(len(levels)):
        h, v, z, s = correlation[i], products[i], levels[i], scale[i]
        for k in range(len(bonus)):
            zmin, zmax = _extremes(z)
            _fixed_gains(h, v, z, r, s, max(first, zmax - span), min(last, zmin + span), bonus[k], gains)
            j = _first_largest(gains, bits)
            if gains[j] > 0:
                _step(v, z, metric[j], j, _sign(h, v, s, j))
        q, o, e = _dots(h, v, z, r)
        if o > tolerances[1] * e and q > 0:
            scale[i] = kind(rounded(q / o, rounding))


@compiled
def weighted_clip(
    values: Any, weights: Any, low: Any, widest: Any, levels: Any, scale: Any, box: Any, candidates: int
) -> None:
    """See `Kernels.weighted_clip`. The innermost loop is over candidates, whose independent sums vectorise."""
    rows, d = values.shape
    kind = values.dtype.type
    loss = np.empty(candidates, values.dtype)
    trial, inverse = np.empty_like(loss), np.empty_like(loss)
    span = kind(box[2])
    fraction = kind(box[0] - np.floor(box[0]))
    for i in range(rows):
        floor = min(max(np.rint(low[i] / widest[i]), kind(box[0])), kind(box[1] - box[2]))
        for k in range(candidates):
            loss[k] = kind(0)
            trial[k] = widest[i] * kind(1.0 - 0.8 * k / candidates)
            inverse[k] = kind(1) / trial[k]
        for j in range(d):
            value, weight = values[i, j], weights[j]
            for k in range(candidates):
                level = np.rint(value * inverse[k] - fraction) + fraction
                error = value - trial[k] * min(max(level, floor), floor + span)
                loss[k] += weight * error * error
        best = 0
        for k in range(1, candidates):
            if loss[k] < loss[best]:
                best = k
        scale[i] = trial[best]
        for j in range(d):
            level = np.rint(values[i, j] * inverse[best] - fraction) + fraction
            levels[i, j] = min(max(level, floor), floor + span)


@compiled
def _k_value(a: float, b: float, o: float, q: float, w: float, u: float, p: float) -> float:
    """f, in an order that is accurate near the minimum."""
    return a * (a * o - 2.0 * q - 2.0 * b * w) + b * (b * u + 2.0 * p)


@compiled
def _best_integers(
    sc: float, mn: float, d: float, dmin: float, o: float, q: float, w: float, u: float, p: float, limits: Any
) -> Any:
    """The best of the sc next to the least-squares solution, each with its best mn, and f there; the given ones if
    these are no worse."""
    _, _, least_scale, last_scale, last_min = limits
    best = _k_value(d * sc, dmin * mn, o, q, w, u, p)
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
        value = _k_value(d * trial, dmin * shift, o, q, w, u, p)
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
            now = _k_value(a, b, o, q, w, u, p)
            new_sc, new_mn, value = _best_integers(sc, mn, unit, shift_unit, o, q, w, u, p, limits)
            if now - value <= tolerance * a * a * trace:
                break
            sc, mn = new_sc, new_mn
            steps[i] += 1
        fall[i] = _k_fall(
            correlation[i], v, z, sums, unit * sc, shift_unit * mn, v_before, z_before, unit * sc_before,
            shift_unit * mn_before,
        )  # fmt: skip
        if not fall[i] > 0:
            z[:], v[:] = z_before, v_before
            steps[i], fall[i] = 0, 0.0
        else:
            scales[i], mins[i] = kind(sc), kind(mn)


@compiled
def _k_fall(
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
