"""The search in one block of a K grid against brute force, against plain torch, and against its contract."""

import importlib.util
import itertools

import pytest
import torch
from torch import Tensor

from jointq_cli.formats.k_quant import K_GRIDS, KGrid
from jointq_cli.kernels import Kernels, KLimits
from jointq_cli.kernels.cpu import CpuKernels
from jointq_cli.kernels.reference import ReferenceKernels

f32, f64 = torch.float32, torch.float64
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
MAKERS = pytest.mark.parametrize("maker", [CpuKernels, ReferenceKernels])
GRIDS = pytest.mark.parametrize("grid", K_GRIDS.values(), ids=lambda grid: grid.name)


def limits_of(grid: KGrid) -> KLimits:
    least, last = grid.scales
    return KLimits(-grid.zero, grid.last_code - grid.zero, least or 1, last, grid.last_min)


class Problem:
    """Rows of weights w in a metric R, and a start."""

    def __init__(self, limits: KLimits, rows: int, columns: int, kind: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=f64)

        def integers(first: int, last: int, *shape: int) -> Tensor:
            return torch.randint(first, last + 1, shape, generator=generator).to(f64)

        inputs = draw(3 * columns, columns)
        self.limits, self.weight = limits, draw(rows, columns)
        metric = inputs.T @ inputs / len(inputs)
        scales = integers(limits.least_scale, limits.last_scale, rows)
        scales[scales == 0] = 1
        spread = (limits.last - limits.first) * max(abs(limits.least_scale), limits.last_scale)
        d = (4.0 / spread * (0.5 + torch.rand(rows, generator=generator, dtype=f64))).half()
        dmin = (3.0 / max(limits.last_min, 1) * torch.ones(rows)).half()
        mins = integers(0, limits.last_min, rows)
        near = (self.weight + (dmin.double() * mins)[:, None]) / (d.double() * scales)[:, None]
        levels = (near.round() + integers(-1, 1, rows, columns)).clamp_(limits.first, limits.last)
        self.metric, self.levels, self.scales, self.mins, self.d, self.dmin = (
            each.to(kind) for each in (metric, levels, scales, mins, d, dmin)
        )

    def solve(self, maker: type[Kernels]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        levels, scales, mins = self.levels.clone(), self.scales.clone(), self.mins.clone()
        correlation = (self.weight @ self.metric.to(f64)).to(levels.dtype)
        steps, fall = maker.k_flip_search(
            correlation, self.metric, levels @ self.metric, levels, scales, mins, self.d, self.dmin, self.limits
        )
        return levels, scales, mins, steps, fall

    def cost(self, levels: Tensor, scales: Tensor, mins: Tensor) -> Tensor:
        step, offset = (self.d.double() * scales)[:, None], (self.dmin.double() * mins)[:, None]
        error = self.weight - (levels.double() * step - offset)
        return ((error @ self.metric.double()) * error).sum(dim=1)


@MAKERS
@pytest.mark.parametrize(("name", "kind"), [("q2_k", f32), ("q4_k", f64), ("q6_k", f32)])
def test_the_objective_falls_by_what_is_returned_and_integers_stay_in_their_range(
    maker: type[Kernels], name: str, kind: torch.dtype
) -> None:
    grid = K_GRIDS[name]
    problem = Problem(limits_of(grid), 32, grid.block, kind)
    levels, scales, mins, steps, fall = problem.solve(maker)
    before, after = (
        problem.cost(problem.levels.double(), problem.scales.double(), problem.mins.double()),
        problem.cost(levels.double(), scales.double(), mins.double()),
    )
    torch.testing.assert_close(before - after, fall, rtol=1e-4, atol=1e-4 * float(before.mean()))
    assert bool((fall >= 0).all())
    assert bool((steps > 0).any())
    limits = problem.limits
    assert limits.first <= int(levels.min())
    assert int(levels.max()) <= limits.last
    assert limits.least_scale <= int(scales.min())
    assert int(scales.max()) <= limits.last_scale
    assert bool((scales != 0).all())
    assert int(mins.min()) >= 0
    assert int(mins.max()) <= limits.last_min
    for each in (levels, scales, mins):
        assert torch.equal(each, each.round())


@GRIDS
def test_compiled_and_plain_search_find_the_same(grid: KGrid) -> None:
    problem = Problem(limits_of(grid), 64, grid.block, f32, seed=1)
    ours, theirs = problem.solve(CpuKernels), problem.solve(ReferenceKernels)
    same = sum(bool((one == two).all()) for one, two in zip(ours[0], theirs[0], strict=True))
    assert same >= 63  # a tie may be resolved differently where sums differ in their last bit
    torch.testing.assert_close(ours[4].mean(), theirs[4].mean(), rtol=1e-4, atol=0)


@MAKERS
@pytest.mark.parametrize("limits", [KLimits(0, 3, 1, 5, 3), KLimits(-2, 1, -4, 3, 0)], ids=["mins", "signed"])
def test_no_single_step_and_no_other_pair_of_scale_and_min_is_better(maker: type[Kernels], limits: KLimits) -> None:
    problem = Problem(limits, 64, 4, f64, seed=2)
    levels, scales, mins, _, _ = problem.solve(maker)
    found = problem.cost(levels, scales, mins)
    slack = 1e-4 * problem.cost(torch.zeros_like(levels), scales, torch.zeros_like(mins))
    for column, sign in itertools.product(range(4), (-1.0, 1.0)):
        stepped = levels.clone()
        stepped[:, column] = (stepped[:, column] + sign).clamp(limits.first, limits.last)
        assert bool((problem.cost(stepped, scales, mins) > found - slack).all())
    for scale, shift in itertools.product(range(limits.least_scale, limits.last_scale + 1), range(limits.last_min + 1)):
        if scale != 0:
            other = problem.cost(levels, torch.full_like(scales, scale), torch.full_like(mins, shift))
            better = other < found - slack
            # The integers next to the least-squares solution: a rounding of two numbers at once, rarely not the best.
            assert int(better.sum()) <= 2


@MAKERS
def test_the_best_of_all_is_found_for_most_rows(maker: type[Kernels]) -> None:
    """Brute force over all levels, scales and mins of blocks of three columns."""
    limits = KLimits(0, 3, 1, 4, 2)
    problem = Problem(limits, 48, 3, f64, seed=3)
    found = problem.cost(*problem.solve(maker)[:3])
    best = torch.full_like(found, torch.inf)
    for levels in itertools.product(range(4), repeat=3):
        for scale, shift in itertools.product(range(1, 5), range(3)):
            rows = len(found)
            chosen = torch.tensor(levels, dtype=f64).expand(rows, 3)
            cost = problem.cost(chosen, torch.full((rows,), float(scale)), torch.full((rows,), float(shift)))
            best = torch.minimum(best, cost)
    assert bool((found >= best - 1e-9).all())
    start = problem.cost(problem.levels, problem.scales, problem.mins)
    assert float((found - best).sum()) < 0.15 * float((start - best).sum())


@MAKERS
def test_rows_are_solved_alike_whatever_the_others(maker: type[Kernels]) -> None:
    problem = Problem(limits_of(K_GRIDS["q4_k"]), 32, 32, f32, seed=4)
    everything = problem.solve(maker)
    for name in ("weight", "levels", "scales", "mins", "d", "dmin"):
        setattr(problem, name, getattr(problem, name)[:16].contiguous())
    for all_rows, some in zip(everything, problem.solve(maker), strict=True):
        assert torch.equal(all_rows[:16], some)


@MAKERS
def test_a_block_that_is_solved_stays(maker: type[Kernels]) -> None:
    problem = Problem(limits_of(K_GRIDS["q3_k"]), 32, 16, f64, seed=5)
    problem.levels, problem.scales, problem.mins, _, _ = problem.solve(maker)
    levels, scales, _, steps, fall = problem.solve(maker)
    assert torch.equal(levels, problem.levels)
    assert torch.equal(scales, problem.scales)
    assert int(steps.sum()) == 0
    assert float(fall.sum()) == 0.0


@needs_triton
@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")
@pytest.mark.parametrize("limits", [KLimits(0, 3, 1, 15, 15), KLimits(-4, 3, -32, 31, 0)], ids=["q2_k", "q3_k"])
def test_triton_and_plain_search_find_the_same(limits: KLimits) -> None:
    """On a GPU, or in Triton's interpreter, at milliseconds a step."""
    from jointq_cli.kernels.cuda import CudaKernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = Problem(limits, 4, 6, f32, seed=6)
    expected = problem.solve(ReferenceKernels)
    for name in ("weight", "metric", "levels", "scales", "mins", "d", "dmin"):
        setattr(problem, name, getattr(problem, name).to(device))
    for ours, theirs in zip(problem.solve(CudaKernels)[:3], expected[:3], strict=True):
        assert torch.equal(ours.cpu(), theirs)
