"""What the engine tells a person while it works: one voice for the screen and for the log file.

Knows the records and when things happened; measures and decides nothing. Imports rich only for a terminal.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from jointq_cli.errors import Interrupted, JointqError
from jointq_cli.records import EvaluationReport, LayerRecord, RotationRecord, RunReport, StageRecord
from jointq_cli.report import number_format as units
from jointq_cli.report.console import lines
from jointq_cli.report.console.log_file import LogFile
from jointq_cli.report.console.screens import Bar, PlainScreen, Screen, SilentScreen, State, opened
from jointq_cli.report.tables.table import Sheet
from jointq_cli.system.machine import peak_memory


class StageTimer:
    """One step of the road, while it is taken and after."""

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self.name = name
        self.seconds = 0.0  # known once the stage has ended
        self.is_reused = False
        self._clock = clock
        self._start = clock()

    def reused(self) -> None:
        """Marks that the store had its result."""
        self.is_reused = True

    def record(self) -> StageRecord:
        """What the report keeps of it, to be asked after its end. Peak memory: the process's so far."""
        return StageRecord(self.name, self.seconds, self.is_reused, peak_memory())

    def finish(self) -> None:
        self.seconds = self._clock() - self._start


class Console:
    """Tells a run's story on a screen and in a log. Leaving its context restores terminal and warnings.

    log_path: the log file, None for none. quiet: nothing on the screen. brief: nothing but one live line, which
    begins with these words; somebody else tells what comes of it. stream: where to write, standard
    output if None; a terminal there is drawn on, anything else gets plain lines. width: columns, None to ask
    the terminal. Raises ResourceError when the log cannot be written.
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
        self.warnings: list[str] = []  # what `warn` was told, for the report
        self._clock = clock
        self._screen = _screen(sys.stdout if stream is None else stream, quiet, brief, width, clock)
        self._log = None if log_path is None else LogFile(log_path)
        self._exits = ExitStack()
        self._rows = 0

    def __enter__(self) -> Self:
        self._exits.callback(self._screen.close)
        if self._log is not None:
            self._exits.enter_context(self._log)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                self._write(_last_words(error))
        finally:
            self._exits.close()

    def header(self, pairs: list[tuple[str, str]]) -> None:
        """pairs: (what, value): recipe, model, calibration, protocol, device."""
        self._write("\n".join(lines.aligned(pairs)))
        self._screen.header(pairs)

    @contextmanager
    def stage(self, name: str) -> Iterator[StageTimer]:
        """Announces a stage, and tells at its end how long it took or how else it ended."""
        stage = StageTimer(name, self._clock)
        self._write(f"{name} ...")
        self._rows = 0
        self._screen.stage_starts(name)
        state: State = "done"
        try:
            yield stage
            state = "reused" if stage.is_reused else "done"
        except BaseException as error:
            state = "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
            raise
        finally:
            stage.finish()
            self._screen.stage_ends(name, state, stage.seconds)
            self._write(f"{name} {lines.outcome(state, stage.seconds)}")

    def bar(self, description: str, total: int) -> AbstractContextManager[Bar]:
        """The bar of a phase of `total` steps; what it yields has `.advance(n=1)`."""
        return opened(self._screen.bar(description, total))

    def layer(self, record: LayerRecord) -> None:
        """A row for a layer that has just been quantised."""
        if not self._rows:
            self._write(lines.layer_heading(lines.PLAIN_NAME_WIDTH))
        self._rows += 1
        self._write(lines.layer_entry(record))
        self._screen.layer(record)

    def note(self, text: str) -> None:
        self._write(text)
        self._screen.note(text)

    def warn(self, text: str) -> None:
        """Something that the user should look at; kept in `warnings`."""
        self.warnings.append(text)
        self._write(f"WARNING {text}")
        self._screen.warn(text)

    def closing(self, report: RunReport, run_directory: Path) -> None:
        """The result of a quantisation, where it lies, and what to do next."""
        self._close(lines.closing_of_run(report, _from_here(run_directory)))

    def rotated(self, record: RotationRecord, run_directory: Path) -> None:
        """The result of a rotation."""
        self._close(lines.closing_of_rotation(record, _from_here(run_directory)))

    def measured(self, report: EvaluationReport, run_directory: Path) -> None:
        """The result of an evaluation."""
        self._close(lines.closing_of_evaluation(report, _from_here(run_directory)))

    def side_by_side(self, sheet: Sheet) -> None:
        """Several runs, as `jointq compare` tells of them."""
        self._write("\n".join(sheet.as_text()))
        self._screen.side_by_side(sheet)

    def _close(self, closing: lines.Closing) -> None:
        self._write("\n".join(closing.as_text()))
        self._screen.closing(closing)
        if self._log is not None and self._log.library_warnings:
            count = units.plural(self._log.library_warnings, "library warning")
            self._screen.note(f"{count} in {self._log.path}")

    def _write(self, text: str) -> None:
        if self._log is not None:
            self._log.write(text)


def _screen(stream: TextIO, quiet: bool, brief: str, width: int | None, clock: Callable[[], float]) -> Screen:
    drawn = stream.isatty() and os.environ.get("TERM") != "dumb"
    if quiet or (brief and not drawn):
        return SilentScreen(clock)
    if not drawn:
        return PlainScreen(stream, clock)
    from jointq_cli.report.console.terminal import BriefScreen, TerminalScreen  # rich takes a while to import

    return BriefScreen(brief, stream, clock, width) if brief else TerminalScreen(stream, clock, width)


def _from_here(path: Path) -> Path:
    """The shorter way to write a path under the working directory."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _last_words(error: BaseException) -> str:
    """A failed run's last log entry: a line for what a user caused, the traceback for a bug of ours."""
    if isinstance(error, JointqError):
        return f"ERROR {error}"
    return "".join(traceback.format_exception(error)).rstrip()
