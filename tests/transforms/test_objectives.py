"""Objectives by their definitions, by the values that theory gives, and by which of them follow the grid."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jointq_cli.transforms.activation_samples import rms_normalize
from jointq_cli.transforms.learning import relative_error
from jointq_cli.transforms.objectives import OBJECTIVES, l8, range2, whip

CHANNELS = 64


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return (2 * torch.rand(*shape, generator=seeded(seed), dtype=torch.float64) - 1) * math.sqrt(3)


def laplace(*shape: int, seed: int = 0) -> Tensor:
    u = torch.rand(*shape, generator=seeded(seed), dtype=torch.float64) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs()) / math.sqrt(2)


def two_point(*shape: int, seed: int = 0) -> Tensor:
    return gaussian(*shape, seed=seed).sign()


# E exp(-|x|) at unit rms: exp(1/2) erfc(1/sqrt 2), (1 - exp(-sqrt 3)) / sqrt 3, 1 / (1 + 1/sqrt 2), 1 / e.
CONSTANTS = [(gaussian, 0.52316), (uniform, 0.47521), (laplace, 0.58579), (two_point, 0.36788)]


@pytest.mark.parametrize(("distribution", "constant"), CONSTANTS)
def test_whip_has_its_constant_for_each_distribution(distribution: Callable[..., Tensor], constant: float) -> None:
    rows = distribution(20_000, CHANNELS)
    error = 6 * 0.5 / math.sqrt(rows.numel())  # no value of exp(-|x|) is further than 1/2 from the middle of all
    assert whip(rows).item() / CHANNELS == pytest.approx(constant, abs=error + 1e-5)


# --- by hand

ROWS = torch.tensor([[1.0, -1.0, 0.0], [2.0, 0.0, -3.0]], dtype=torch.float64)
BY_HAND = {
    "whip": ((2 / math.e + 1) + (math.exp(-2) + 1 + math.exp(-3))) / 2,
    "l8": (2**0.25 + (2**8 + 3**8) ** 0.25) / 2,
    "range2": (2**2 + 5**2) / 2,
}


def test_tiny_rows_have_the_values_of_the_formulas() -> None:
    assert {name: objective(ROWS).item() for name, objective in OBJECTIVES.items()} == pytest.approx(BY_HAND)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_those_of_the_values(name: str) -> None:
    """At rows without zeros and without ties, where all of them are smooth."""
    rows = gaussian(4, 7).requires_grad_()
    assert rows.detach().abs().min() > 1e-3
    assert torch.autograd.gradcheck(OBJECTIVES[name], [rows], eps=1e-7)


# --- properties

rows_of_rms_1 = st.integers(0, 10_000).map(lambda seed: rms_normalize(gaussian(3, 16, seed=seed).pow(3)).double())


@given(rows=rows_of_rms_1)
@settings(max_examples=50, deadline=None)
def test_no_row_of_rms_1_has_less_whip_than_the_two_point_one(rows: Tensor) -> None:
    """exp(-sqrt u) is convex in u = x^2, whose mean is 1: Jensen's inequality."""
    assert whip(rows).item() / 16 >= math.exp(-1) - 1e-6
    assert whip(rows.sign()).item() / 16 == pytest.approx(math.exp(-1))


@given(rows=rows_of_rms_1)
@settings(max_examples=50, deadline=None)
def test_the_smooth_maximum_and_the_range_stay_within_their_bounds_of_the_largest(rows: Tensor) -> None:
    largest = rows.abs().amax(dim=-1).square().mean().item()
    assert largest * (1 - 1e-9) <= l8(rows).item() <= 16**0.25 * largest
    assert range2(rows).item() <= 4 * largest * (1 + 1e-9)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_channel_and_no_sign_is_preferred(name: str) -> None:
    rows, objective = gaussian(5, 16), OBJECTIVES[name]
    order = torch.randperm(16, generator=seeded(1))
    assert objective(-rows[:, order]).item() == pytest.approx(objective(rows).item())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loss_is_a_mean_over_tokens(name: str) -> None:
    rows, objective = gaussian(5, 16), OBJECTIVES[name]
    assert objective(rows).item() == pytest.approx(sum(objective(row[None]).item() for row in rows) / 5)


def test_whip_takes_an_outlier_that_the_grid_and_the_other_losses_do_not() -> None:
    """Less whip is not less error: why an objective is watched, and why there is more than one."""
    flat = rms_normalize(uniform(500, CHANNELS))
    crowded = two_point(500, CHANNELS, seed=1) + 0.1 * gaussian(500, CHANNELS, seed=2)
    crowded[:, 0] = 5.0
    crowded = rms_normalize(crowded)
    assert whip(crowded) < whip(flat)
    assert range2(crowded) > range2(flat)
    assert l8(crowded) > l8(flat)
    assert relative_error(crowded, bits=4) > 1.3 * relative_error(flat, bits=4)
