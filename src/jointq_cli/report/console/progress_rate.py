"""How many steps of a phase are done, and how long the rest will take. Knows a clock; draws nothing."""

import math
from collections.abc import Callable

# Steps reported this soon after the start were finished by an earlier run, and do not count for the rate.
RESUME_SECONDS = 0.5


class ProgressRate:
    """Counts the steps of one phase and measures their rate."""

    def __init__(self, total: int, clock: Callable[[], float]) -> None:
        self.total = total
        self.done = 0
        self._clock = clock
        self._start = self._origin = self._latest = clock()
        self._origin_done = 0

    def advance(self, steps: int) -> None:
        self.done += steps
        self._latest = self._clock()
        if self._latest - self._start < RESUME_SECONDS:
            self._origin, self._origin_done = self._latest, self.done

    @property
    def fraction(self) -> float:
        """From 0 to 1."""
        return min(1.0, self.done / self.total) if self.total else 1.0

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start

    @property
    def remaining(self) -> float:
        """Seconds until the end at the rate so far; NaN while the rate is unknown."""
        steps = self.done - self._origin_done
        if self.done >= self.total:
            return 0.0
        if not steps or self._latest <= self._origin:
            return math.nan
        seconds_per_step = (self._latest - self._origin) / steps
        return max(0.0, (self.total - self.done) * seconds_per_step - (self._clock() - self._latest))
