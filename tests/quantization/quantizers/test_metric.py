"""What JointQ measures errors with: the penalty, the orders, the Schur complements."""

import pytest
import torch
from jointq_cases import layer
from torch import Tensor

from jointq_cli.errors import NumericsError
from jointq_cli.quantization.quantizers.jointq.metric import Metric, activation_order, measure, natural_order, penalty

NOTHING = torch.zeros(24, dtype=torch.float64)


def hessian() -> Tensor:
    return layer(1, 24)[1]


def metric_of(matrix: Tensor, columns: int = 8, extra: Tensor = NOTHING) -> Metric:
    return measure(matrix, natural_order(matrix, columns), columns, extra)


# --- the penalty


@pytest.mark.parametrize("reference", ["absolute", "mean_diagonal"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_the_penalty_is_lambda_r(gamma: float, reference: str) -> None:
    matrix = hessian()
    diagonal = matrix.diagonal()
    unit = float(diagonal.mean()) if reference == "mean_diagonal" else 1.0
    identity = penalty(matrix, 0.3, "identity", gamma, 0.0, reference)
    torch.testing.assert_close(identity, torch.full_like(diagonal, 0.3 * unit))
    expected = 0.3 * (diagonal / diagonal.mean()) ** gamma * unit
    torch.testing.assert_close(penalty(matrix, 0.3, "diagonal", gamma, 0.0, reference), expected)


def test_no_column_is_penalised_less_than_the_floor() -> None:
    matrix = hessian()
    free, floored = (penalty(matrix, 0.5, "diagonal", 1.0, floor, "mean_diagonal") for floor in (0.0, 0.7))
    least = 0.5 * 0.7 * matrix.diagonal().mean()
    assert bool((free < least).any())
    assert bool((free > least).any())
    torch.testing.assert_close(floored, free.clamp_min(least))
    identity = penalty(matrix, 0.5, "identity", 1.0, 0.7, "mean_diagonal")
    assert torch.equal(identity, penalty(matrix, 0.5, "identity", 1.0, 0.0, "mean_diagonal"))


def test_gamma_one_of_the_mean_diagonal_is_a_share_of_each_columns_own_energy() -> None:
    matrix = hessian()
    torch.testing.assert_close(penalty(matrix, 0.5, "diagonal", 1.0, 0.0, "mean_diagonal"), 0.5 * matrix.diagonal())


@pytest.mark.parametrize("mode", ["identity", "diagonal"])
@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_dead_columns_alone_are_penalised_without_a_lambda(strength: float, mode: str) -> None:
    matrix = hessian()
    matrix[5], matrix[:, 5] = 0.0, 0.0
    result = penalty(matrix, strength, mode, 0.5, 0.0, "mean_diagonal")
    mean = float(matrix.diagonal().mean())
    assert 0 < float(result[5]) <= max(1e-5, strength) * mean
    alive = torch.arange(24) != 5
    assert bool((result[alive] == 0).all()) == (strength == 0)


def test_a_relative_penalty_grows_with_the_hessian_and_an_absolute_one_does_not() -> None:
    matrix = hessian()
    for mode in ("identity", "diagonal"):
        relative, absolute = (penalty(matrix, 0.3, mode, 0.5, 0.0, name) for name in ("mean_diagonal", "absolute"))
        torch.testing.assert_close(penalty(1e6 * matrix, 0.3, mode, 0.5, 0.0, "mean_diagonal"), 1e6 * relative)
        torch.testing.assert_close(penalty(1e6 * matrix, 0.3, mode, 0.5, 0.0, "absolute"), absolute)


# --- the order


def test_groups_of_most_energy_come_first_and_stay_whole() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2, 9, 1, 5, 5, 0, 0], dtype=torch.float64))
    assert natural_order(matrix, 2).tolist() == [2, 3, 4, 5, 0, 1, 6, 7]
    assert natural_order(matrix, 8).tolist() == list(range(8))


def test_act_order_takes_columns_by_falling_energy_and_equals_as_they_stand() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2, 9, 1, 5, 5, 0, 0], dtype=torch.float64))
    assert activation_order(matrix).tolist() == [2, 4, 5, 1, 0, 3, 6, 7]


# --- the metric


@pytest.mark.parametrize("columns", [1, 6, 8, 24])
def test_a_schur_block_is_the_cost_once_all_later_groups_have_made_up_for_an_error(columns: int) -> None:
    matrix = hessian()
    extra = penalty(matrix, 0.1, "diagonal", 1.0, 0.0, "mean_diagonal")
    metric = metric_of(matrix, columns, extra)
    mean = (matrix.diagonal() + extra).mean()
    ordered = ((matrix + torch.diag(extra)) / mean)[metric.order][:, metric.order]
    torch.testing.assert_close(metric.full.double(), ordered, rtol=1e-6, atol=1e-7)
    generator = torch.Generator().manual_seed(1)
    for group in range(metric.groups):
        span = metric.span(group)
        own, later = ordered[span, span], ordered[span.stop :, span.stop :]
        cross = ordered[span, span.stop :]
        error = torch.randn(columns, generator=generator, dtype=torch.float64)
        # The least of e H e' over the later columns' errors x: 2 x later + 2 error cross = 0.
        answer = -torch.linalg.solve(later, cross.T @ error)
        least = error @ own @ error + 2 * error @ cross @ answer + answer @ later @ answer
        block = metric.schur[span, span].double()
        torch.testing.assert_close(error @ block @ error, least, rtol=1e-5, atol=1e-7)
        # And these errors they must take for it: the start subtracts so much from their targets.
        torch.testing.assert_close(error @ metric.schur[span, span.stop :].double(), answer, rtol=1e-4, atol=1e-5)


def test_the_metric_does_not_know_the_size_of_the_inputs() -> None:
    matrix = hessian()
    plain, loud = metric_of(matrix), metric_of(matrix * 2.0**40)
    assert torch.equal(plain.full, loud.full)
    assert torch.equal(plain.schur, loud.schur)
    assert plain.condition == loud.condition


def test_float64_is_taken_where_the_condition_is_large() -> None:
    matrix = hessian()
    assert metric_of(matrix).full.dtype == torch.float32
    loud = torch.zeros(24, dtype=torch.float64)
    loud[[3, 17]] = 1e4
    metric = metric_of(matrix + torch.outer(loud, loud))
    assert metric.condition > 1e9
    assert (metric.full.dtype, metric.schur.dtype) == (torch.float64, torch.float64)


def test_a_singular_hessian_is_damped_for_the_start_only() -> None:
    matrix = layer(1, 24, tokens=6)[1]
    metric = metric_of(matrix)
    assert metric.damping_retries > 0
    assert metric.damping > 0
    exact = (matrix / matrix.diagonal().mean())[metric.order][:, metric.order]
    torch.testing.assert_close(metric.full.double(), exact, rtol=1e-6, atol=1e-7)
    assert metric.schur.isfinite().all()


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.zeros(24, 24, dtype=torch.float64), "the Hessian is zero: no calibration token reached this layer"),
        (torch.full((24, 24), float("nan"), dtype=torch.float64), "the Hessian holds NaN or Inf"),
    ],
)
@pytest.mark.parametrize("reference", ["absolute", "mean_diagonal"])
def test_a_hessian_that_says_nothing_is_an_error_whatever_the_penalty(
    reference: str, matrix: Tensor, message: str
) -> None:
    with pytest.raises(NumericsError, match=message):
        metric_of(matrix, 8, penalty(matrix, 0.5, "identity", 0.5, 0.0, reference))
