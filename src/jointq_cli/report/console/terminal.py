"""A run displayed on a terminal with rich: panels, colours, one live progress bar."""

import math
from collections.abc import Callable
from typing import TextIO

from rich.box import ROUNDED
from rich.console import Console as Rich
from rich.panel import Panel
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from jointq_cli import __version__
from jointq_cli.records import LayerRecord
from jointq_cli.report.console.displays import Display, PhaseBar, State, outcome
from jointq_cli.report.console.final_summary import FinalSummary
from jointq_cli.report.console.layer_rows import layer_heading, layer_row, name_width
from jointq_cli.report.console.progress_rate import ProgressRate
from jointq_cli.report.number_format import KeyMetric, duration
from jointq_cli.report.summary import DAMPED, FALLBACK, layer_notes
from jointq_cli.report.tables.table import BEST_MARK, GAP, TableDocument, TextTable

VERDICT_STYLES = {FALLBACK: "bold red", DAMPED: "yellow"}
STATE_STYLES = {"done": "green", "reused": "cyan", "failed": "bold red", "interrupted": "yellow"}
STATE_MARKS = {"done": "✓", "reused": "↺", "failed": "✗", "interrupted": "■"}
FULL_WIDTH = 110  # columns; wider panels are harder to read
LABEL_STYLE = "dim"
LABEL_WIDTH = 20  # columns; the same in all parts of the final summary


