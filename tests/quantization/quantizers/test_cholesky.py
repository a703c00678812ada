"""The factor of the inverse: its definition, rising damping, memory."""

import pytest
import torch
from torch import Tensor

from jointq_cli.errors import NumericsError
from jointq_cli.quantization.quantizers.cholesky import DAMPING_RETRIES, factorize, invert_lower


def hessian(size: int, tokens: int | None = None, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens or 3 * size, size, generator=generator, dtype=torch.float64)
    return inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 300, 515])
def test_the_factor_squares_to_the_inverse_of_the_damped_permuted_hessian(size: int) -> None:
    matrix = hessian(size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(1))
    factor = factorize(matrix, order, damping=0.1)
    damped = (matrix + 0.1 * matrix.diagonal().mean() * torch.eye(size, dtype=torch.float64))[order][:, order]
    upper = factor.upper.double()
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-5)
    assert torch.equal(upper, upper.triu())
    assert factor.upper.is_contiguous()
    assert (factor.damping, factor.damping_retries) == (0.1, 0)


@pytest.mark.parametrize("layout", ["row-major", "column-major"])
def test_a_triangular_matrix_is_inverted_in_place(layout: str) -> None:
    lower = torch.linalg.cholesky(hessian(391) + torch.eye(391, dtype=torch.float64)).contiguous()
    work = lower.clone() if layout == "row-major" else lower.mT.contiguous().mT
    invert_lower(work)
    torch.testing.assert_close(work @ lower, torch.eye(391, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_penalty_is_so_much_added_to_the_diagonal_in_the_columns_own_order(dtype: torch.dtype) -> None:
    matrix = hessian(130)
    order = torch.randperm(130, generator=torch.Generator().manual_seed(1))
    penalty = torch.linspace(0.1, 2.0, 130, dtype=torch.float64)
    before = matrix.clone()
    factor = factorize(matrix, order, 0.0, penalty, dtype)
    plain = factorize(matrix + torch.diag(penalty), order, 0.0, None, dtype)
    assert factor.upper.dtype == dtype
    assert torch.equal(factor.upper, plain.upper)
    assert factor.condition == pytest.approx(plain.condition)
    assert torch.equal(matrix, before)
    error = factor.upper.double().T @ factor.upper.double() @ (matrix + torch.diag(penalty))[order][:, order]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(error, torch.eye(130, dtype=torch.float64), rtol=0, atol=tolerance)


def test_damping_is_a_share_of_the_penalised_diagonal() -> None:
    matrix = hessian(32)
    penalty = torch.full((32,), 9.0, dtype=torch.float64)
    factor = factorize(matrix, torch.arange(32), 0.1, penalty, torch.float64)
    mean = matrix.diagonal().mean() + 9.0
    damped = matrix + (9.0 + 0.1 * mean) * torch.eye(32, dtype=torch.float64)
    torch.testing.assert_close(factor.upper.T @ factor.upper, torch.linalg.inv(damped))


def test_a_penalty_makes_a_singular_hessian_regular_and_a_dead_column_live() -> None:
    matrix = hessian(32, tokens=8)
    matrix[3], matrix[:, 3] = 0.0, 0.0
    penalty = torch.full((32,), 1e-3, dtype=torch.float64)
    factor = factorize(matrix, torch.arange(32), 0.0, penalty, torch.float64)
    assert factor.damping_retries == 0
    upper = factor.upper
    assert float((upper.T @ upper)[3, 3]) == pytest.approx(1e3)


def test_a_hessian_of_zeros_is_an_error_with_a_penalty_too() -> None:
    with pytest.raises(NumericsError, match="the Hessian is zero: no calibration token reached this layer"):
        factorize(torch.zeros(8, 8, dtype=torch.float64), torch.arange(8), 0.0, torch.ones(8, dtype=torch.float64))


def loud(size: int, spread: bool) -> Tensor:
    """A Hessian with one direction of 1e8, in one column or over all of them."""
    direction = torch.zeros(size, dtype=torch.float64)
    direction[slice(None) if spread else 5] = 1e4 / (size**0.5 if spread else 1.0)
    return hessian(size) + torch.outer(direction, direction)


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("damping", [0.0, 1e-4])
def test_the_condition_is_a_lower_bound_of_the_true_one_and_sees_loud_directions(damping: float, spread: bool) -> None:
    matrix = loud(64, spread)
    factor = factorize(matrix, torch.arange(64), damping)
    true = float(torch.linalg.cond(matrix + damping * matrix.diagonal().mean() * torch.eye(64, dtype=torch.float64)))
    assert 0.005 * true < factor.condition <= true * (1 + 1e-9)


def test_the_condition_does_not_depend_on_the_order_or_the_scale() -> None:
    matrix = loud(64, True)
    plain = factorize(matrix, torch.arange(64), 0.0).condition
    assert factorize(matrix * 2.0**30, torch.arange(64), 0.0).condition == plain
    shuffle = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert factorize(matrix, shuffle, 0.0).condition == pytest.approx(plain, rel=1e-3)


def test_damping_is_raised_tenfold_until_the_factorisation_stands() -> None:
    values, vectors = torch.linalg.eigh(hessian(32))
    values[0] = -0.05 * float(values.mean())
    matrix = vectors @ torch.diag(values) @ vectors.T
    factor = factorize(matrix, torch.arange(32), damping=0.01)
    assert (factor.damping, factor.damping_retries) == (pytest.approx(0.1), 1)


def test_damping_is_raised_five_times_before_an_error_names_its_key() -> None:
    matrix = torch.full((8, 8), -1e9, dtype=torch.float64).fill_diagonal_(1.0)
    with pytest.raises(
        NumericsError, match=rf"quantizer.damping=0.001: .* even with {0.001 * 10**DAMPING_RETRIES:g} of"
    ):
        factorize(matrix, torch.arange(8), damping=0.001)


def test_a_matrix_singular_up_to_rounding_does_not_pass_for_regular() -> None:
    matrix = hessian(64, tokens=63)
    assert factorize(matrix, torch.arange(64), damping=0.0).damping_retries > 0
