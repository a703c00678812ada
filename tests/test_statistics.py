"""Hessians: X^T X / tokens, however the tokens arrive."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jointq_cli.statistics import PANEL, Hessian, output_error, weight_error

CPU = torch.device("cpu")


@pytest.mark.parametrize("width", [1, 7, PANEL, PANEL + 1, 2 * PANEL + 3])
def test_the_hessian_is_the_mean_outer_product(width: int) -> None:
    inputs = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(0))
    hessian = Hessian(width, CPU)
    hessian.add(inputs[:1])
    hessian.add(inputs[1:])
    flat = inputs.reshape(-1, width).double()
    found = hessian.finish()
    torch.testing.assert_close(found, flat.T @ flat / 15, rtol=1e-5, atol=1e-6)
    assert torch.equal(found, found.T)


@given(st.integers(1, 4), st.integers(1, 6))
def test_errors_are_traces(out_features: int, in_features: int) -> None:
    generator = torch.Generator().manual_seed(out_features * 10 + in_features)
    weight, found = torch.randn(2, out_features, in_features, generator=generator)
    x = torch.randn(9, in_features, generator=generator).double()
    error = (weight - found).double()
    expected = (x @ error.T).square().sum() / (x @ weight.double().T).square().sum()
    assert output_error(weight, found, x.T @ x) == pytest.approx(expected.item(), rel=1e-4)
    assert weight_error(weight, found) == pytest.approx((error.square().sum() / weight.double().square().sum()).item())


def test_a_layer_of_zeros_has_no_error() -> None:
    zeros = torch.zeros(2, 3)
    assert output_error(zeros, zeros, torch.eye(3, dtype=torch.float64)) == 0.0
    assert weight_error(zeros, zeros) == 0.0


def test_a_broken_hessian_is_no_perfect_layer() -> None:
    ones = torch.ones(2, 3)
    assert math.isnan(output_error(ones, ones / 2, torch.full((3, 3), math.nan, dtype=torch.float64)))


def test_no_token_is_no_division_by_zero() -> None:
    assert torch.equal(Hessian(3, CPU).finish(), torch.zeros(3, 3, dtype=torch.float64))