class TerminalDisplay(Display):
    """One live line at the bottom, everything else scrolls above it.

    The live line is the innermost open progress bar, or else the spinner of the stage. rich obeys NO_COLOR.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float], width: int | None = None) -> None:
        super().__init__(clock)
        # force_terminal: the caller has already checked that the stream is a terminal.
        self._rich = Rich(file=stream, force_terminal=True, highlight=False, markup=False, width=width)
        self._progress: Progress | None = None
        self._open: list[TaskID] = []
        self._needs_heading = True

    def header(self, pairs: list[tuple[str, str]]) -> None:
        title = Text(f"jointq {__version__}", style="bold")
        self._rich.print(Panel(_pairs(pairs), title=title, title_align="left", box=ROUNDED, width=self._panel_width()))

    def stage_starts(self, name: str) -> None:
        self._needs_heading = True
        self.show_live(name, None)

    def stage_ends(self, name: str, state: State, seconds: float) -> None:
        self.drop_live()
        style = STATE_STYLES[state]
        self._rich.print(
            Text.assemble(
                (f"{STATE_MARKS[state]} ", style),
                f"{name:<{LABEL_WIDTH - 2}}  ",
                (outcome(state, seconds), style),
            )
        )

    def bar(self, description: str, total: int) -> PhaseBar:
        return TerminalPhaseBar(description, total, self._clock, self)

    def layer(self, record: LayerRecord) -> None:
        width = name_width(self._rich.width)
        if self._needs_heading:
            self._print_line(Text(layer_heading(width), style="bold"))
            self._needs_heading = False
        line = Text(layer_row(record, width), style=VERDICT_STYLES.get(record.verdict, ""))
        notes = layer_notes(record)
        if notes and len(line) + len(notes) + 2 < self._rich.width:
            line.append(f"  {notes}", style="dim")
        self._print_line(line)

    def note(self, text: str) -> None:
        self._rich.print(Text(text))

    def warn(self, text: str) -> None:
        self._rich.print(Text.assemble(("warning: ", "bold yellow"), (text, "yellow")))

    def summary(self, summary: FinalSummary) -> None:
        self._headline(summary.headline, summary.problems)
        self._rich.print(_metrics(summary.metrics))
        self._rich.print()
        self._rich.print(_pairs(summary.details, LABEL_WIDTH))
        self._rich.print()
        for label, value in summary.next_steps:
            # Not folded, so that a path or a command can be copied in one piece.
            line = Text.assemble((f"{label:<{LABEL_WIDTH}}  ", LABEL_STYLE), value)
            self._rich.print(line, soft_wrap=True)

    def tables(self, document: TableDocument) -> None:
        self._headline(document.headline, [*document.problems, *document.warnings])
        for table in document.shown:
            self._rich.print()
            self._rich.print(Text(table.title, style="bold"))
            for part in table.folded(self._rich.width):
                self._rich.print(_columns(part))
        self._rich.print()
        for note in document.notes:
            self._rich.print(Text(note, style=LABEL_STYLE))

    def close(self) -> None:
        self._open.clear()
        self._stop()

    def show_live(self, description: str, rate: ProgressRate | None) -> TaskID:
        """Replaces the live line by a new one. rate: None for a spinner without a bar."""
        if self._progress is None:
            self._progress = _live_line(self._rich)
            self._progress.start()
        if self._open:
            self._progress.update(self._open[-1], visible=False)
        task = self._progress.add_task(description, total=None if rate is None else rate.total, rate=rate)
        self._open.append(task)
        return task

    def update_live(self, task: TaskID, done: int, description: str) -> None:
        if self._progress is not None:
            self._progress.update(task, completed=done, description=description)

    def drop_live(self) -> None:
        """Removes the innermost live line and shows the previous one again."""
        if self._progress is None or not self._open:
            return
        self._progress.remove_task(self._open.pop())
        if self._open:
            self._progress.update(self._open[-1], visible=True)
        else:
            self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _headline(self, headline: str, problems: list[str]) -> None:
        text = Text(headline, style="bold")
        for problem in problems:
            text.append(f"\n! {problem}", style="red")
        style = "red" if problems else "green"
        self._rich.print(Panel(text, box=ROUNDED, border_style=style, width=self._panel_width()))

    def _print_line(self, line: Text) -> None:
        line.no_wrap, line.overflow = True, "ellipsis"
        self._rich.print(line)

    def _panel_width(self) -> int:
        return min(self._rich.width, FULL_WIDTH)


class BriefDisplay(TerminalDisplay):
    """Only the live line and warnings, for one job of a sweep; the rest is in the log of the job."""

    def __init__(self, label: str, stream: TextIO, clock: Callable[[], float], width: int | None = None) -> None:
        super().__init__(stream, clock, width)
        self._label = label

    def header(self, pairs: list[tuple[str, str]]) -> None:
        pass

    def stage_starts(self, name: str) -> None:
        super().stage_starts(f"{self._label}: {name}")

    def stage_ends(self, name: str, state: State, seconds: float) -> None:
        self.drop_live()

    def bar(self, description: str, total: int) -> PhaseBar:
        return super().bar(f"{self._label}: {description}", total)

    def layer(self, record: LayerRecord) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        super().warn(f"{self._label}: {text}")

    def summary(self, summary: FinalSummary) -> None:
        pass


class TerminalPhaseBar(PhaseBar):
    """The live line of a phase."""

    def __init__(self, description: str, total: int, clock: Callable[[], float], display: TerminalDisplay) -> None:
        super().__init__(description, total, clock)
        self._display = display
        self._task = display.show_live(description, self.rate)

    def draw(self) -> None:
        self._display.update_live(self._task, self.rate.done, self.label)

    def close(self) -> None:
        self._display.drop_live()


class _BarColumn(BarColumn):
    """The bar; nothing for a stage whose progress is unknown."""

    def render(self, task: Task) -> Text:  # type: ignore[override]
        return Text() if task.total is None else super().render(task)  # type: ignore[return-value]


class _CountColumn(ProgressColumn):
    """Steps, time so far and time left."""

    def render(self, task: Task) -> Text:
        rate: ProgressRate | None = task.fields["rate"]
        if rate is None:
            return Text(duration(task.elapsed or 0.0), style="dim")
        remaining = rate.remaining
        left = "" if math.isnan(remaining) else f", {duration(remaining)} left"
        return Text.assemble(f"{rate.done}/{rate.total}  {duration(rate.elapsed)}", (left, "cyan"))


def _live_line(rich: Rich) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        _BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
        _CountColumn(),
        console=rich,
        transient=True,
        expand=True,
    )


def _metrics(metrics: list[KeyMetric]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(min_width=LABEL_WIDTH)
    for metric in metrics:
        table.add_row(Text(metric.label), Text(metric.value, style="bold"), Text(metric.detail, style=LABEL_STYLE))
    return table


def _columns(text_table: TextTable) -> Table:
    """The best cell of a column is in colour."""
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style=LABEL_STYLE)
    for index, heading in enumerate(text_table.heading):
        table.add_column(Text(heading), justify="left" if index < text_table.stub else "right", overflow="fold")
    for row in text_table.rows:
        table.add_row(*(Text(cell, style="bold green" if cell.endswith(BEST_MARK) else "") for cell in row))
    return table


def _pairs(pairs: list[tuple[str, str]], label_width: int = 0) -> Table:
    """Labels in one column, values in the next, long values folded within their column."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style=LABEL_STYLE, no_wrap=True, min_width=label_width)
    grid.add_column(overflow="fold")
    for label, value in pairs:
        grid.add_row(Text(label), Text(value))
    return grid
