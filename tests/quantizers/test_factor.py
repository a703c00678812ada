"""The factor of the inverse: its definition, the damping ladder, memory."""

import pytest
import torch
from torch import Tensor

from jointq_cli.errors import NumericsError
from jointq_cli.quantizers.factor import LADDER, factorize, invert_lower


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
    assert (factor.damping, factor.rungs) == (0.1, 0)


@pytest.mark.parametrize("layout", ["row-major", "column-major"])
def test_a_triangular_matrix_is_inverted_in_place(layout: str) -> None:
    lower = torch.linalg.cholesky(hessian(391) + torch.eye(391, dtype=torch.float64)).contiguous()
    work = lower.clone() if layout == "row-major" else lower.mT.contiguous().mT
    invert_lower(work)
    torch.testing.assert_close(work @ lower, torch.eye(391, dtype=torch.float64), rtol=0, atol=1e-10)


def test_the_condition_is_a_lower_bound_of_the_true_one() -> None:
    matrix = hessian(64)
    matrix[5] *= 1e4
    matrix[:, 5] *= 1e4
    factor = factorize(matrix, torch.arange(64), damping=0.0)
    assert 1e7 < factor.condition <= float(torch.linalg.cond(matrix)) * (1 + 1e-9)


def test_damping_is_raised_tenfold_until_the_factorisation_stands() -> None:
    values, vectors = torch.linalg.eigh(hessian(32))
    values[0] = -0.05 * float(values.mean())
    matrix = vectors @ torch.diag(values) @ vectors.T
    factor = factorize(matrix, torch.arange(32), damping=0.01)
    assert (factor.damping, factor.rungs) == (pytest.approx(0.1), 1)


def test_the_ladder_has_five_rungs_and_then_names_its_key() -> None:
    matrix = torch.full((8, 8), -1e9, dtype=torch.float64).fill_diagonal_(1.0)
    with pytest.raises(NumericsError, match=rf"quantizer.damping=0.001: .* even with {0.001 * 10**LADDER:g} of"):
        factorize(matrix, torch.arange(8), damping=0.001)


def test_a_matrix_singular_up_to_rounding_does_not_pass_for_regular() -> None:
    matrix = hessian(64, tokens=63)
    assert factorize(matrix, torch.arange(64), damping=0.0).rungs > 0
