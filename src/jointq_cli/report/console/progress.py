"""How far a phase of a run is, how long the rest will take, and when a line about it is due. Knows a clock; writes
nothing."""

import math
from collections.abc import Callable

from jointq_cli.report.number_format import duration

RESUMED = 0.5  # seconds; steps reported this soon were finished by an earlier run, and do not count for the rate
PAUSE = 30.0  # seconds between two lines of one phase


class Phase:
    """A number of steps; total: None where it is not known. on_step: called after each `advance`."""

    def __init__(
        self,
        name: str,
        total: int | None,
        clock: Callable[[], float],
        on_step: Callable[["Phase"], None] = lambda phase: None,
    ) -> None:
        self.name = name
        self.total = total
        self.done = 0
        self._status = ""  # an intermediate result
        self._clock = clock
        self._on_step = on_step
        self._start = self._origin = self._latest = self._written = clock()
        self._origin_done = self._written_done = 0

    def advance(self, n: int = 1, status: str = "") -> None:
        self.done += n
        self._status = status
        self._latest = self._clock()
        if self._latest - self._start < RESUMED:
            self._origin, self._origin_done = self._latest, self.done
        self._on_step(self)

    @property
    def label(self) -> str:
        return f"{self.name} {self._status}".rstrip()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return self._clock() - self._start

    @property
    def remaining(self) -> float:
        """Seconds until the end at the rate so far; NaN while that is unknown."""
        steps, seconds = self.done - self._origin_done, self._latest - self._origin
        if self.total is None or not steps or not seconds:
            return math.nan
        return max(0.0, (self.total - self.done) * seconds / steps - (self._clock() - self._latest))

    @property
    def figures(self) -> str:
        """ "11/20, 55 %, 1 min 40 s, 15 min 00 s left"."""
        if self.total is None:
            return duration(self.seconds)
        share = f", {100 * self.done / self.total:.0f} %" if self.total else ""
        left = f", {duration(self.remaining)} left" if self.remaining > 0 else ""
        return f"{self.done}/{self.total}{share}, {duration(self.seconds)}{left}"

    @property
    def has_news(self) -> bool:
        """Whether steps were done since the latest line."""
        return self.done > self._written_done

    @property
    def is_due(self) -> bool:
        return self._clock() - self._written >= PAUSE

    def line(self) -> str:
        """For a pipe, which a line is written to now."""
        self._written, self._written_done = self._clock(), self.done
        return f"{self.label} {self.figures}"
