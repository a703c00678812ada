"""JointQ's search on its own: starts against direct computation, descents, padding, tiles."""

import itertools
import threading
from typing import Any

import pytest
import torch
from jointq_cases import layer
from torch import Tensor

from jointq_cli import kernels
from jointq_cli.formats.uniform import Grid
from jointq_cli.quantization.quantizers.jointq.descent import PADDING, SearchResult
from jointq_cli.quantization.quantizers.jointq.metric import Metric, measure, natural_order, penalty
from jointq_cli.quantization.quantizers.jointq.scaled_layer import over_tiles
from jointq_cli.quantization.quantizers.jointq.search import Search, State
from jointq_cli.quantization.quantizers.scale_fit import round_scale, scale_rounding

CPU = torch.device("cpu")


def problem(
    bits: int = 3, columns: int = 8, symmetric: bool = False, dtype: torch.dtype = torch.bfloat16
) -> tuple[Search, Tensor]:
    """A search over 32 columns and 32 target rows."""
    weight, hessian = layer(32, 32)
    order = natural_order(hessian, columns)
    metric = measure(hessian, order, columns, penalty(hessian, 0.01, "identity", 1.0, 0.0, "mean_diagonal"))
    return Search(metric, Grid(bits, symmetric), scale_rounding(dtype)), weight[:, order]


def exact_cost(metric: Metric, target: Tensor, state: State) -> Tensor:
    error = target.double() - state.values(metric).double()
    return ((error @ metric.full.double()) * error).sum(1)


