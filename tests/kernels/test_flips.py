"""JointQ's kernels against their contract, against brute force, against each other, and against themselves.

Triton's programs run on a GPU or in Triton's interpreter, at milliseconds a step: hence their tiny problems.
"""

import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor

from jointq_cli import kernels
from jointq_cli.formats.uniform import Grid
from jointq_cli.kernels import TOLERANCE, Box, Kernels, Rounding, cpu_flips, reference
from jointq_cli.kernels.cpu import CpuKernels
from jointq_cli.kernels.reference import ReferenceKernels
from jointq_cli.quantization.quantizers.scale_fit import round_scale, scale_rounding

# Triton's interpreter is made of numpy, which warns of quotients that the programs then do not use.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")

f32, f64 = torch.float32, torch.float64
BFLOAT16, FLOAT32 = scale_rounding(torch.bfloat16), scale_rounding(torch.float32)
GRIDS = [Grid(bits, symmetric) for bits in (1, 2, 3, 4, 8) for symmetric in (False, True)]
GRIDS += [Grid(1, False, "half"), Grid(2, False, "half")]
HAS_TRITON = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Maker:
    """An implementation and the problems that it can solve in time."""

    name: str
    rows: int
    columns: int

    @property
    def kernels(self) -> type[Kernels]:
        if self.name == "triton":
            from jointq_cli.kernels.cuda import CudaKernels

            return CudaKernels
        return {"cpu": CpuKernels, "reference": ReferenceKernels}[self.name]

    @property
    def device(self) -> str:
        return "cuda" if self.name == "triton" and torch.cuda.is_available() else "cpu"

    def __str__(self) -> str:
        return self.name


CPU, REFERENCE, TRITON = Maker("cpu", 48, 12), Maker("reference", 48, 12), Maker("triton", 3, 6)
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
ALL = [CPU, REFERENCE, pytest.param(TRITON, marks=needs_triton)]
makers = pytest.mark.parametrize("maker", ALL, ids=str)
grids = pytest.mark.parametrize("grid", GRIDS, ids=str)
kinds = pytest.mark.parametrize("kind", [f32, f64], ids=str)


@dataclass(frozen=True)
class Problem:
    """Rows of weights w in the metric R, and where their search begins."""

    correlation: Tensor
    metric: Tensor
    levels: Tensor
    scale: Tensor
    box: Box
    rounding: Rounding = BFLOAT16

    def take(self, rows: Tensor) -> "Problem":
        levels, scale = self.levels[rows].contiguous(), self.scale[rows].contiguous()
        return replace(self, correlation=self.correlation[rows].contiguous(), levels=levels, scale=scale)

    def objective(self, levels: Tensor, scale: Tensor) -> Tensor:
        """f (rows,) in float64."""
        z, s = levels.double(), scale.double()
        o, q = ((z @ self.metric.double()) * z).sum(1), (self.correlation.double() * z).sum(1)
        return s * s * o - 2 * s * q

    def noise_of_objective(self) -> Tensor:
        """How far rounding may put f (rows,) off: a few digits of the energy of what there is to fit."""
        w = torch.linalg.lstsq(self.metric.double(), self.correlation.double().T).solution.T
        return 64 * torch.finfo(self.levels.dtype).eps * (w * self.correlation.double()).sum(1).abs()


@dataclass(frozen=True)
class Found:
    levels: Tensor
    scale: Tensor
    steps: Tensor
    fall: Tensor


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


def correlated(columns: int, seed: int) -> Tensor:
    """The metric of inputs that have something in common, mean diagonal 1."""
    inputs = normal(4 * columns, columns, seed=seed) @ (normal(columns, columns, seed=seed + 1) + torch.eye(columns))
    metric = inputs.T @ inputs
    return metric / metric.diagonal().mean() + 0.02 * torch.eye(columns, dtype=f64)


