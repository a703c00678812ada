"""Reports a command's progress and result on a display and in the log file.

Knows the records and the time. Measures and decides nothing. Imports rich only for a terminal.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from jointq_cli.errors import Interrupted, JointqError
from jointq_cli.records import EvaluationReport, ExportRecord, LayerRecord, RotationRecord, RunReport, StageRecord
from jointq_cli.report.console.displays import Display, LogDisplay, PhaseBar, PlainDisplay, State
from jointq_cli.report.console.final_summary import (
    FinalSummary,
    evaluate_summary,
    export_summary,
    quantize_summary,
    rotate_summary,
)
from jointq_cli.report.console.log_file import LogFile
from jointq_cli.report.number_format import plural
from jointq_cli.report.tables.table import TableDocument
from jointq_cli.system.machine import peak_memory


class StageTimer:
    """One stage of a pipeline, while it runs and after."""

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self.name = name
        self.seconds = 0.0  # set when the stage ends
        self.is_reused = False  # whether the result came from the store
        self._clock = clock
        self._start = clock()

    def record(self) -> StageRecord:
        """Its row in the report, valid after its end. Peak memory is that of the process so far."""
        return StageRecord(self.name, self.seconds, self.is_reused, peak_memory())

    def finish(self) -> None:
        self.seconds = self._clock() - self._start


class Console:
    """Reports a run on a display and in a log. Leaving its context restores the terminal and Python's warnings.

    log_path: the log file, None for none. quiet: display nothing, unless `brief` and not on a terminal. brief: if not
    empty, display nothing but warnings and progress, in lines that begin with this text, for a job of a sweep. stream:
    standard output if None; a terminal gets colours and live progress bars, anything else plain lines. width: columns,
    None to ask the terminal. Raises ResourceError when the log cannot be written.
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
        self.is_brief = bool(brief)
        self.warnings: list[str] = []  # all texts of `warn`, for the report
        self._clock = clock
        self._display = _display(sys.stdout if stream is None else stream, quiet, brief, width, clock)
        self._log = None if log_path is None else LogFile(log_path)
        self._displays = [self._display, *([LogDisplay(self._log.write, clock)] if self._log is not None else [])]
        self._exits = ExitStack()

    def __enter__(self) -> Self:
        self._exits.callback(self._display.close)
        if self._log is not None:
            self._exits.enter_context(self._log)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None and self._log is not None:
                self._log.write(_final_entry(error))
        finally:
            self._exits.close()

    def add(self, display: Display) -> None:
        """Another display, of what is reported from now on."""
        self._displays.append(display)

    def header(self, pairs: list[tuple[str, str]]) -> None:
        """pairs: (label, value) of recipe, model, calibration, protocol and device."""
        for display in self._displays:
            display.header(pairs)

    @contextmanager
    def stage(self, name: str) -> Iterator[StageTimer]:
        """Reports the start of a stage and, at its end, its duration or how else it ended."""
        stage = StageTimer(name, self._clock)
        for display in self._displays:
            display.stage_starts(name)
        state: State = "done"
        try:
            yield stage
            state = "reused" if stage.is_reused else "done"
        except BaseException as error:
            state = "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
            raise
        finally:
            stage.finish()
            for display in self._displays:
                display.stage_ends(name, state, stage.seconds)

    def bar(self, description: str, total: int) -> AbstractContextManager[PhaseBar]:
        """The progress bar of a phase of `total` steps; call `.advance(n=1)` on what it yields."""
        return closing(self._display.bar(description, total))

    def layer(self, record: LayerRecord) -> None:
        """Adds a row to the table of layers."""
        for display in self._displays:
            display.layer(record)

    def note(self, text: str) -> None:
        for display in self._displays:
            display.note(text)

    def warn(self, text: str) -> None:
        """Something that the user should look at; kept in `warnings`."""
        self.warnings.append(text)
        for display in self._displays:
            display.warn(text)

    def show_run(self, report: RunReport, run_directory: Path) -> None:
        """The result of `jointq quantize`, where its files are, and what to do next."""
        self._show(quantize_summary(report, _relative(run_directory)))

    def show_rotation(self, record: RotationRecord, run_directory: Path) -> None:
        """The result of `jointq rotate`."""
        self._show(rotate_summary(record, _relative(run_directory)))

    def show_evaluation(self, report: EvaluationReport, run_directory: Path) -> None:
        """The result of `jointq evaluate`."""
        self._show(evaluate_summary(report, _relative(run_directory)))

    def show_exports(self, records: list[ExportRecord], places: list[Path]) -> None:
        """What `jointq export` has written, and where."""
        self._show(export_summary(records, [_relative(place.absolute()) for place in places]))

    def show_tables(self, document: TableDocument) -> None:
        for display in self._displays:
            display.tables(document)

    def _show(self, summary: FinalSummary) -> None:
        for display in self._displays:
            display.summary(summary)
        if self._log is not None and self._log.library_warnings:
            count = plural(self._log.library_warnings, "library warning")
            self._display.note(f"{count} in {self._log.path}")


def _display(stream: TextIO, quiet: bool, brief: str, width: int | None, clock: Callable[[], float]) -> Display:
    is_terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
    if quiet and (is_terminal or not brief):  # the output of a job on another machine is a log of its own
        return Display(clock)
    if not is_terminal:
        return PlainDisplay(stream, clock, brief)
    from jointq_cli.report.console.terminal import TerminalDisplay  # rich takes a while to import

    return TerminalDisplay(stream, clock, width, brief)


def _relative(path: Path) -> Path:
    """Relative to the working directory, if it is below that."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _final_entry(error: BaseException) -> str:
    """The last log entry of a failed run: one line for an error of the user's, the traceback for a bug of ours."""
    if isinstance(error, JointqError):
        return f"ERROR {error}"
    return "".join(traceback.format_exception(error)).rstrip()
