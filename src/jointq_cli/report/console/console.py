"""Reports a command's progress and result on the screen and in the log file. Measures and decides nothing."""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self, TextIO, cast

from rich.console import Console as Rich
from rich.console import RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jointq_cli import __version__
from jointq_cli.errors import Interrupted, JointqError
from jointq_cli.records import LayerRecord, StageRecord
from jointq_cli.report.console.documents import framed, pairs, rendered
from jointq_cli.report.console.layer_rows import LEGEND, layer_row
from jointq_cli.report.console.log_file import LogFile
from jointq_cli.report.console.progress import Phase
from jointq_cli.report.number_format import duration, plural
from jointq_cli.report.tables.table import TableDocument
from jointq_cli.system.machine import peak_memory

Listener = Callable[[LayerRecord | StageRecord], None]
MARKS = {"done": ("✓", "green"), "reused": ("↺", "cyan"), "failed": ("✗", "bold red"), "interrupted": ("■", "yellow")}
ENDLESS = 10_000  # columns of pipes and logs, whose lines are not folded, so that `grep` and `cut` work on them
NARROW = 64  # columns; below, there is no space for a bar beside its text


@dataclass
class StageTimer:
    """One stage of a pipeline, while it runs and after."""

    name: str
    seconds: float = 0.0  # set when the stage ends
    is_reused: bool = False  # whether the result came from the store

    def record(self) -> StageRecord:
        """Its row in the report, valid after its end. Peak memory is that of the process so far."""
        return StageRecord(self.name, self.seconds, self.is_reused, peak_memory())


class _Output(Rich):
    """Shows texts as they are: [brackets] are no markup, and numbers have no colour. rich obeys NO_COLOR."""

    def __init__(self, file: IO[str], *, is_terminal: bool, width: int | None = None) -> None:
        super().__init__(
            file=file, force_terminal=is_terminal, color_system="auto" if is_terminal else None,
            width=width if is_terminal else ENDLESS, highlight=False, markup=False, emoji=False,
        )  # fmt: skip

    def on_broken_pipe(self) -> None:
        """The reader, such as `head`, has left; the run goes on, and the log has everything."""
        self.quiet = True


