"""JointQ's loops over the columns of one row and group as Triton programs, one program per row.

A program keeps its row's state in registers and loads a row of the metric, or of the noise, when a step needs it.
Decisions are those of `cpu_flips`, except where two gains agree in almost all digits: sums are added in another order,
and float32 division is less accurate. A row's result does not depend on other rows. Columns past the last are zeros,
which gain nothing. Triton comes with the CUDA builds of torch.
"""

# mypy: ignore-errors
# Triton compiles the source of a function; its only annotations say which arguments are compile-time constants.

import triton
import triton.language as tl

from jointq_cli.kernels import TOLERANCE

_TOLERANCE = tl.constexpr(TOLERANCE)


@triton.jit
def _extremes(z, inside):
    return tl.min(tl.where(inside, z, float("inf")), 0), tl.max(tl.where(inside, z, float("-inf")), 0)


@triton.jit
def _pick(values, index, j):
    return tl.sum(tl.where(index == j, values, 0.0), 0)


@triton.jit
def _shift_gain(a, b, s, o, q, total, least, d: tl.constexpr):
    """See `reference_flips._shift_gain`."""
    gain = (o * s * (2.0 * a - s * b) + a * a) / (o + b) - _TOLERANCE * s * s * total / d
    return tl.where((q + a > 0) & (o + b > least), gain, 0.0)


