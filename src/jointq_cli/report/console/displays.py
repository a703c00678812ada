"""Where a run is displayed: the interface, which itself shows nothing, and lines of text for the log and for pipes.

Knows when a line is due and no control codes. `terminal` has the displays with colours and live progress bars.
"""

import math
import os
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

    No method raises an error because the reader of its stream is gone.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock

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


def outcome(state: State, seconds: float) -> str:
    """How a stage ended: "12.3 s", "reused", "failed after 12.3 s"."""
    if state == "done":
        return duration(seconds)
    return state if state == "reused" else f"{state} after {duration(seconds)}"


class LogDisplay(Display):
    """Lines of text for the log: everything but progress bars."""

    progress, warning = "", "WARNING "  # what such lines begin with

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self._write = write
        self._needs_heading = True

    def header(self, pairs: list[tuple[str, str]]) -> None:
        self._write("\n".join(aligned(pairs)))

    def stage_starts(self, name: str) -> None:
        self._needs_heading = True
        self._write(f"{self.progress}{name} ...")

    def stage_ends(self, name: str, state: State, seconds: float) -> None:
        self._write(f"{self.progress}{name} {outcome(state, seconds)}")

    def layer(self, record: LayerRecord) -> None:
        if self._needs_heading:
            self._write(layer_heading())
            self._needs_heading = False
        self._write(layer_row_with_notes(record))

    def note(self, text: str) -> None:
        self._write(text)

    def warn(self, text: str) -> None:
        self._write(f"{self.warning}{text}")

    def summary(self, summary: FinalSummary) -> None:
        self._write("\n".join(summary.as_text()))

    def tables(self, document: TableDocument) -> None:
        self._write("\n".join(document.as_text()))


class PlainDisplay(LogDisplay):
    """Lines for a pipe or a file: no colours, no carriage returns, and few enough to be read."""

    progress, warning = "[progress] ", "[warning] "

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        super().__init__(self._print, clock)
        self._stream: TextIO | None = stream

    def bar(self, description: str, total: int) -> PhaseBar:
        return PlainPhaseBar(description, total, self._clock, self._print)

    def summary(self, summary: FinalSummary) -> None:
        self._print("")
        super().summary(summary)

    def _print(self, text: str) -> None:
        if self._stream is None:
            return
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            self._stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
            self._stream.flush()
        except BrokenPipeError:
            # The reader, such as `| head`, has exited. A run of hours continues all the same; the log has everything.
            stream, self._stream = self._stream, None
            # Without this, Python would report at exit that it cannot flush the stream's buffer.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


class BriefPlainDisplay(PlainDisplay):
    """Progress, notes such as that a job waits, and warnings of one job of a sweep; the rest is in the job's log."""

    def __init__(self, label: str, stream: TextIO, clock: Callable[[], float]) -> None:
        super().__init__(stream, clock)
        self._label = label

    def header(self, pairs: list[tuple[str, str]]) -> None:
        pass

    def stage_starts(self, name: str) -> None:
        pass

    def stage_ends(self, name: str, state: State, seconds: float) -> None:
        super().stage_ends(f"{self._label}: {name}", state, seconds)

    def bar(self, description: str, total: int) -> PhaseBar:
        return super().bar(f"{self._label}: {description}", total)

    def layer(self, record: LayerRecord) -> None:
        pass

    def note(self, text: str) -> None:
        super().note(f"{self.progress}{self._label}: {text}")

    def warn(self, text: str) -> None:
        super().warn(f"{self._label}: {text}")

    def summary(self, summary: FinalSummary) -> None:
        pass


class PlainPhaseBar(PhaseBar):
    """A line after each tenth of the phase, but at most one per LEAST_PAUSE."""

    def __init__(self, description: str, total: int, clock: Callable[[], float], write: Callable[[str], None]) -> None:
        super().__init__(description, total, clock)
        self._write = write
        self._written_tenths = 0
        self._written_steps = 0
        self._written_at = 0.0  # seconds since the start

    def draw(self) -> None:
        pause = self.rate.elapsed - self._written_at
        advanced = self._tenths() > self._written_tenths
        if (advanced and pause >= LEAST_PAUSE) or pause >= LONGEST_PAUSE:
            self._write_line()

    def close(self) -> None:
        if self.rate.done > self._written_steps:
            self._write_line()

    def _tenths(self) -> int:
        return TENTHS * self.rate.done // self.rate.total if self.rate.total else TENTHS

    def _write_line(self) -> None:
        self._written_tenths, self._written_steps = self._tenths(), self.rate.done
        self._written_at = self.rate.elapsed
        self._write(f"[progress] {self.label} {_in_words(self.rate)}")


def _in_words(rate: ProgressRate) -> str:
    """ "120/210, 57 %, 1 min 20 s, 59.1 s left"; without the time left while the rate is unknown."""
    rest = "" if math.isnan(rate.remaining) or not rate.remaining else f", {duration(rate.remaining)} left"
    return f"{rate.done}/{rate.total}, {100 * rate.fraction:.0f} %, {duration(rate.elapsed)}{rest}"