class Console:
    """Reports a run on the screen and in a log. Leaving its context restores the terminal and Python's warnings.

    log_path: the log file, None for none. quiet: show nothing, unless `brief` and not on a terminal. brief: if not
    empty, show nothing but warnings, notes and progress, in lines that begin with this text, for a job of a sweep; its
    log has the rest. stream: standard output if None; a terminal gets colours and a live line, others plain lines.
    width: columns, None to ask the terminal. Raises ResourceError when the log cannot be written.
    """

    def __init__(
        self,
        log_path: Path | None = None,
        *,
        quiet: bool = False,
        brief: str = "",
        stream: TextIO | None = None,
        width: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        stream = sys.stdout if stream is None else stream
        is_terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
        is_hidden = quiet and (is_terminal or not brief)  # the output of a job on another machine is a log of its own
        self.is_brief = bool(brief)
        self.warnings: list[str] = []  # all texts of `warn`, for the report
        self._clock = clock
        self._job = f"{brief}: " if brief else ""
        self._screen = _Output(stream, is_terminal=is_terminal and not is_hidden, width=width)
        self._screen.quiet = is_hidden
        self._log = None if log_path is None else LogFile(log_path)
        logs = [] if self._log is None else [_Output(cast("IO[str]", self._log), is_terminal=False)]
        self._everywhere = [self._screen, *logs]
        self._in_full = logs if brief else self._everywhere
        self._listeners: list[Listener] = []
        self._phases: list[Phase] = []  # that run, the innermost last
        self._live = Live(console=self._screen, get_renderable=self._live_line, transient=True)
        self._needs_heading = True
        self._exits = ExitStack()

    def __enter__(self) -> Self:
        self._exits.callback(self._live.stop)
        if self._log is not None:
            self._exits.enter_context(self._log)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._exits:
            if self._log is not None and error is not None:
                self._log.write(_final_entry(error))
            elif self._log is not None and self._log.library_warnings:
                count = plural(self._log.library_warnings, "library warning")
                self._screen.print(f"{self._job}{count} in {self._log.path}")

    def add(self, listener: Listener) -> None:
        """Passes layers, and stages that were computed, to a listener from now on."""
        self._listeners.append(listener)

    def header(self, lines: list[tuple[str, str]]) -> None:
        """lines: (label, value) of recipe, model, calibration, protocol and device."""
        grid = pairs(lines, label_width=0)
        for out in self._in_full:
            out.print(framed(grid, out.width, f"jointq {__version__}") if out.is_terminal else grid)

    @contextmanager
    def stage(self, name: str) -> Iterator[StageTimer]:
        """Reports the start of a stage and, at its end, its duration or how else it ended."""
        stage = StageTimer(name)
        state = "done"
        self._needs_heading = True
        for out in self._in_full:
            if not out.is_terminal:  # which has the live line
                out.print(f"{name} ...")
        try:
            with self.bar(name, None) as phase:
                yield stage
            state = "reused" if stage.is_reused else "done"
        except BaseException as error:
            state = "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
            raise
        finally:
            stage.seconds = phase.seconds
            (mark, style), taken = MARKS[state], duration(stage.seconds)
            outcome = {"done": taken, "reused": "reused"}.get(state, f"{state} after {taken}")
            _print(self._in_full, Text.assemble((mark, style), f" {name:<18}  ", (outcome, style)))
            for listener in self._listeners if state == "done" else ():
                listener(stage.record())

    @contextmanager
    def bar(self, description: str, total: int | None) -> Iterator[Phase]:
        """The progress of a phase of `total` steps, None where that is not known; `.advance(n=1)` what it yields.

        Inside, a terminal's last line is about it; a pipe gets a line now and then, and one at its end.
        """
        phase = Phase(self._job + description, total, self._clock, self._on_step)
        self._phases.append(phase)
        if self._screen.is_terminal:
            self._live.start()
        try:
            yield phase
        finally:
            self._phases.remove(phase)
            if not self._phases:
                self._live.stop()
            if phase.has_news and not self._screen.is_terminal:
                self._screen.print(phase.line())

    def layer(self, record: LayerRecord) -> None:
        """Adds a row to the table of layers."""
        for out in self._in_full:
            if self._needs_heading:
                out.print(Text(LEGEND, style="dim"))
                out.print(layer_row(None, out.width))
            out.print(layer_row(record, out.width))
        self._needs_heading = False
        for listener in self._listeners:
            listener(record)

    def note(self, text: str) -> None:
        _print(self._everywhere, Text(self._job + text))

    def warn(self, text: str) -> None:
        """Something that the user should look at; kept in `warnings`."""
        self.warnings.append(text)
        _print(self._everywhere, Text.assemble(("warning: ", "bold yellow"), (self._job + text, "yellow")))

    def show(self, document: TableDocument) -> None:
        """Tables, or the result of a command."""
        for out in self._in_full:
            for part in rendered(document, out.width, boxed=out.is_terminal):
                out.print(part, crop=False)

    def _on_step(self, phase: Phase) -> None:
        if phase.is_due and not self._screen.is_terminal:
            self._screen.print(phase.line())

    def _live_line(self) -> RenderableType:
        if not self._phases:
            return ""
        phase = self._phases[-1]
        line = Table.grid(padding=(0, 1, 0, 0), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        bar = ProgressBar(phase.total, phase.done, complete_style="cyan", pulse_style="cyan")
        line.add_row(phase.label, "" if self._screen.width < NARROW else bar, phase.figures)
        return line


def _print(outputs: Sequence[Rich], line: Text) -> None:
    for out in outputs:
        out.print(line)


def _final_entry(error: BaseException) -> str:
    """The last log entry of a failed run: one line for an error of the user's, the traceback for a bug of ours."""
    if isinstance(error, JointqError):
        return f"ERROR {error}"
    return "".join(traceback.format_exception(error)).rstrip()
