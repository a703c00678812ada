"""Laws of the grid: bits, groups, rounded scales, the stored form."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jointq_cli.errors import ConfigError, ModelError, NumericsError
from jointq_cli.formats.uniform import Grid, UniformWeight, check_group_size, group_columns
from jointq_cli.kernels import Rounding
from jointq_cli.quantization.quantizers.scale_fit import fit, round_scale, scale_rounding

GRIDS = [Grid(bits, symmetric) for bits in range(1, 9) for symmetric in (False, True)]
FRACTIONAL = [Grid(bits, False, zero) for bits in (1, 2, 3) for zero in ("half", "real")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(values: torch.Tensor, grid: Grid, mse: bool, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The values that the grid gives back for `values` (groups, columns)."""
    scale, zero_point = fit(values, grid, mse, dtype)
    zero = zero_point.float()[:, None]
    return (grid.nearest_codes(values, scale[:, None], zero).float() - zero) * scale[:, None]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_grid_has_two_to_the_bits_levels_and_the_integer_zero_among_them(grid: Grid) -> None:
    levels = range(grid.lowest, grid.highest + 1)
    assert len(levels) == 2**grid.bits
    assert 0 in levels
    assert torch.iinfo(grid.code_dtype).min <= grid.lowest
    assert torch.iinfo(grid.code_dtype).max >= grid.highest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize("grid", GRIDS + FRACTIONAL, ids=str)
