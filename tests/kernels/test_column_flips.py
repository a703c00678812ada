"""Flips of signs in coupled columns: compiled as in plain torch, and what they claim of the objective."""

import pytest
import torch
from torch import Tensor

from jointq_cli.kernels import COLUMN_SWEEPS, Kernels
from jointq_cli.kernels.cpu import CpuKernels
from jointq_cli.kernels.reference import ReferenceKernels


def case(columns: int, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """correlation h (columns, rank), G (rank, rank), H (columns, columns), signs and scales; float32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    spread, inputs = normal(2 * rank, rank), normal(3 * columns, columns)
    metric, coupling = spread.T @ spread / rank, inputs.T @ inputs / columns
    target, scale = normal(columns, 2 * rank), torch.rand(columns, generator=generator)
    scale[1] = 0
    return coupling @ target @ spread / rank, metric, coupling, torch.where(normal(columns, rank) < 0, -1.0, 1.0), scale


def objective(correlation: Tensor, metric: Tensor, coupling: Tensor, signs: Tensor, scale: Tensor) -> float:
    values = (signs * scale[:, None]).double()
    return float(((coupling.double() @ values @ metric.double() - 2 * correlation.double()) * values).sum())


@pytest.mark.parametrize("kernels", [CpuKernels, ReferenceKernels])
@pytest.mark.parametrize("seed", range(3))
def test_flips_lower_the_objective_until_no_flip_of_the_last_column_does(seed: int, kernels: type[Kernels]) -> None:
    correlation, metric, coupling, signs, scale = case(7, 10, seed)
    before, start = objective(correlation, metric, coupling, signs, scale), signs.clone()
    products = correlation - coupling @ (signs * scale[:, None]) @ metric
    change = kernels.column_flips(products, metric, coupling, signs, scale)
    after = objective(correlation, metric, coupling, signs, scale)
    assert after < before
    assert torch.equal(signs[1], start[1])  # whose scale is 0
    assert torch.allclose(change, (signs - start) * scale[:, None] @ metric, atol=1e-5)
    for j in range(10):
        other = signs.clone()
        other[-1, j] *= -1
        assert objective(correlation, metric, coupling, other, scale) > after - 1e-4
    assert COLUMN_SWEEPS > 10


@pytest.mark.parametrize("seed", range(3))
def test_compiled_and_plain_flips_are_the_same(seed: int) -> None:
    results = []
    for kernels in (CpuKernels, ReferenceKernels):
        correlation, metric, coupling, signs, scale = case(5, 8, seed)
        products = correlation - coupling @ (signs * scale[:, None]) @ metric
        change = kernels.column_flips(products, metric, coupling, signs, scale)
        results.append((signs, change, products))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