@triton.jit
def profiled(
    h_rows, v_rows, z_rows, metric, diagonal, sums_row, scale_rows, taken_rows,
    d: tl.constexpr, block: tl.constexpr,
    first: tl.constexpr, last: tl.constexpr, span: tl.constexpr, most: tl.constexpr,
    cancelled: tl.constexpr, flip: tl.constexpr,
):  # fmt: skip
    """See `TorchSteps.descend_profiled`. flip: factor of levels that no positive scale helps."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, block)
    inside = index < d
    here = row * d + index
    h = tl.load(h_rows + here, inside, 0.0)
    v = tl.load(v_rows + here, inside, 0.0)
    z = tl.load(z_rows + here, inside, 0.0)
    r = tl.load(diagonal + index, inside, 0.0)
    sums = tl.load(sums_row + index, inside, 0.0)
    q = tl.sum(h.to(tl.float64) * z.to(tl.float64), 0)
    o = tl.sum(v.to(tl.float64) * z.to(tl.float64), 0)
    e = tl.sum(r.to(tl.float64) * z * z, 0)
    going = (e == 0) | (o > cancelled * e)
    if going & (o > 0) & (q <= 0):  # the best scale is 0, so all levels may be 0 as well, or have the other sign
        z = z * flip
        v = v * flip
        q = q * flip
        o = o * flip * flip
        e = e * flip * flip
    usable = going
    h_sum = tl.sum(h.to(tl.float64), 0)
    v_sum = tl.sum(v.to(tl.float64), 0)
    total = tl.sum(sums.to(tl.float64), 0)
    trace = tl.sum(r.to(tl.float64), 0)
    taken = 0
    while going:
        s = tl.where((o > 0) & (q > 0), q / o, 0.0)
        zmin, zmax = _extremes(z, inside)
        low, high = tl.maximum(zmax - span, first), tl.minimum(zmin + span, last)
        ks, ko, kq, ke = s.to(h.dtype), o.to(h.dtype), q.to(h.dtype), e.to(h.dtype)
        g = h - ks * v
        signs = tl.where(g > 0, 1.0, -1.0).to(h.dtype)
        rest = ko + 2.0 * signs * v + r
        gains = (ko * ks * (2.0 * tl.abs(g) - ks * r) + h * h) / rest - _TOLERANCE * ks * ks * r
        allowed = (z + signs >= low) & (z + signs <= high) & (kq + signs * h > 0) & (rest > cancelled * (ke + r))
        largest, j = tl.max(tl.where(allowed & (gains > 0), gains, 0.0), 0, return_indices=True)
        least = cancelled * (e + trace)
        up = _shift_gain(h_sum, 2.0 * v_sum + total, s, o, q, total, least, d)
        up = tl.where((zmin + 1 >= first) & (zmax + 1 <= last), up, 0.0)
        down = _shift_gain(-h_sum, -2.0 * v_sum + total, s, o, q, total, least, d)
        down = tl.where((zmin - 1 >= first) & (zmax - 1 <= last), down, 0.0)
        best = tl.maximum(tl.maximum(largest.to(tl.float64), up), down)
        shift = tl.where(best == up, 1.0, -1.0).to(tl.float64)
        shift = tl.where(best > largest.to(tl.float64), shift, 0.0)
        sign = tl.where(shift == 0, _pick(signs, index, j), 0.0).to(h.dtype)
        step = sign.to(tl.float64)
        own = _pick(r, index, j)
        a = tl.where(shift == 0, step * _pick(h, index, j), shift * h_sum)
        b = tl.where(shift == 0, step * 2.0 * _pick(v, index, j) + own, shift * 2.0 * v_sum + total)
        gain = (q + a) * (q + a) / (o + b) - s * q
        going = (best > 0) & (taken < most) & ((shift != 0) | (gain > _TOLERANCE * s * s * own))  # in float64 too
        if going:
            taken += 1
            q += a
            o += b
            v_sum += step * _pick(sums, index, j) + shift * total
            z += tl.where(index == j, sign, 0.0) + tl.where(inside, shift, 0.0).to(z.dtype)
            row_j = tl.load(metric + j.to(tl.int64) * d + index, inside, 0.0)
            v += sign * row_j + shift.to(v.dtype) * sums
            e = tl.sum(r.to(tl.float64) * z * z, 0)
    tl.store(v_rows + here, v, inside)
    tl.store(z_rows + here, z, inside)
    tl.store(scale_rows + row, tl.where(usable & (o > 0) & (q > 0), q / o, 0.0))
    tl.store(taken_rows + row, taken)


@triton.jit
def fixed(
    h_rows, v_rows, z_rows, metric, diagonal, s_rows, bonus_rows, taken_rows, most,
    d: tl.constexpr, block: tl.constexpr, first: tl.constexpr, last: tl.constexpr, span: tl.constexpr,
    wanders: tl.constexpr,
):  # fmt: skip
    """See `TorchSteps.descend_fixed`; if `wanders`, `TorchSteps.anneal_fixed`, with a row of bonus for each step."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, block)
    inside = index < d
    here = row * d + index
    h = tl.load(h_rows + here, inside, 0.0)
    v = tl.load(v_rows + here, inside, 0.0)
    z = tl.load(z_rows + here, inside, 0.0)
    s = tl.load(s_rows + row)
    energy = s * tl.load(diagonal + index, inside, 0.0)
    tried = 0
    taken = 0
    going = tried < most
    while going:
        zmin, zmax = _extremes(z, inside)
        low, high = tl.maximum(zmax - span, first), tl.minimum(zmin + span, last)
        g = h - s * v
        signs = tl.where(g > 0, 1.0, -1.0).to(h.dtype)
        gains = 2.0 * tl.abs(g) - energy
        if wanders:
            gains += energy * tl.load(bonus_rows + tried * d + index, inside, 0.0)
        else:
            gains += energy * -_TOLERANCE
        allowed = (z + signs >= low) & (z + signs <= high)
        best, j = tl.max(tl.where(allowed & (gains > 0), gains, 0.0), 0, return_indices=True)
        if best > 0:
            taken += 1
            sign = _pick(signs, index, j)
            z += tl.where(index == j, sign, 0.0)
            v += sign * tl.load(metric + j.to(tl.int64) * d + index, inside, 0.0)
        tried += 1
        going = (tried < most) & ((best > 0) | wanders)
    tl.store(v_rows + here, v, inside)
    tl.store(z_rows + here, z, inside)
    tl.store(taken_rows + row, taken)


@triton.jit
def best_trial(
    values_rows, weights_row, floor_rows, trials_rows, best_rows,
    d: tl.constexpr, block: tl.constexpr, span: tl.constexpr, fraction: tl.constexpr, trials: tl.constexpr,
):  # fmt: skip
    """See `TorchSteps.best_scale`."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, block)
    values = tl.load(values_rows + row * d + index, index < d, 0.0)
    weights = tl.load(weights_row + index, index < d, 0.0)
    floor = tl.load(floor_rows + row)
    # Adding a number so large that no bit is left for fractions rounds to nearest, ties to even.
    magic = tl.where(values.dtype == tl.float32, 1.5 * 2.0**23, 1.5 * 2.0**52).to(values.dtype)
    least = tl.full((), float("inf"), values.dtype)
    best = 0
    for k in range(trials):
        scale = tl.load(trials_rows + row * trials + k)
        level = tl.minimum(tl.maximum(values * (1.0 / scale), floor), floor + span) - fraction
        error = values - scale * (level + magic - magic + fraction)
        loss = tl.sum(weights * error * error, 0)
        best = tl.where(loss < least, k, best)
        least = tl.minimum(loss, least)
    tl.store(best_rows + row, best)