def test_codes_are_nearest_for_the_rounded_scale(grid: Grid, mse: bool, dtype: torch.dtype) -> None:
    values = normal(5, 32)
    scale, zero_point = fit(values, grid, mse, dtype)
    assert torch.equal(scale, scale.to(dtype).float())
    codes = grid.nearest_codes(values, scale[:, None], zero_point.float()[:, None]).float()
    levels = torch.arange(grid.lowest, grid.highest + 1).float()
    values_of = (levels - zero_point.float()[:, None]) * scale[:, None]  # (groups, levels)
    nearest = (values[:, :, None] - values_of[:, None, :]).abs().amin(dim=2)
    mine = (values - (codes - zero_point.float()[:, None]) * scale[:, None]).abs()
    torch.testing.assert_close(mine, nearest, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grid", [grid for grid in GRIDS + FRACTIONAL if grid.bits > 1], ids=str)
def test_without_clipping_no_weight_moves_by_more_than_half_a_step(grid: Grid) -> None:
    values = normal(20, 64) + 0.3
    scale, _ = fit(values, grid, False, torch.float32)
    assert ((rounded(values, grid, False) - values).abs() <= 0.5001 * scale[:, None]).all()


@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize("grid", GRIDS + FRACTIONAL, ids=str)
@pytest.mark.parametrize(("dtype", "exponents"), [(torch.float32, (-100, 60)), (torch.bfloat16, (-23, 13))])
def test_weights_times_a_power_of_two_keep_their_codes(
    grid: Grid, mse: bool, dtype: torch.dtype, exponents: tuple[int, ...]
) -> None:
    values = normal(8, 32)
    scale, zero_point = fit(values, grid, mse, dtype)
    for exponent in exponents:
        other, other_zero = fit(values * 2.0**exponent, grid, mse, dtype)
        assert torch.equal(other, scale * 2.0**exponent)
        assert torch.equal(other_zero, zero_point)


@pytest.mark.parametrize("factor", [1e-7, 1e4])
@pytest.mark.parametrize("mse", [False, True])
def test_tiny_and_huge_layers_are_quantised_as_well_as_others(factor: float, mse: bool) -> None:
    grid, values = Grid(4, False), normal(16, 64)

    def error(weights: torch.Tensor) -> float:
        return float((rounded(weights, grid, mse, torch.bfloat16) - weights).norm() / weights.norm())

    assert error(values * factor) == pytest.approx(error(values), rel=0.02)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_group_of_zeros_stays_exactly_zero(grid: Grid, mse: bool, dtype: torch.dtype) -> None:
    values = torch.cat([torch.zeros(1, 16), normal(1, 16)])
    scale, _ = fit(values, grid, mse, dtype)
    assert scale[0] == 1.0
    assert (rounded(values, grid, mse, dtype)[0] == 0).all()


def test_one_asymmetric_bit_keeps_the_extremes_of_a_one_sided_group() -> None:
    values = torch.tensor([[0.0, 2.0, 2.0, 0.0]])
    assert torch.equal(rounded(values, Grid(1, False), False), values)


def test_one_symmetric_bit_keeps_the_negative_extreme() -> None:
    values = torch.tensor([[0.0, -2.0, -2.0, 0.0]])
    assert torch.equal(rounded(values, Grid(1, True), False), values)


def test_scales_below_float16_lose_nothing_that_float16_weights_could_hold() -> None:
    values = (normal(4, 32) * 40).round().clamp(-120, 120) * 2.0**-24  # subnormal in float16
    assert torch.equal(rounded(values, Grid(8, True), False, torch.float16), values)


@pytest.mark.parametrize("mse", [False, True])
def test_a_scale_too_large_for_float16_is_an_error_and_not_inf(mse: bool) -> None:
    with pytest.raises(NumericsError, match="does not fit in float16"):
        fit(normal(2, 8) * 1e7, Grid(4, False), mse, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_near_the_end_of_float32_are_an_error_or_finite(dtype: torch.dtype) -> None:
    assert rounded(normal(2, 8) * 1e-38, Grid(4, False), True, dtype).isfinite().all()
    with pytest.raises(NumericsError):
        fit(torch.tensor([[-3.3e38, 3.3e38]]), Grid(4, False), True, dtype)


def test_group_sizes_that_do_not_divide_name_layers_and_what_would_divide() -> None:
    with pytest.raises(ConfigError) as caught:
        check_group_size(128, {"a.q_proj": 576, "a.down_proj": 1536, "b.q_proj": 576})
    message = str(caught.value)
    assert message.startswith("quantizer.group_size=128: must divide in_features")
    assert "a.q_proj (576)" in message
    assert "b.q_proj (576)" in message
    assert "down_proj" not in message
    assert ", 32, 48, 64, 96, 192;" in message


def test_of_many_layers_the_first_are_named() -> None:
    with pytest.raises(ConfigError, match=r"for 0 \(576\), 1 \(576\), 2 \(576\) and 297 more; sizes"):
        check_group_size(128, {str(number): 576 for number in range(300)})


@pytest.mark.parametrize("group_size", [0, -2])
def test_a_group_size_that_is_not_positive_is_refused(group_size: int) -> None:
    with pytest.raises(ConfigError, match=f"quantizer.group_size={group_size}: must be positive"):
        check_group_size(group_size, {})


@pytest.mark.parametrize("group_size", [None, -1])
def test_null_and_minus_one_mean_one_scale_per_row(group_size: int | None) -> None:
    check_group_size(group_size, {"a": 7})
    assert group_columns(group_size, 7) == 7


def stored(
    bits: int, symmetric: bool, permuted: bool, dtype: torch.dtype = torch.bfloat16, zero: str = "integer"
) -> UniformWeight:
    grid, generator = Grid(bits, symmetric, zero), torch.Generator().manual_seed(bits)
    shape = (6, 16)
    codes = torch.randint(grid.lowest, grid.highest + 1, shape, generator=generator).to(grid.code_dtype)
    zeros = torch.randint(0, 1 if symmetric else grid.highest + 1, (6, 4), generator=generator)
    return UniformWeight(
        codes=codes,
        scale=torch.rand(6, 4, generator=generator).to(dtype),
        zero_point=grid.stored_zero_point(zeros + 0.3 if zero == "real" else zeros, dtype),
        permutation=torch.randperm(16, generator=generator).to(torch.int32) if permuted else None,
        bits=bits,
        symmetric=symmetric,
    )


CASES = [(*case, "integer") for case in itertools.product([1, 4, 8], [False, True], [False, True])]
CASES += [(2, False, True, "half"), (2, False, True, "real")]


@pytest.mark.parametrize(("bits", "symmetric", "permuted", "zero"), CASES)
def test_dequantised_values_are_what_the_codes_say(bits: int, symmetric: bool, permuted: bool, zero: str) -> None:
    weight = stored(bits, symmetric, permuted, zero=zero)
    order = list(range(16)) if weight.permutation is None else weight.permutation.tolist()
    dense = weight.dequantize(torch.float32)
    for row, place in itertools.product(range(6), range(16)):
        column, group = order[place], place // weight.group_size
        offset = ((1 << bits) - 1) / 2 if weight.zero_point is None else float(weight.zero_point[row, group])
        steps = int(weight.codes[row, column]) - offset
        assert float(dense[row, column]) == steps * float(weight.scale[row, group])
    assert weight.dequantize(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(("bits", "symmetric", "permuted", "zero"), CASES)
def test_tensors_bring_the_same_weight_back(bits: int, symmetric: bool, permuted: bool, zero: str) -> None:
    weight = stored(bits, symmetric, permuted, zero=zero)
    assert ("zero_point" in weight.to_tensors()) == (zero != "half")
    back = UniformWeight.from_tensors(weight.to_tensors())
    assert (back.bits, back.symmetric, back.grid) == (bits, symmetric, Grid(bits, symmetric, zero))
    both = UniformWeight.joined([back, back.take_rows(torch.arange(6).flip(0))])
    assert torch.equal(both.dequantize(torch.float32)[6:].flip(0), weight.dequantize(torch.float32))
    assert torch.equal(back.dequantize(torch.float32), weight.dequantize(torch.float32))
    assert all(torch.equal(back.to_tensors()[name], tensor) for name, tensor in weight.to_tensors().items())


@pytest.mark.parametrize(("name", "zero"), [("scale", "half"), ("zero_point", "integer"), ("zero_point", "real")])
def test_tensors_without_one_are_refused_by_its_name(name: str, zero: str) -> None:
    tensors = stored(4, False, False, zero=zero).to_tensors()
    del tensors[name]
    with pytest.raises(ModelError, match=name):
        UniformWeight.from_tensors(tensors)


def test_bits_per_weight_counts_codes_scales_zero_points_and_the_permutation() -> None:
    assert stored(4, True, False).bits_per_weight == 4 + 16 / 4
    assert stored(4, False, False).bits_per_weight == 4 + (16 + 4) / 4
    assert stored(3, False, True, torch.float32).bits_per_weight == 3 + (32 + 3) / 4 + 32 / 6
    assert stored(2, False, False, zero="half").bits_per_weight == 2 + 16 / 4
    assert stored(2, False, False, zero="real").bits_per_weight == 2 + (16 + 16) / 4


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=12),
    bits=st.integers(1, 8),
    kind=st.sampled_from([(False, "integer"), (True, "integer"), (False, "half"), (False, "real")]),
    mse=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@example(values=[0.0], bits=1, kind=(False, "half"), mse=False, dtype=torch.float32)
def test_any_finite_group_gets_a_usable_grid(
    values: list[float], bits: int, kind: tuple[bool, str], mse: bool, dtype: torch.dtype
) -> None:
    grid, group = Grid(bits, *kind), torch.tensor([values], dtype=torch.float32)
    scale, zero_point = fit(group, grid, mse, dtype)
    assert scale.isfinite().all()
    assert (scale > 0).all()
    assert zero_point.abs().max() <= (2**15 if grid.zero == "real" else max(0, grid.highest))
    # Half-integer levels have no zero: half of the least scale stands for it.
    least = torch.finfo(dtype).tiny if grid.zero == "half" else 0.0
    assert rounded(group, grid, mse, dtype).abs().max() <= 2.02 * group.abs().max() + least


# --- what kernels receive of the grid


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid.bits <= 3], ids=str)
def test_the_box_holds_the_levels_of_every_zero_point_and_no_others(grid: Grid) -> None:
    zero_points = [0] if grid.symmetric else range(grid.highest + 1)
    codes = range(grid.lowest, grid.highest + 1)
    reachable = {frozenset((one - zero, other - zero)) for zero in zero_points for one in codes for other in codes}
    box, around = grid.box, range(-2 << grid.bits, 2 << grid.bits)
    inside = {
        frozenset((one, other))
        for one, other in itertools.product(around, around)
        if box.first <= min(one, other) and max(one, other) <= box.last and abs(one - other) <= box.span
    }
    assert inside == reachable


