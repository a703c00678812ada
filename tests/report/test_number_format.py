"""Numbers as text."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jointq_cli.report.number_format import (
    byte_size,
    duration,
    percent,
    plus_minus,
    relative_change,
    scientific,
    shortened,
    significant,
)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (12.3123, 0.2134, "12.31 ± 0.21"),
        (0.05127, 0.00112, "0.0513 ± 0.0011"),
        (1234.5, 23.4, "1234 ± 23"),
        (12.3123, 0.0, "12.31"),
        (12.3123, math.nan, "12.31"),
        (math.nan, 0.1, "nan"),
        (3.2e8, 1e6, "3.200e+08 ± 1.0e+06"),
    ],
)
def test_a_value_has_the_digits_its_standard_error_leaves(value, error, text):
    assert plus_minus(value, error) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.424, "0.42 s"),
        (12.34, "12.3 s"),
        (99.97, "1 min 40 s"),
        (200, "3 min 20 s"),
        (3599.6, "1 h 00 min"),
        (7505, "2 h 05 min"),
    ],
)
def test_durations_are_written_in_the_units_of_a_clock(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.001234, "1.23e-3"), (0.0, "0"), (1.5, "1.50e0"), (1e-12, "1.00e-12"), (math.nan, "nan")],
)
def test_a_relative_error_has_three_digits_and_a_power_of_ten(value, text):
    assert scientific(value) == text


@pytest.mark.parametrize(
    ("ratio", "text"), [(0.0542, "+5.4 %"), (-0.0012, "-0.12 %"), (2341.0, "+234100 %"), (0.0, "+0.00 %")]
)
def test_a_change_has_its_sign(ratio, text):
    assert relative_change(ratio) == text


def test_an_agreement_that_is_almost_perfect_is_not_rounded_to_perfect():
    assert percent(0.99994) == "99.99 %"
    assert percent(0.999999) != "100 %"
    assert percent(1.0) == "100 %"


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (114_000_000, "114 MB"), (2_471_645_608, "2.47 GB"), (0, "0 B")]
)
def test_sizes_are_decimal(count, text):
    assert byte_size(count) == text


@given(st.floats(min_value=1e-6, max_value=1e8), st.integers(min_value=1, max_value=6))
def test_significant_digits_are_true_to_the_value(value, digits):
    assert float(significant(value, digits)) == pytest.approx(value, rel=0.5 * 10 ** (1 - digits) * 1.001)


@given(st.text(alphabet="ab.", max_size=60), st.integers(min_value=2, max_value=40))
def test_a_shortened_name_fits_and_ends_as_the_name_does(name, width):
    short = shortened(name, width)
    assert len(short) <= width
    assert name.endswith(short.removeprefix("…"))
