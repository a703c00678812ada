"""The compiled kernels against plain torch, and against themselves with other threads and neighbours."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from jointq_cli import kernels
from jointq_cli.formats.uniform import Grid
from jointq_cli.kernels.cpu import CpuKernels, _power_2_4
from jointq_cli.kernels.reference import ReferenceKernels
from jointq_cli.quantization.quantizers.scale_fit import SHRINK_STEPS

GRIDS = [Grid(bits, symmetric) for bits in (1, 2, 3, 4, 8) for symmetric in (False, True)]
GRIDS += [Grid(1, False, "half"), Grid(2, False, "half"), Grid(2, False, "real")]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def search_problem(grid: Grid, groups: int, columns: int) -> tuple[Tensor, Tensor, Tensor, int, int]:
    values = normal(groups, columns) ** 3  # heavy tails, so that clipping pays
    low, high = grid.ends(values)
    shrink = 1 - torch.arange(SHRINK_STEPS) / 100
    scales = (grid.covering_scale(low, high)[:, None] * shrink).bfloat16().float()
    return values, grid.zero_point(low[:, None] * shrink, scales), scales, grid.lowest, grid.highest


def losses(values: Tensor, zero_points: Tensor, scales: Tensor, lowest: int, highest: int) -> Tensor:
    """The definition of the search, in float64: (groups, candidates)."""
    scale, zero = scales.double()[:, None, :], zero_points.double()[:, None, :]
    codes = torch.round(values.double()[:, :, None] / scale + zero).clamp(lowest, highest)
    return ((codes - zero) * scale - values.double()[:, :, None]).abs().pow(2.4).sum(1)


@pytest.mark.parametrize("implementation", [CpuKernels, ReferenceKernels])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_clip_search_is_never_worse_than_the_plain_grid(grid: Grid, implementation: type[kernels.Kernels]) -> None:
    problem = search_problem(grid, 64, 32)
    found = losses(*problem).gather(1, implementation.clip_search(*problem)[:, None])[:, 0]
    assert (found <= 1.001 * losses(*problem).amin(1)).all()


@pytest.mark.parametrize("implementation", [CpuKernels, ReferenceKernels])
def test_weights_of_zero_do_not_change_what_the_clip_search_finds(
    implementation: type[kernels.Kernels],
) -> None:
    values, *rest = search_problem(Grid(3, False), 64, 32)
    padded = torch.cat([values, torch.zeros(64, 5)], dim=1)
    best = implementation.clip_search(values, *rest)
    assert torch.equal(implementation.clip_search(padded, *rest), best)
    assert best.max() > 0


def test_the_fast_power_has_the_accuracy_that_it_states() -> None:
    squares = torch.logspace(-12, 12, 20001).float()
    fast = torch.tensor([float(_power_2_4(square)) for square in squares.numpy()], dtype=torch.float64)
    exact = squares.double().pow(1.2)
    assert float((fast / exact - 1).abs().max()) < 1.1e-4
    assert float(_power_2_4(torch.zeros(1).numpy()[0])) == 0.0


def column_problem(grid: Grid, rows: int, size: int, columns: int) -> dict[str, Tensor]:
    upper = torch.triu(normal(size, size, seed=1) * 0.3, 1) + torch.diag(0.5 + normal(size, seed=2).abs())
    return {
        "work": normal(rows, size),
        "codes": torch.zeros(rows, size, dtype=grid.code_dtype),
        "errors": torch.zeros(rows, size),
        "upper": upper.contiguous(),
        "scale": 0.1 + normal(rows, size // columns, seed=3).abs(),
        "zero_point": grid.zero_point(torch.tensor(-0.1), torch.full((rows, size // columns), 0.1)),
        "column_groups": torch.arange(size).flip(0) // columns,
    }


def run_columns(implementation: type[kernels.Kernels], problem: dict[str, Tensor], grid: Grid) -> dict[str, Tensor]:
    copy = {name: tensor.clone() for name, tensor in problem.items()}
    implementation.quantize_columns(
        **copy, span=range(4, 20), block=range(4, 28), lowest=grid.lowest, highest=grid.highest
    )
    return {name: copy[name] for name in ("work", "codes", "errors")}


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_column_loop_equals_plain_torch_to_the_bit(grid: Grid) -> None:
    problem = column_problem(grid, 40, 32, 8)
    mine, plain = run_columns(CpuKernels, problem, grid), run_columns(ReferenceKernels, problem, grid)
    assert torch.equal(mine["codes"], plain["codes"])
    assert torch.equal(mine["errors"][:, :16], plain["errors"][:, :16])
    assert torch.equal(mine["work"][:, 20:], plain["work"][:, 20:])


def test_the_column_loop_touches_nothing_outside_its_span_and_block() -> None:
    grid = Grid(4, True)
    problem = column_problem(grid, 8, 32, 8)
    after = run_columns(CpuKernels, problem, grid)
    assert torch.equal(after["work"][:, :4], problem["work"][:, :4])
    assert torch.equal(after["work"][:, 28:], problem["work"][:, 28:])
    assert not torch.equal(after["work"][:, 20:28], problem["work"][:, 20:28])
    assert (after["codes"][:, :4] == 0).all()
    assert (after["codes"][:, 20:] == 0).all()


def test_rows_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    grid = Grid(3, False)
    columns, search = column_problem(grid, 4096, 32, 8), search_problem(grid, 4096, 32)
    together = run_columns(CpuKernels, columns, grid)["codes"]
    best = CpuKernels.clip_search(*search)
    torch.set_num_threads(3 - threads)
    assert torch.equal(run_columns(CpuKernels, columns, grid)["codes"], together)
    assert torch.equal(CpuKernels.clip_search(*search), best)


def test_rows_do_not_depend_on_their_neighbours(threads: int) -> None:
    grid = Grid(3, False)
    columns, search = column_problem(grid, 4096, 32, 8), search_problem(grid, 4096, 32)
    together = run_columns(CpuKernels, columns, grid)["errors"]
    best = CpuKernels.clip_search(*search)
    for rows in (slice(0, 1), slice(1, 1500), slice(1500, 4096)):
        shared = {name: columns[name] for name in ("upper", "column_groups")}
        own = {name: tensor[rows] for name, tensor in columns.items() if name not in shared}
        assert torch.equal(run_columns(CpuKernels, shared | own, grid)["errors"], together[rows])
        values, zero_points, scales, *edges = search
        assert torch.equal(CpuKernels.clip_search(values[rows], zero_points[rows], scales[rows], *edges), best[rows])


def test_a_cpu_gets_the_compiled_kernels() -> None:
    assert kernels.for_device(torch.device("cpu")) is CpuKernels


def test_neither_numba_nor_triton_is_imported_before_a_kernel_is_asked_for() -> None:
    program = (
        "import sys, jointq_cli.quantization.quantizers; sys.exit(not {'numba', 'triton'}.isdisjoint(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
