"""Where a run is displayed: the interface, which itself shows nothing, and lines of text for the log and for pipes.

Knows when a line is due and no control codes. `terminal` has the display with colours and a live progress bar.
"""

import math
from collections.abc import Callable
from typing import Literal, TextIO

from jointq_cli.records import LayerRecord
from jointq_cli.report.console.final_summary import FinalSummary
from jointq_cli.report.console.layer_rows import layer_heading, layer_row_with_notes
from jointq_cli.report.console.progress_rate import ProgressRate
from jointq_cli.report.number_format import duration
from jointq_cli.report.tables.table import TableDocument, aligned

TENTHS = 10  # a phase that is neither quick nor slow gets a line per tenth
LEAST_PAUSE = 2.0  # seconds between two lines of one phase
LONGEST_PAUSE = 30.0  # seconds after which a line is due even without another tenth

State = Literal["done", "reused", "failed", "interrupted"]


class PhaseBar:
    """The progress of one phase. This base class draws nothing."""

    def __init__(self, description: str, total: int, clock: Callable[[], float]) -> None:
        self.description = description
        self.status = ""  # an intermediate result, shown after the description
        self.rate = ProgressRate(total, clock)

    @property
    def label(self) -> str:
        """Description and status."""
        return f"{self.description} {self.status}".rstrip()

    def advance(self, n: int = 1, status: str = "") -> None:
        self.rate.advance(n)
        self.status = status
        self.draw()

    def draw(self) -> None: ...

    def close(self) -> None: ...


class Display:
    """Shows what the console reports. This base class shows nothing: it is the display of a quiet console.

    job: of a sweep, such as "job 3". If not empty, what is shown begins with it, and headers, layers and summaries are
    left to the job's log. No method raises an error because the reader of its stream is gone.
    """

    def __init__(self, clock: Callable[[], float], job: str = "") -> None:
        self._clock = clock
        self._job = job

    def header(self, pairs: list[tuple[str, str]]) -> None: ...

    def stage_starts(self, name: str) -> None: ...

    def stage_ends(self, name: str, state: State, seconds: float) -> None: ...

    def bar(self, description: str, total: int) -> PhaseBar:
        return PhaseBar(description, total, self._clock)

    def layer(self, record: LayerRecord) -> None: ...

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def summary(self, summary: FinalSummary) -> None: ...

    def tables(self, document: TableDocument) -> None: ...

    def close(self) -> None:
        """Restores the terminal, whatever is still open."""

    def _named(self, text: str) -> str:
        return f"{self._job}: {text}" if self._job else text


def outcome(state: State, seconds: float) -> str:
    """How a stage ended: "12.3 s", "reused", "failed after 12.3 s"."""
    if state == "done":
        return duration(seconds)
    return state if state == "reused" else f"{state} after {duration(seconds)}"


class LogDisplay(Display):
    """Lines of text for the log: everything but progress bars."""

    progress, warning = "", "WARNING "  # what such lines begin with

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float], job: str = "") -> None:
        super().__init__(clock, job)
        self._write = write
        self._needs_heading = True

    def header(self, pairs: list[tuple[str, str]]) -> None:
        self._write_in_full("\n".join(aligned(pairs)))

    def stage_starts(self, name: str) -> None:
        self._needs_heading = True
        self._write_in_full(f"{self.progress}{name} ...")

    def stage_ends(self, name: str, state: State, seconds: float) -> None:
        self._write(f"{self.progress}{self._named(name)} {outcome(state, seconds)}")

    def layer(self, record: LayerRecord) -> None:
        if self._needs_heading:
            self._write_in_full(layer_heading())
            self._needs_heading = False
        self._write_in_full(layer_row_with_notes(record))

    def note(self, text: str) -> None:
        self._write(f"{self.progress}{self._named(text)}" if self._job else text)

    def warn(self, text: str) -> None:
        self._write(f"{self.warning}{self._named(text)}")

    def summary(self, summary: FinalSummary) -> None:
        self._write_in_full("\n".join(summary.as_text()))

    def tables(self, document: TableDocument) -> None:
        self._write("\n".join(document.as_text()))

    def _write_in_full(self, text: str) -> None:
        if not self._job:
            self._write(text)


class PlainDisplay(LogDisplay):
    """Lines for a pipe or a file: no colours, no carriage returns, and few enough to be read."""

    progress, warning = "[progress] ", "[warning] "

    def __init__(self, stream: TextIO, clock: Callable[[], float], job: str = "") -> None:
        super().__init__(self._print, clock, job)
        self._stream: TextIO | None = stream

    def bar(self, description: str, total: int) -> PhaseBar:
        return PlainPhaseBar(self._named(description), total, self._clock, self._print)

    def summary(self, summary: FinalSummary) -> None:
        self._write_in_full("")
        super().summary(summary)

    def _print(self, text: str) -> None:
        if self._stream is not None:
            try:
                print(text, file=self._stream, flush=True)
            except BrokenPipeError:  # the reader, such as `head`, has left; the run goes on, and the log has everything
                self._stream = None


class PlainPhaseBar(PhaseBar):
    """A line after each tenth of the phase, but at most one per LEAST_PAUSE."""

    def __init__(self, description: str, total: int, clock: Callable[[], float], write: Callable[[str], None]) -> None:
        super().__init__(description, total, clock)
        self._write = write
        self._written_steps = 0
        self._written_at = 0.0  # seconds since the start

    def draw(self) -> None:
        pause = self.rate.elapsed - self._written_at
        advanced = self._tenths(self.rate.done) > self._tenths(self._written_steps)
        if (advanced and pause >= LEAST_PAUSE) or pause >= LONGEST_PAUSE:
            self._write_line()

    def close(self) -> None:
        if self.rate.done > self._written_steps:
            self._write_line()

    def _tenths(self, steps: int) -> int:
        return TENTHS * steps // self.rate.total if self.rate.total else TENTHS

    def _write_line(self) -> None:
        rate = self.rate
        self._written_steps, self._written_at = rate.done, rate.elapsed
        left = "" if math.isnan(rate.remaining) or not rate.remaining else f", {duration(rate.remaining)} left"
        percent = f"{100 * rate.fraction:.0f} %"
        self._write(f"[progress] {self.label} {rate.done}/{rate.total}, {percent}, {duration(rate.elapsed)}{left}")
