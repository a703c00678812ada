"""One choice for each of several units, of least total loss within a number of bits: exact, by dynamic programming.

The multiple-choice knapsack problem (Kellerer, Pferschy, Pisinger, "Knapsack Problems", 2004, chapter 11). Bits are
counted in steps of their greatest common divisor. Where these are too many, steps are larger and every choice is
rounded up, so that the budget still holds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_STEPS = 200_000
MOST_CELLS = 1 << 28  # steps times units, a byte each


@dataclass(frozen=True)
class Choice:
    """One way to store a unit."""

    bits: int
    loss: float


class Knapsack:
    """The least loss for every budget. units: the choices of each, at least one."""

    def __init__(self, units: Sequence[Sequence[Choice]]) -> None:
        self._units = [_undominated(choices) for choices in units]
        self.least = sum(kept[0][1].bits for kept in self._units)
        self.most = sum(kept[-1][1].bits for kept in self._units)
        extra = [[choice.bits - kept[0][1].bits for _, choice in kept] for kept in self._units]
        divisor = math.gcd(*(bits for each in extra for bits in each)) or 1
        steps = min(MOST_STEPS, max(1, MOST_CELLS // max(1, len(units))))
        self._step = divisor * max(1, -(-(self.most - self.least) // (divisor * steps)))
        self._costs = [[-(-bits // self._step) for bits in each] for each in extra]
        self._chosen, self._losses = self._solve()

    def _solve(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each unit, and each number of steps that it and the units before may take, the choice; the least losses of
        all units."""
        size = sum(costs[-1] for costs in self._costs) + 1
        losses = np.zeros(size)
        chosen = np.zeros((len(self._units), size), dtype=np.uint8)
        for row, kept, costs in zip(chosen, self._units, self._costs, strict=True):
            found = losses + kept[0][1].loss
            for number, ((_, choice), cost) in enumerate(zip(kept, costs, strict=True)):
                better = losses[: size - cost] + choice.loss < found[cost:]
                found[cost:][better] = losses[: size - cost][better] + choice.loss
                row[cost:][better] = number
            losses = found
        return chosen, losses

    def choose(self, budget: int) -> list[int]:
        """Of each unit the number of the choice, for at most so many bits; `budget` is at least `least`."""
        left = min((budget - self.least) // self._step, len(self._losses) - 1)
        found = []
        for row, kept, costs in zip(self._chosen[::-1], self._units[::-1], self._costs[::-1], strict=True):
            number = int(row[left])
            left -= costs[number]
            found.append(kept[number][0])
        return found[::-1]

    def curve(self, points: int) -> list[Choice]:
        """The least loss at about so many budgets, evenly from `least` to `most`."""
        last = len(self._losses) - 1
        at = sorted({round(last * number / max(1, points - 1)) for number in range(points)})
        return [Choice(self.least + self._step * steps, float(self._losses[steps])) for steps in at]


def _undominated(choices: Sequence[Choice]) -> list[tuple[int, Choice]]:
    """With their numbers, by rising bits; without those that take as many bits as another one and lose more."""
    kept: list[tuple[int, Choice]] = []
    for number, choice in sorted(enumerate(choices), key=lambda each: (each[1].bits, each[1].loss, each[0])):
        if not kept or choice.loss < kept[-1][1].loss:
            kept.append((number, choice))
    return kept
