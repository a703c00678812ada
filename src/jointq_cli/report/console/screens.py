"""Where a run shows itself: the interface of a screen, the silent one, and the plain lines of a pipe.

Knows when a line is due and no control code. What it says comes from `lines`; the drawn screen is `terminal`.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TextIO

from jointq_cli.records import LayerRecord
from jointq_cli.report.console import lines
from jointq_cli.report.console.pace import Pace
from jointq_cli.report.tables.table import Sheet

TENTHS = 10  # lines of a bar that is neither quick nor slow
LEAST_PAUSE = 2.0  # seconds between two lines of one bar
LONGEST_PAUSE = 30.0  # seconds after which a line is due although little has happened

State = Literal["done", "reused", "failed", "interrupted"]


class Screen(ABC):
    """Shows what the console is told. Never raises for what happens to the reader at its other end."""

    @abstractmethod
    def header(self, pairs: list[tuple[str, str]]) -> None: ...

    @abstractmethod
    def stage_starts(self, name: str) -> None: ...

    @abstractmethod
    def stage_ends(self, name: str, state: State, seconds: float) -> None: ...

    @abstractmethod
    def bar(self, description: str, total: int) -> "Bar": ...

    @abstractmethod
    def layer(self, record: LayerRecord) -> None: ...

    @abstractmethod
    def note(self, text: str) -> None: ...

    @abstractmethod
    def warn(self, text: str) -> None: ...

    @abstractmethod
    def closing(self, closing: lines.Closing) -> None: ...

    @abstractmethod
    def side_by_side(self, sheet: Sheet) -> None: ...

    @abstractmethod
    def close(self) -> None:
        """Leaves the terminal as it was found, whatever is still open."""


class Bar(ABC):
    """The progress of one phase."""

    def __init__(self, description: str, total: int, clock: Callable[[], float]) -> None:
        self.description = description
        self.status = ""  # what is known by now, beside how far it is
        self.pace = Pace(total, clock)

    @property
    def told(self) -> str:
        """Description and status."""
        return f"{self.description} {self.status}".rstrip()

    def advance(self, n: int = 1, status: str = "") -> None:
        self.pace.advance(n)
        self.status = status
        self.draw()

    @abstractmethod
    def draw(self) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


@contextmanager
def opened(bar: Bar) -> Iterator[Bar]:
    """Closes the bar at the end, whatever happens."""
    try:
        yield bar
    finally:
        bar.close()


class SilentScreen(Screen):
    """Shows nothing: for tests, and for runs that only the log should tell of."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock

    def header(self, pairs: list[tuple[str, str]]) -> None:
        pass

    def stage_starts(self, name: str) -> None:
        pass

    def stage_ends(self, name: str, state: State, seconds: float) -> None:
        pass

    def bar(self, description: str, total: int) -> Bar:
        return SilentBar(description, total, self._clock)

    def layer(self, record: LayerRecord) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    def closing(self, closing: lines.Closing) -> None:
        pass

    def side_by_side(self, sheet: Sheet) -> None:
        pass

    def close(self) -> None:
        pass


class SilentBar(Bar):
    def draw(self) -> None:
        pass

    def close(self) -> None:
        pass


class PlainScreen(Screen):
    """Lines for a pipe or a file: no colours, no carriage returns, and few enough to be read."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        self._stream: TextIO | None = stream
        self._clock = clock
        self._heading_due = True

    def header(self, pairs: list[tuple[str, str]]) -> None:
        self._print("\n".join(lines.aligned(pairs)))

    def stage_starts(self, name: str) -> None:
        self._heading_due = True
        self._print(f"[progress] {name} ...")

    def stage_ends(self, name: str, state: State, seconds: float) -> None:
        self._print(f"[progress] {name} {lines.outcome(state, seconds)}")

    def bar(self, description: str, total: int) -> Bar:
        return PlainBar(description, total, self._clock, self._print)

    def layer(self, record: LayerRecord) -> None:
        if self._heading_due:
            self._print(lines.layer_heading(lines.PLAIN_NAME_WIDTH))
            self._heading_due = False
        self._print(lines.layer_entry(record))

    def note(self, text: str) -> None:
        self._print(text)

    def warn(self, text: str) -> None:
        self._print(f"[warning] {text}")

    def closing(self, closing: lines.Closing) -> None:
        self._print("\n".join(["", *closing.as_text()]))

    def side_by_side(self, sheet: Sheet) -> None:
        self._print("\n".join(sheet.as_text()))

    def close(self) -> None:
        pass

    def _print(self, text: str) -> None:
        if self._stream is None:
            return
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            self._stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
            self._stream.flush()
        except BrokenPipeError:
            # `| head` has left. Hours of work need not end with it; the log still tells everything.
            self._silence()

    def _silence(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            # Python would complain at its exit about the buffer that nobody takes any more.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


class PlainBar(Bar):
    """A line after every tenth of the way, but not more often than every two seconds."""

    def __init__(self, description: str, total: int, clock: Callable[[], float], write: Callable[[str], None]) -> None:
        super().__init__(description, total, clock)
        self._write = write
        self._told_tenths = 0  # of the whole
        self._told_steps = 0
        self._told_at = 0.0  # seconds since the start

    def draw(self) -> None:
        pause = self.pace.elapsed - self._told_at
        further = self._tenths() > self._told_tenths
        if (further and pause >= LEAST_PAUSE) or pause >= LONGEST_PAUSE:
            self._tell()

    def close(self) -> None:
        if self.pace.done > self._told_steps:
            self._tell()

    def _tenths(self) -> int:
        return TENTHS * self.pace.done // self.pace.total if self.pace.total else TENTHS

    def _tell(self) -> None:
        self._told_tenths, self._told_steps = self._tenths(), self.pace.done
        self._told_at = self.pace.elapsed
        self._write(f"[progress] {self.told} {lines.progress(self.pace)}")