def clipped(maker: Maker, values: Tensor, weights: Tensor, grid: Grid, steps: int = 10) -> tuple[Tensor, Tensor]:
    low, high = grid.ends(values)
    levels, scale = torch.empty_like(values), torch.empty_like(low)
    arguments = (values, weights, low, grid.covering_scale(low, high), levels, scale)
    on_device = [tensor.to(maker.device) for tensor in arguments]
    maker.kernels.weighted_clip(*on_device, grid.box, steps)
    return on_device[4].cpu(), on_device[5].cpu()


def problem(grid: Grid, kind: torch.dtype, rows: int, columns: int, seed: int = 0) -> Problem:
    weights, metric = normal(rows, columns, seed=seed), correlated(columns, seed + 1).to(kind)
    levels, scale = clipped(REFERENCE, weights.to(kind), metric.diagonal().contiguous(), grid)
    scale = round_scale(scale.float(), torch.bfloat16).to(kind)
    return Problem(weights.to(kind) @ metric, metric, levels, scale, grid.box)


def search(maker: Maker, given: Problem, *, guarded: bool) -> Found:
    levels, scale = given.levels.clone().to(maker.device), given.scale.clone().to(maker.device)
    correlation, metric = given.correlation.to(maker.device), given.metric.to(maker.device)
    products = (given.levels @ given.metric).to(maker.device)
    steps, fall = maker.kernels.flip_search(
        correlation, metric, products, levels, scale, given.box, given.rounding, guarded=guarded
    )
    return Found(levels.cpu(), scale.cpu(), steps.cpu(), fall.cpu())