def starts(search: Search, target: Tensor) -> dict[str, State]:
    return {
        "schur": search.schur_start(target),
        "clip": search.clip_start(target, propagate=False),
        "ep": search.clip_start(target, propagate=True),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_every_state_is_integers_in_the_box_and_scales_that_can_be_stored(
    bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    search, target = problem(bits, symmetric=symmetric, dtype=dtype)
    box = search.grid.box
    for name, start in starts(search, target).items():
        for state in (start, search.anneal(target, start, 2, 0.5, seed=3), search.descend(target, start, 2).state):
            levels = state.levels.view(32, -1, 8)
            assert torch.equal(levels, levels.round()), name
            assert float(levels.min()) >= box.first
            assert float(levels.max()) <= box.last
            assert float((levels.amax(2) - levels.amin(2)).max()) <= box.span
            used = (levels != 0).any(2)
            assert torch.equal(state.scale[used], round_scale(state.scale, dtype)[used]), name
            assert (state.scale > 0).all()


@pytest.mark.parametrize("columns", [8, 32])
def test_a_descent_tells_the_costs_it_began_and_ended_with(columns: int) -> None:
    search, target = problem(columns=columns)
    for start in starts(search, target).values():
        found = search.descend(target, start, 4)
        torch.testing.assert_close(found.start_cost, exact_cost(search.metric, target, start), rtol=1e-4, atol=0)
        torch.testing.assert_close(found.cost, exact_cost(search.metric, target, found.state), rtol=1e-5, atol=0)
        assert (found.cost <= found.start_cost).all()
        assert (found.cost[found.steps > 0] < found.start_cost[found.steps > 0]).all()
        still = found.steps == 0
        assert torch.equal(found.state.levels[still], start.levels[still])
        assert torch.equal(found.sweeps > 0, found.steps > 0)


def test_a_descent_leaves_its_start_alone_and_no_sweeps_are_no_change() -> None:
    search, target = problem()
    start = search.clip_start(target, propagate=False)
    before = start.copy()
    search.descend(target, start, 3)
    search.anneal(target, start, 2, 1.0, seed=0)
    idle = search.descend(target, start, 0)
    for state in (start, idle.state):
        assert torch.equal(state.levels, before.levels)
        assert torch.equal(state.scale, before.scale)
    assert torch.equal(idle.cost, idle.start_cost)
    assert not idle.steps.any()


def test_a_row_that_stands_still_is_where_no_single_step_and_no_scale_gains() -> None:
    search, target = problem()
    found = search.descend(target, search.schur_start(target), 50)
    assert int(found.sweeps.max()) < 50
    best = exact_cost(search.metric, target, found.state)
    box, groups = search.grid.box, search.metric.groups
    for column, step in itertools.product(range(32), (-1.0, 1.0)):
        levels = found.state.levels.clone()
        levels[:, column] += step
        part = levels.view(32, groups, -1)
        allowed = (part.amax(2) - part.amin(2) <= box.span).all(1) & (levels.abs() <= box.last).all(1)
        moved = exact_cost(search.metric, target, State(levels, found.state.scale))
        curvature = search.metric.full[column, column].double() * found.state.scale[:, column // 8].double().square()
        assert (moved >= best - 1e-4 * curvature)[allowed].all()  # the kernels' tolerance is 1e-5, and float32's error
    for group, factor in itertools.product(range(groups), (1 - 2**-7, 1 + 2**-7)):
        scale = found.state.scale.clone()
        scale[:, group] = round_scale(scale[:, group] * factor, torch.bfloat16)  # its neighbour, or the one after
        assert (exact_cost(search.metric, target, State(found.state.levels, scale)) >= best * (1 - 1e-5)).all()


def test_the_clip_start_solves_every_group_as_if_it_were_alone() -> None:
    search, target = problem()
    whole = search.clip_start(target, propagate=False)
    for group in range(search.metric.groups):
        span = search.metric.span(group)
        full = search.metric.full[span, span].contiguous()
        alone = Metric(torch.arange(8), 8, full, full, 0.0, 0, 1.0)
        state = Search(alone, search.grid, search.rounding).clip_start(target[:, span].contiguous(), propagate=False)
        assert torch.equal(state.levels, whole.levels[:, span])
        assert torch.equal(state.scale[:, 0], whole.scale[:, group])


def test_starts_that_make_up_for_earlier_groups_cost_less_in_all() -> None:
    search, target = problem()
    cost = {name: float(search.cost(target, state).sum()) for name, state in starts(search, target).items()}
    assert cost["schur"] < cost["ep"] < cost["clip"]


def test_the_schur_start_sees_the_first_group_as_the_metric_of_all_later_ones_says() -> None:
    search, target = problem()
    state = search.schur_start(target)
    span = search.metric.span(0)
    block = search.metric.schur[span, span].contiguous()
    alone = Metric(torch.arange(8), 8, block, block, 0.0, 0, 1.0)
    first = Search(alone, search.grid, search.rounding).clip_start(target[:, span].contiguous(), propagate=False)
    assert torch.equal(first.levels, state.levels[:, span])


def test_without_warmth_annealing_never_costs_more() -> None:
    search, target = problem()
    start = search.clip_start(target, propagate=False)
    cold = search.anneal(target, start, 3, 0.0, seed=0)
    assert (search.cost(target, cold) <= search.cost(target, start) * (1 + 1e-5)).all()
    warm = search.anneal(target, start, 1, 5.0, seed=0)
    assert (search.cost(target, warm) > search.cost(target, start)).any()


def test_annealing_cools_from_sweep_to_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    search, target = problem(columns=16)
    used: list[float] = []
    anneal = kernels.for_device(CPU).anneal

    def spy(*arguments: Any, temperature: float, noise: Tensor) -> None:
        used.append(temperature)
        anneal(*arguments, temperature=temperature, noise=noise)

    monkeypatch.setattr(kernels.for_device(CPU), "anneal", staticmethod(spy))
    search.anneal(target, search.schur_start(target), 4, 2.0, seed=0)
    assert used[::2] == used[1::2]  # both groups of a sweep
    assert used[0] == 2.0
    assert used[::2] == sorted(set(used), reverse=True)
    assert 0 < used[-1] < 0.5


def test_annealing_is_its_seeds() -> None:
    search, target = problem()
    start = search.schur_start(target)
    one, again, other = (search.anneal(target, start, 2, 1.0, seed) for seed in (1, 1, 2))
    assert torch.equal(one.levels, again.levels)
    assert torch.equal(one.scale, again.scale)
    assert not torch.equal(one.levels, other.levels)


def solved(levels: list[float], cost: list[float]) -> SearchResult:
    rows = torch.tensor(cost, dtype=torch.float64)
    counts = torch.tensor(levels).long()
    return SearchResult(State(torch.tensor(levels)[:, None], torch.tensor(levels)[:, None]), rows, rows, counts, counts)


def test_the_better_of_two_is_taken_row_by_row_and_the_first_of_equals() -> None:
    best = solved([1, 1, 1], [3, 2, 5]).or_better(solved([2, 2, 2], [2, 2, 9]))
    assert best.state.levels[:, 0].tolist() == [2, 1, 1]
    assert best.state.scale[:, 0].tolist() == [2, 1, 1]
    assert best.steps.tolist() == best.sweeps.tolist() == [2, 1, 1]
    assert best.cost.tolist() == [2, 2, 5]


def test_rows_are_replaced_cut_off_and_joined() -> None:
    whole = solved([1, 1, 1, 1], [4, 4, 4, 4]).with_rows(torch.tensor([1, 3]), solved([7, 8], [2, 3]))
    assert whole.cost.tolist() == [4, 2, 4, 3]
    assert whole.state.levels[:, 0].tolist() == [1, 7, 1, 8]
    joined = SearchResult.joined([whole.head(2), solved([5], [6])])
    assert joined.cost.tolist() == [4, 2, 6]
    assert joined.state.scale[:, 0].tolist() == [1, 7, 5]


# --- what makes a row's bits its own


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_of_a_product_has_the_same_bits_among_any_number_of_rows_that_padding_makes(dtype: torch.dtype) -> None:
    """The search relies on it: with other numbers of rows the library takes other paths."""
    generator = torch.Generator().manual_seed(0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for inner, outer in ((8, 8), (96, 24), (128, 128), (384, 64), (1024, 128)):
            rows = torch.randn(320, inner, generator=generator, dtype=dtype)
            matrix = torch.randn(inner, outer, generator=generator, dtype=dtype)
            whole = rows @ matrix
            for count, start in itertools.product((1, 2, 3, 5, 16, 17), (0, 16, 37)):
                part = slice(start, start + count * PADDING)
                if part.stop <= 320:
                    assert torch.equal(rows[part].clone() @ matrix, whole[part]), (inner, outer, count, start)
    finally:
        torch.set_num_threads(threads)


def test_tiles_cover_all_rows_in_order() -> None:
    assert over_tiles(600, None, CPU, lambda rows: (rows.start, rows.stop)) == [(0, 256), (256, 512), (512, 600)]
    assert over_tiles(5, 2, CPU, lambda rows: (rows.start, rows.stop)) == [(0, 2), (2, 4), (4, 5)]
    assert over_tiles(5, 99, CPU, lambda rows: (rows.start, rows.stop)) == [(0, 5)]


def test_every_tile_is_one_threads_and_torch_keeps_its_own() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        used = over_tiles(4, 1, CPU, lambda rows: (torch.get_num_threads(), threading.current_thread().name))
        assert {count for count, _ in used} == {1}
        assert threading.current_thread().name not in {name for _, name in used}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_an_error_in_a_tile_is_the_callers() -> None:
    def fail(rows: slice) -> None:
        raise ValueError(f"tile {rows.start}")

    with pytest.raises(ValueError, match="tile 0"):
        over_tiles(4, 2, CPU, fail)