def rounded_by(rounding: Rounding, value: float) -> float:
    """The contract of `Rounding` in exact arithmetic."""
    exponent = max(math.frexp(value)[1] - 1, rounding.min_exponent)
    step = Fraction(2) ** (exponent - rounding.digits)
    return max(float(round(Fraction(value) / step) * step), rounding.least)


@settings(max_examples=300, deadline=None)
@given(
    mantissa=st.floats(0.5, 1.0, exclude_max=True, width=32),
    exponent=st.integers(-140, 14),
    dtype=st.sampled_from(DTYPES),
    shift=st.integers(-30, 30),
)
def test_kernels_round_scales_as_they_will_be_stored(
    mantissa: float, exponent: int, dtype: torch.dtype, shift: int
) -> None:
    """Of a layer that is divided by 2^shift, too."""
    scale = torch.tensor(math.ldexp(mantissa, exponent))
    stored = round_scale(scale, dtype).item()
    assert rounded_by(scale_rounding(dtype), scale.item()) == stored
    shifted = rounded_by(scale_rounding(dtype, shift), math.ldexp(scale.item(), -shift))
    assert math.ldexp(shifted, shift) == stored


def test_a_dtype_that_no_kernel_knows_is_an_error_with_a_list_of_the_others() -> None:
    with pytest.raises(ConfigError, match=r"torch.float64: scales can be stored as torch.bfloat16, torch.float16"):
        scale_rounding(torch.float64)