def anneal(maker: Maker, given: Problem, temperature: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    levels, scale = given.levels.clone().to(maker.device), given.scale.clone().to(maker.device)
    correlation, metric = given.correlation.to(maker.device), given.metric.to(maker.device)
    products = (given.levels @ given.metric).to(maker.device)
    maker.kernels.anneal(
        correlation, metric, products, levels, scale, given.box, given.rounding,
        temperature=temperature, noise=noise.to(maker.device),
    )  # fmt: skip
    return levels.cpu(), scale.cpu()


def exponential(steps: int, given: Problem) -> Tensor:
    noise = torch.empty(steps, given.levels.shape[1], dtype=given.levels.dtype)
    return noise.exponential_(generator=torch.Generator().manual_seed(5))


@cache
def searched(maker: Maker, grid: Grid, kind: torch.dtype, guarded: bool) -> tuple[Problem, Found]:
    given = problem(grid, kind, maker.rows, maker.columns)
    return given, search(maker, given, guarded=guarded)


def in_the_box(levels: Tensor, box: Box) -> bool:
    low, high = levels.amin(1), levels.amax(1)
    whole = torch.equal(levels - box.first, (levels - box.first).round())
    return whole and bool((low >= box.first).all() and (high <= box.last).all() and (high - low <= box.span).all())


def single_gains(given: Problem, levels: Tensor, scale: Tensor) -> Tensor:
    """2 |g_j| - s R_jj (rows, d) in float64 of the steps that the box allows, -inf elsewhere."""
    z, s, metric = levels.double(), scale.double()[:, None], given.metric.double()
    g = given.correlation.double() - s * (z @ metric)
    level = z + torch.where(g > 0, 1.0, -1.0)
    low, high = (z.amax(1) - given.box.span).clamp(min=given.box.first), (z.amin(1) + given.box.span)
    allowed = (level >= low[:, None]) & (level <= high.clamp(max=given.box.last)[:, None])
    return torch.where(allowed, 2 * g.abs() - s * metric.diagonal(), -math.inf)


# properties of the search


@kinds
@grids
@makers
def test_a_guarded_search_never_raises_the_objective_and_states_its_fall(
    maker: Maker, grid: Grid, kind: torch.dtype
) -> None:
    given, found = searched(maker, grid, kind, True)
    fall = given.objective(given.levels, given.scale) - given.objective(found.levels, found.scale)
    assert ((found.fall - fall).abs() <= given.noise_of_objective()).all()
    assert (found.fall >= 0).all()
    assert (found.fall > given.noise_of_objective()).any()


@kinds
@grids
@makers
def test_no_steps_are_reported_exactly_where_nothing_changed(maker: Maker, grid: Grid, kind: torch.dtype) -> None:
    for guarded in (True, False):
        given, found = searched(maker, grid, kind, guarded)
        same = (found.levels == given.levels).all(1) & (found.scale == given.scale)
        assert torch.equal(found.steps == 0, same)
    again = search(maker, replace(given, levels=found.levels, scale=found.scale), guarded=True)
    still = again.steps == 0
    assert torch.equal(again.levels[still], found.levels[still])
    assert torch.equal(again.scale[still], found.scale[still])
    assert still.any()


@kinds
@grids
@makers
def test_no_single_step_is_left_that_gains_at_the_stored_scale(maker: Maker, grid: Grid, kind: torch.dtype) -> None:
    given, found = searched(maker, grid, kind, False)
    energy = found.scale.double()[:, None] * given.metric.double().diagonal()
    noise = 32 * torch.finfo(kind).eps * given.correlation.double().abs().amax(1, keepdim=True)
    assert (single_gains(given, found.levels, found.scale) <= TOLERANCE * energy + noise).all()
    assert (single_gains(given, given.levels, given.scale) > TOLERANCE * energy + noise).any()


@kinds
@grids
@makers
def test_levels_stay_in_the_box_and_scales_can_be_stored(maker: Maker, grid: Grid, kind: torch.dtype) -> None:
    for guarded in (True, False):
        given, found = searched(maker, grid, kind, guarded)
        assert in_the_box(found.levels, given.box)
        assert torch.equal(found.scale, found.scale.bfloat16().to(kind))
        assert (found.scale > 0).all()


@makers
@pytest.mark.parametrize("grid", [Grid(3, False), Grid(2, False, "half")], ids=str)
def test_levels_of_no_use_at_any_scale_are_given_up(maker: Maker, grid: Grid) -> None:
    given = problem(grid, f32, maker.rows, maker.columns)
    lost = replace(given, correlation=-given.correlation)  # z of w is the worst that one can do for -w
    found = search(maker, lost, guarded=False)
    assert in_the_box(found.levels, grid.box)
    assert (lost.objective(found.levels, found.scale) <= 0).all()
    assert (lost.objective(found.levels, found.scale) < 0).any()
    assert (lost.objective(lost.levels, lost.scale) > 0).all()


@makers
def test_a_guarded_search_keeps_what_rounding_of_the_scale_would_make_worse(maker: Maker) -> None:
    start = problem(Grid(3, False), f64, maker.rows, maker.columns)
    best = search(maker, replace(start, rounding=FLOAT32), guarded=False)
    given = replace(start, levels=best.levels, scale=best.scale, rounding=Rounding(2, -126, 2.0**-126))
    free, guarded = (search(maker, given, guarded=guarded) for guarded in (False, True))
    worse = given.objective(free.levels, free.scale) > given.objective(given.levels, given.scale)
    assert worse.any()
    assert torch.equal(guarded.steps == 0, worse)
    assert torch.equal(guarded.levels, torch.where(worse[:, None], given.levels, free.levels))
    assert torch.equal(guarded.scale, torch.where(worse, given.scale, free.scale))


@makers
def test_of_steps_that_gain_the_same_the_first_is_taken(maker: Maker) -> None:
    signs = torch.tensor([[1.0, -1.0, 1.0, -1.0], [-1.0, 1.0, -1.0, 1.0], [0.0, 0.0, -1.0, -1.0]])
    start = Problem(signs, torch.eye(4), torch.zeros(3, 4), torch.ones(3), Grid(1, False).box)
    # The first step fixes the window of two levels, and with it which columns can follow.
    found = search(maker, start, guarded=False)
    assert found.levels.tolist() == [[1, 0, 1, 0], [-1, 0, -1, 0], [0, 0, -1, -1]]
    levels, _ = anneal(maker, start, 0.0, torch.zeros(1, 4))
    assert levels.tolist() == [[1, 0, 0, 0], [-1, 0, 0, 0], [0, 0, -1, 0]]


@makers
def test_float32_stays_a_descent_where_the_metric_hides_almost_everything(maker: Maker) -> None:
    columns = 32
    seen = normal(1, columns, seed=0)
    metric = (seen.T @ seen / seen.square().mean() + 1e-5 * torch.eye(columns, dtype=f64)).float()
    weights = normal(2000, columns, seed=1).float()[910 : 910 + 10 * (maker.rows // 3)]  # 915 went wrong without care
    grid = Grid(4, False)
    levels, scale = clipped(REFERENCE, weights, metric.diagonal().contiguous(), grid)
    correlation = (weights.double() @ metric.double()).float()
    given = Problem(correlation, metric, levels, scale, grid.box, FLOAT32)
    found = search(maker, given, guarded=False)
    energy = (weights.double() * correlation.double()).sum(1)
    rise = given.objective(found.levels, found.scale) - given.objective(levels, scale)
    assert (rise <= 1e-6 * energy).all()
    assert (found.steps < 4 * columns).all()


def blind(*seen: float) -> Tensor:
    """A metric that sees one direction of weights, and hardly any other."""
    row = torch.tensor([seen], dtype=f32)
    return row.T @ row + 1e-7 * torch.eye(len(seen), dtype=f32)


@makers
def test_levels_that_the_metric_does_not_see_keep_their_scale(maker: Maker) -> None:
    levels = torch.tensor([[1, 0, 1], [1, -1, -1], [0, 0, 0]], dtype=f32)
    weights, metric = levels + torch.tensor([0.0, 0.01, 0.0]), blind(1, 2, -1)
    scale = torch.full((3,), 0.75, dtype=f32)
    given = Problem(weights @ metric, metric, levels, scale, Grid(2, False).box)
    kept = [True, True, False]
    assert (search(maker, given, guarded=False).scale == scale).tolist() == kept
    assert (anneal(maker, given, 0.0, torch.zeros(0, 3, dtype=f32))[1] == scale).all()


@makers
@pytest.mark.parametrize(("start", "seen"), [((1, 0, 0), (1, 2, -1)), ((0, 0), (1, -1))], ids=["single", "all"])
def test_no_scale_is_made_for_levels_that_the_metric_does_not_see(
    maker: Maker, start: tuple[int, ...], seen: tuple[int, ...]
) -> None:
    levels, metric = torch.tensor([start], dtype=f32), blind(*seen)
    target = torch.tensor([[1, 0, 1] if len(seen) == 3 else [1, 1]], dtype=f32)
    given = Problem(target @ metric, metric, levels, torch.ones(1, dtype=f32), Grid(2, False).box)
    found = search(maker, given, guarded=False)
    assert not torch.equal(found.levels, target)  # which would be the best of all, at scale 1
    assert found.scale.item() < 1e-3


# implementations


@kinds
@grids
@pytest.mark.parametrize("maker", [CPU, pytest.param(TRITON, marks=needs_triton)], ids=str)
def test_every_implementation_finds_what_plain_torch_finds(maker: Maker, grid: Grid, kind: torch.dtype) -> None:
    for guarded in (True, False):
        given, found = searched(maker, grid, kind, guarded)
        plain = (
            searched(REFERENCE, grid, kind, guarded)[1] if maker is CPU else search(REFERENCE, given, guarded=guarded)
        )
        same = (found.levels == plain.levels).all(1) & (found.scale == plain.scale) & (found.steps == plain.steps)
        gap = given.objective(found.levels, found.scale) - given.objective(plain.levels, plain.scale)
        assert same.all() if kind == f64 else same.double().mean() > 0.9  # float32 may see gains as equal
        assert (gap[same] == 0).all()
        assert gap.abs().mean() <= 0.01 * given.objective(plain.levels, plain.scale).abs().mean()
        assert ((found.fall - plain.fall).abs()[same] <= given.noise_of_objective()[same]).all()


@kinds
@pytest.mark.parametrize("grid", [Grid(1, True), Grid(2, False), Grid(4, True), Grid(2, False, "half")], ids=str)
@pytest.mark.parametrize("maker", [CPU, pytest.param(TRITON, marks=needs_triton)], ids=str)
def test_every_implementation_anneals_and_clips_as_plain_torch_does(
    maker: Maker, grid: Grid, kind: torch.dtype
) -> None:
    given = problem(grid, kind, maker.rows, maker.columns)
    noise = exponential(6, given)
    weights = given.metric.diagonal().contiguous()

    def both(maker: Maker) -> tuple[Tensor, ...]:
        return (*anneal(maker, given, 0.5, noise), *clipped(maker, given.correlation, weights, grid))

    for mine, plain in zip(both(maker), both(REFERENCE), strict=True):
        same = (mine == plain).view(maker.rows, -1).all(1)
        assert same.all() if kind == f64 else same.double().mean() > 0.9


# rows on their own


def outcomes(maker: Maker, given: Problem) -> tuple[Tensor, ...]:
    """All that the kernels say of each row."""
    found = search(maker, given, guarded=True)
    free = search(maker, given, guarded=False)
    annealed = anneal(maker, given, 0.5, exponential(4, given))
    clip = clipped(maker, given.correlation, given.metric.diagonal().contiguous(), Grid(2, False))
    return (found.levels, found.scale, found.steps, found.fall, free.levels, free.scale, *annealed, *clip)


@makers
@kinds
def test_a_row_does_not_depend_on_the_others_nor_on_its_place(maker: Maker, kind: torch.dtype) -> None:
    given = problem(Grid(2, False), kind, maker.rows, maker.columns)
    given = replace(given, scale=(1.1 * given.scale).bfloat16().to(kind))
    together = outcomes(maker, given)
    backwards = torch.arange(maker.rows).flip(0)
    some = torch.arange(1, maker.rows, 2)
    for rows in (backwards, some, some[:1]):
        for all_rows, alone in zip(together, outcomes(maker, given.take(rows)), strict=True):
            assert torch.equal(all_rows[rows], alone)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@kinds
def test_rows_do_not_depend_on_the_number_of_threads(threads: Callable[[int], None], kind: torch.dtype) -> None:
    threads(1)  # for the problem as well: its matrix products may depend on them
    given = problem(Grid(3, False), kind, 3000, 40)
    products = given.levels @ given.metric
    noise, weights = exponential(4, given), given.metric.diagonal().contiguous()

    def everything() -> list[Tensor]:
        state = [given.levels.clone(), given.scale.clone()]
        result = CpuKernels.flip_search(
            given.correlation, given.metric, products.clone(), *state, given.box, BFLOAT16, guarded=False
        )
        warm = [given.levels.clone(), given.scale.clone()]
        CpuKernels.anneal(
            given.correlation, given.metric, products.clone(), *warm, given.box, BFLOAT16, temperature=0.5, noise=noise
        )
        return [*state, *result, *warm, *clipped(CPU, given.correlation, weights, Grid(3, False), 20)]

    alone = everything()
    threads(2)
    for one, two in zip(alone, everything(), strict=True):
        assert torch.equal(one, two)


@makers
@pytest.mark.parametrize("exponent", [-20, 20])
def test_weights_times_a_power_of_two_have_the_same_levels_and_the_scale_times_it(maker: Maker, exponent: int) -> None:
    factor = 2.0**exponent
    given = problem(Grid(2, False), f32, maker.rows, maker.columns)
    rounding = scale_rounding(torch.float16)  # weights are of order 1: nothing is subnormal here
    given = replace(given, rounding=rounding)
    moved = Rounding(rounding.digits, rounding.min_exponent + exponent, rounding.least * factor)
    scaled = replace(given, correlation=given.correlation * factor, scale=given.scale * factor, rounding=moved)
    found, again = search(maker, given, guarded=False), search(maker, scaled, guarded=False)
    assert torch.equal(again.levels, found.levels)
    assert torch.equal(again.scale, found.scale * factor)
    assert torch.equal(again.fall, found.fall * factor**2)
    assert torch.equal(again.steps, found.steps)


# degenerate problems


def degenerate(kind: torch.dtype, box: Box, columns: int) -> Iterator[tuple[str, Problem]]:
    rows = 4
    metric = correlated(columns, 3)
    weights = normal(rows, columns, seed=8)
    levels = (2 * weights).round().clamp(box.first, box.last)
    levels = levels.clamp(min=levels.amax(1, keepdim=True) - box.span)
    twins = metric.clone()
    twins[1], twins[:, 1] = twins[0], twins[0]
    twins[1, 1] = twins[0, 0]
    basis = normal(2, columns, seed=9)
    dead = metric.clone()
    dead[0], dead[:, 0] = 0, 0
    cases = {
        "rows of zeros": (torch.zeros_like(weights), metric),
        "rows that are all equal": (torch.ones_like(weights), metric),
        "metric of rank 2": (weights, basis.T @ basis),
        "metric of rank 1": (weights, torch.ones_like(metric)),
        "columns twice": (weights, twins),
        "a dead column": (weights, dead),
        "nothing but dead columns": (weights, torch.zeros_like(metric)),
        "curvatures far apart": (weights, torch.diag(10.0 ** -torch.arange(columns, dtype=f64))),
    }
    for name, (w, r) in cases.items():
        for start in (levels, torch.zeros_like(levels)):
            scale = torch.full((rows,), 0.5, dtype=kind)
            yield name, Problem(w.to(kind) @ r.to(kind), r.to(kind), start.to(kind), scale, box)


@kinds
@pytest.mark.parametrize("grid", [Grid(1, False), Grid(1, True), Grid(2, False), Grid(8, True)], ids=str)
def test_degenerate_problems_end_and_end_well(grid: Grid, kind: torch.dtype) -> None:
    for name, given in degenerate(kind, grid.box, 8):
        check_degenerate(CPU, name, given)


@pytest.mark.parametrize("maker", ALL[1:], ids=str)
def test_degenerate_problems_end_and_end_well_elsewhere_too(maker: Maker) -> None:
    for name, given in degenerate(f32, Grid(2, False).box, 5):
        check_degenerate(maker, name, given.take(torch.arange(1)))


def check_degenerate(maker: Maker, name: str, given: Problem) -> None:
    found = search(maker, given, guarded=False)
    most = given.box.most_steps(given.levels.shape[1])
    assert (found.steps < most).all(), name
    for levels, scale in ((found.levels, found.scale), anneal(maker, given, 0.5, exponential(3, given))):
        assert in_the_box(levels, given.box), name
        assert (scale.isfinite() & (scale > 0)).all(), name
    energy = 0.25 * (given.levels.double() @ given.metric.double() * given.levels.double()).sum(1) + 1
    before = given.objective(given.levels, given.scale)
    guarded = search(maker, given, guarded=True)
    rise = given.objective(guarded.levels, guarded.scale) - before
    assert (rise <= 64 * torch.finfo(given.levels.dtype).eps * energy).all(), name
    assert guarded.fall.isfinite().all(), name


# brute force


def every_choice_of_levels(box: Box, columns: int) -> Tensor:
    """(choices, columns)"""
    levels = torch.cartesian_prod(*[torch.arange(box.first, box.last + 1, dtype=f64)] * columns)
    return levels[levels.amax(1) - levels.amin(1) <= box.span]


def least_objective(given: Problem) -> Tensor:
    """The least f (rows,) that any levels have at the best scale for them."""
    z = every_choice_of_levels(given.box, given.levels.shape[1])
    o, q = ((z @ given.metric) * z).sum(1), given.correlation @ z.T
    return -(q.clamp(min=0).square() / o.clamp(min=1e-30)).amax(1)


# The share of 200 random problems that is solved at least: 0.08 or more below the least that was measured with four
# seeds each. The others end where no single step gains.
SOLVED = {
    (1, False, 4): 0.75,
    (1, False, 6): 0.6,
    (1, True, 4): 0.85,
    (1, True, 6): 0.75,
    (2, False, 4): 0.65,
    (2, False, 6): 0.45,
    (2, True, 4): 0.7,
    (2, True, 6): 0.5,
}


@pytest.mark.parametrize(("bits", "symmetric", "columns"), SOLVED)
def test_the_search_finds_the_best_levels_of_many_tiny_problems_and_never_better_ones(
    bits: int, symmetric: bool, columns: int
) -> None:
    given = replace(problem(Grid(bits, symmetric), f64, 200, columns, seed=20), rounding=FLOAT32)
    least = least_objective(given)
    found = search(CPU, given, guarded=False)
    reached = given.objective(found.levels, found.scale)
    assert (reached >= least - 1e-12).all()
    share = (reached <= least * (1 - 1e-6) + 1e-12).double().mean()
    assert share >= SOLVED[bits, symmetric, columns]


@makers
def test_weighted_clipping_finds_the_best_of_all_candidates(maker: Maker) -> None:
    for grid, kind in itertools.product((Grid(1, True), Grid(3, False), Grid(4, True)), (f32, f64)):
        values = normal(maker.rows, maker.columns, seed=30).pow(3).to(kind)  # heavy tails, so that clipping pays
        weights = normal(maker.columns, seed=31).abs().to(kind)
        levels, scale = clipped(maker, values, weights, grid, steps=20)
        low, high = values.amin(1).clamp(max=0), values.amax(1).clamp(min=0)
        widest = grid.covering_scale(low, high)
        trials = widest[:, None] * torch.tensor([1 - 0.8 * k / 20 for k in range(20)], dtype=f64).to(kind)
        floor = (low / widest).round().clamp(grid.box.first, grid.box.last - grid.box.span)[:, None, None]
        wide, s = values.double()[:, None, :], trials.double()[:, :, None]
        nearest = (wide / s).round().clamp(floor, floor + grid.box.span)
        losses = ((wide - s * nearest).square() * weights.double()).sum(2)
        mine = ((values.double() - scale.double()[:, None] * levels).square() * weights.double()).sum(1)
        assert (mine <= losses.amin(1) * (1 + 16 * torch.finfo(kind).eps)).all()
        assert (mine <= losses[:, 0] * (1 + 16 * torch.finfo(kind).eps)).all()
        assert (mine < losses[:, 0]).any()
        assert in_the_box(levels, grid.box)
        if kind == f64:
            best = losses.argmin(1)
            assert torch.equal(scale, trials.gather(1, best[:, None])[:, 0])
            exact = values / scale[:, None]  # ends of a symmetric range lie halfway between two levels
            gap = (exact - levels).abs() - (exact - nearest[torch.arange(maker.rows), best]).abs()
            assert gap.abs().max() < 1e-12


# annealing


@kinds
@makers
def test_annealing_without_warmth_is_descent(maker: Maker, kind: torch.dtype) -> None:
    given = problem(Grid(2, False), kind, maker.rows, maker.columns)
    levels, scale = anneal(maker, given, 0.0, exponential(4 * maker.columns, given))
    noise = given.noise_of_objective()
    assert (given.objective(levels, given.scale) <= given.objective(given.levels, given.scale) + noise).all()
    assert (given.objective(levels, given.scale) < given.objective(given.levels, given.scale) - noise).any()
    digits = 32 * torch.finfo(kind).eps * given.correlation.double().abs().amax(1, keepdim=True)
    assert (single_gains(given, levels, given.scale) <= digits).all()
    # The scale is the best for the levels, to the 8 digits of bfloat16.
    o = ((levels.double() @ given.metric.double()) * levels.double()).sum(1)
    best = (given.correlation.double() * levels.double()).sum(1) / o
    assert (scale.double() / best - 1).abs().max() <= 2.0**-8
    assert torch.equal(scale, scale.bfloat16().to(kind))


@makers
def test_annealing_with_warmth_leaves_a_minimum_stays_in_the_box_and_repeats_itself(maker: Maker) -> None:
    start = problem(Grid(2, False), f32, maker.rows, maker.columns)
    found = search(maker, start, guarded=False)
    given = replace(start, levels=found.levels, scale=found.scale)
    noise = exponential(5, given)
    levels, scale = anneal(maker, given, 2.0, noise)
    again, scale_again = anneal(maker, given, 2.0, noise)
    assert torch.equal(levels, again)
    assert torch.equal(scale, scale_again)
    assert in_the_box(levels, given.box)
    assert (given.objective(levels, scale) > given.objective(given.levels, given.scale)).any()
    cold, _ = anneal(maker, given, 0.0, noise)
    assert torch.equal(cold, given.levels)


# scales


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, f32], ids=str)
def test_scales_are_rounded_as_torch_rounds_them_to_the_bit(dtype: torch.dtype) -> None:
    least, most = {torch.bfloat16: (-126, 120), torch.float16: (-27, 15), f32: (-126, 120)}[dtype]
    mantissas = torch.cat([1 + torch.rand(2000, generator=torch.Generator().manual_seed(40)), torch.ones(100)])
    exponents = torch.randint(least, most, (2100,), generator=torch.Generator().manual_seed(41))
    scales = torch.ldexp(mantissas, exponents)
    coarse = scales.to(dtype).float()
    scales = torch.cat([scales, torch.nextafter(scales, torch.tensor(0.0)).clamp(min=2.0**-126)])
    scales = torch.cat([scales, (coarse * (1 + 2.0**-8)), (coarse * (1 + 2.0**-11))])  # ties
    wanted = round_scale(scales, dtype).double()
    rounding = scale_rounding(dtype)
    fields = (rounding.digits, rounding.min_exponent, rounding.least)
    assert torch.equal(reference.rounded(scales.double(), rounding), wanted)
    assert [cpu_flips.rounded(scale, fields) for scale in scales.tolist()] == wanted.tolist()
    moved = scale_rounding(dtype, 5)
    assert torch.equal(reference.rounded(scales.double() / 32, moved), wanted / 32)
    assert (wanted != scales).any() or dtype == f32


@makers
def test_scales_of_float16_below_its_normal_range_keep_its_grid(maker: Maker) -> None:
    given = problem(Grid(3, False), f64, maker.rows, maker.columns)
    tiny = 2.0**-20
    rounding = scale_rounding(torch.float16)
    given = replace(given, correlation=given.correlation * tiny, scale=given.scale * tiny, rounding=rounding)
    found = search(maker, given, guarded=False)
    assert torch.equal(found.scale, found.scale.half().double())
    assert (found.scale < 2.0**-14).all()


# dispatch


def test_a_gpu_gets_tritons_programs_and_plain_torch_where_there_is_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    if HAS_TRITON:
        assert kernels.for_device(gpu) is TRITON.kernels
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert kernels.for_device(gpu) is ReferenceKernels


@needs_triton
def test_groups_too_wide_for_a_program_are_left_to_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    from jointq_cli.kernels import cuda

    given = problem(Grid(2, False), f64, 4, 20)
    wanted = outcomes(REFERENCE, given)
    monkeypatch.setattr(cuda, "_MAX_COLUMNS", 19)
    monkeypatch.setattr(cuda, "_launch", None)
    for mine, plain in zip(outcomes(TRITON, given), wanted, strict=True):
        assert torch.equal(mine, plain)
