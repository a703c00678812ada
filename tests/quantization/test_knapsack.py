"""The dynamic programme against every combination there is."""

import itertools
import random

import pytest

from jointq_cli.quantization import knapsack
from jointq_cli.quantization.knapsack import Choice, Knapsack

Units = list[list[Choice]]


def units(seed: int) -> Units:
    """Few units, of which some choices take as many bits or lose as much as others."""
    draw = random.Random(seed)
    return [
        [Choice(3 * draw.randint(1, 12), draw.choice([draw.random(), 0.5])) for _ in range(draw.randint(1, 4))]
        for _ in range(draw.randint(1, 5))
    ]


def spent(of: Units, numbers: list[int]) -> Choice:
    chosen = [choices[number] for choices, number in zip(of, numbers, strict=True)]
    return Choice(sum(one.bits for one in chosen), sum(one.loss for one in chosen))


@pytest.mark.parametrize("seed", range(20))
def test_no_combination_within_the_budget_loses_less(seed: int) -> None:
    found = units(seed)
    solved = Knapsack(found)
    everything = [spent(found, list(numbers)) for numbers in itertools.product(*(range(len(one)) for one in found))]
    assert solved.least == min(one.bits for one in everything)
    for budget in range(solved.least, solved.most + 4):
        chosen = spent(found, solved.choose(budget))
        assert chosen.bits <= budget
        assert chosen.loss == pytest.approx(min(one.loss for one in everything if one.bits <= budget), abs=1e-12)


def test_the_curve_is_what_is_chosen_at_its_budgets() -> None:
    found = units(3)
    solved = Knapsack(found)
    curve = solved.curve(7)
    assert (curve[0].bits, curve[-1].bits) == (solved.least, solved.most)
    assert all(one.loss >= two.loss for one, two in itertools.pairwise(curve))
    assert [spent(found, solved.choose(point.bits)).loss for point in curve] == pytest.approx([p.loss for p in curve])


@pytest.mark.parametrize("cells", [1, 40, 500])
def test_large_steps_hold_the_budget(monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    monkeypatch.setattr(knapsack, "MOST_CELLS", cells)
    found = [[Choice(3 * (7 * unit + 2 * bits) + bits, 4.0**-bits) for bits in (2, 3, 4)] for unit in range(5)]
    solved = Knapsack(found)
    for budget in range(solved.least, solved.most + 1):
        assert spent(found, solved.choose(budget)).bits <= budget
