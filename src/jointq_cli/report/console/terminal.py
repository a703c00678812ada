"""A run drawn on a terminal with rich: panels, colours, one live bar. Knows looks, not meanings."""

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
from jointq_cli.report import number_format as units
from jointq_cli.report.compare import summary
from jointq_cli.report.console import lines
from jointq_cli.report.console.pace import Pace
from jointq_cli.report.console.screens import Bar, Screen, State
from jointq_cli.report.tables.table import GAP, Sheet, TextTable

VERDICT_STYLES = {summary.FALLBACK: "bold red", summary.DAMPED: "yellow"}
STATE_STYLES = {"done": "green", "reused": "cyan", "failed": "bold red", "interrupted": "yellow"}
STATE_MARKS = {"done": "✓", "reused": "↺", "failed": "✗", "interrupted": "■"}
FULL_WIDTH = 110  # columns; wider panels are harder to read
LABEL_STYLE = "dim"
LABEL_WIDTH = 20  # columns; the same in all tables at the end, so that they read as one


class TerminalScreen(Screen):
    """One live line at the bottom, everything else scrolls above it.

    The live line is the innermost thing that is open: a bar, or else a stage's spinner. rich obeys NO_COLOR.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float], width: int | None = None) -> None:
        # force_terminal: whoever chose this screen knows already that there is a terminal.
        self._rich = Rich(file=stream, force_terminal=True, highlight=False, markup=False, width=width)
        self._clock = clock
        self._progress: Progress | None = None
        self._open: list[TaskID] = []
        self._heading_due = True

    def header(self, pairs: list[tuple[str, str]]) -> None:
        title = Text(f"jointq {__version__}", style="bold")
        self._rich.print(Panel(_grid(pairs), title=title, title_align="left", box=ROUNDED, width=self._panel_width()))

    def stage_starts(self, name: str) -> None:
        self._heading_due = True
        self.show_live(name, None)

    def stage_ends(self, name: str, state: State, seconds: float) -> None:
        self.drop_live()
        style = STATE_STYLES[state]
        self._rich.print(
            Text.assemble(
                (f"{STATE_MARKS[state]} ", style),
                f"{name:<{LABEL_WIDTH - 2}}  ",
                (lines.outcome(state, seconds), style),
            )
        )

    def bar(self, description: str, total: int) -> Bar:
        return TerminalBar(description, total, self._clock, self)

    def layer(self, record: LayerRecord) -> None:
        width = lines.name_width(self._rich.width)
        if self._heading_due:
            self._print_line(Text(lines.layer_heading(width), style="bold"))
            self._heading_due = False
        line = Text(lines.layer_line(record, width), style=VERDICT_STYLES.get(record.verdict, ""))
        notes = lines.layer_notes(record)
        if notes and len(line) + len(notes) + 2 < self._rich.width:
            line.append(f"  {notes}", style="dim")
        self._print_line(line)

    def note(self, text: str) -> None:
        self._rich.print(Text(text))

    def warn(self, text: str) -> None:
        self._rich.print(Text.assemble(("warning: ", "bold yellow"), (text, "yellow")))

    def closing(self, closing: lines.Closing) -> None:
        self._verdict(closing.verdict, closing.problems)
        self._rich.print(_figures(closing.figures))
        self._rich.print()
        self._rich.print(_grid(closing.details, LABEL_WIDTH))
        self._rich.print()
        for label, value in closing.next_steps:
            # Never folded: whoever copies a path or a command wants it in one piece.
            line = Text.assemble((f"{label:<{LABEL_WIDTH}}  ", LABEL_STYLE), value)
            self._rich.print(line, soft_wrap=True)

    def side_by_side(self, sheet: Sheet) -> None:
        self._verdict(sheet.headline, sheet.warnings)
        for grid in sheet.grids:
            self._rich.print()
            self._rich.print(Text(grid.title, style="bold"))
            for part in grid.folded(self._rich.width):
                self._rich.print(_columns(part))
        self._rich.print()
        for note in sheet.notes:
            self._rich.print(Text(note, style=LABEL_STYLE))

    def close(self) -> None:
        self._open.clear()
        self._stop()

    def show_live(self, description: str, pace: Pace | None) -> TaskID:
        """Puts a new live line in place of the one there is. pace: None draws a spinner only."""
        if self._progress is None:
            self._progress = _live_line(self._rich)
            self._progress.start()
        if self._open:
            self._progress.update(self._open[-1], visible=False)
        task = self._progress.add_task(description, total=None if pace is None else pace.total, pace=pace)
        self._open.append(task)
        return task

    def move_live(self, task: TaskID, done: int, description: str) -> None:
        if self._progress is not None:
            self._progress.update(task, completed=done, description=description)

    def drop_live(self) -> None:
        """Takes the innermost live line away and shows the one under it again."""
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

    def _verdict(self, verdict: str, problems: list[str]) -> None:
        text = Text(verdict, style="bold")
        for problem in problems:
            text.append(f"\n! {problem}", style="red")
        style = "red" if problems else "green"
        self._rich.print(Panel(text, box=ROUNDED, border_style=style, width=self._panel_width()))

    def _print_line(self, line: Text) -> None:
        line.no_wrap, line.overflow = True, "ellipsis"
        self._rich.print(line)

    def _panel_width(self) -> int:
        return min(self._rich.width, FULL_WIDTH)


class BriefScreen(TerminalScreen):
    """The live line alone, for one job of many; warnings are shown, the rest is in the job's log."""

    def __init__(self, label: str, stream: TextIO, clock: Callable[[], float], width: int | None = None) -> None:
        super().__init__(stream, clock, width)
        self._label = label

    def header(self, pairs: list[tuple[str, str]]) -> None:
        pass

    def stage_starts(self, name: str) -> None:
        super().stage_starts(f"{self._label}: {name}")

    def stage_ends(self, name: str, state: State, seconds: float) -> None:
        self.drop_live()

    def bar(self, description: str, total: int) -> Bar:
        return super().bar(f"{self._label}: {description}", total)

    def layer(self, record: LayerRecord) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        super().warn(f"{self._label}: {text}")

    def closing(self, closing: lines.Closing) -> None:
        pass


class TerminalBar(Bar):
    """The live line of a phase."""

    def __init__(self, description: str, total: int, clock: Callable[[], float], screen: TerminalScreen) -> None:
        super().__init__(description, total, clock)
        self._screen = screen
        self._task = screen.show_live(description, self.pace)

    def draw(self) -> None:
        self._screen.move_live(self._task, self.pace.done, self.told)

    def close(self) -> None:
        self._screen.drop_live()


class _PhaseBar(BarColumn):
    """The bar, but nothing beside the spinner of a stage that cannot say how far it is."""

    def render(self, task: Task) -> Text:  # type: ignore[override]
        return Text() if task.total is None else super().render(task)  # type: ignore[return-value]


class _Counts(ProgressColumn):
    """Steps, share, time so far and time left."""

    def render(self, task: Task) -> Text:
        pace: Pace | None = task.fields["pace"]
        if pace is None:
            return Text(units.duration(task.elapsed or 0.0), style="dim")
        remaining = pace.remaining
        left = "" if math.isnan(remaining) else f", {units.duration(remaining)} left"
        return Text.assemble(f"{pace.done}/{pace.total}  {units.duration(pace.elapsed)}", (left, "cyan"))


def _live_line(rich: Rich) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        _PhaseBar(bar_width=None, complete_style="cyan", finished_style="green"),
        _Counts(),
        console=rich,
        transient=True,
        expand=True,
    )


def _figures(figures: list[units.KeyFigure]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(min_width=LABEL_WIDTH)
    for figure in figures:
        table.add_row(Text(figure.label), Text(figure.value, style="bold"), Text(figure.detail, style=LABEL_STYLE))
    return table


def _columns(grid: TextTable) -> Table:
    """A table that fits, with the best cells of its columns in colour."""
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style=LABEL_STYLE)
    for index, heading in enumerate(grid.heading):
        table.add_column(Text(heading), justify="left" if index < grid.stub else "right", no_wrap=True)
    for row in grid.rows:
        table.add_row(*(Text(cell.text, style="bold green" if cell.best else "") for cell in row))
    return table


def _grid(pairs: list[tuple[str, str]], label_width: int = 0) -> Table:
    """Labels in one column, values in the next, long values folded under themselves."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style=LABEL_STYLE, no_wrap=True, min_width=label_width)
    grid.add_column(overflow="fold")
    for label, value in pairs:
        grid.add_row(Text(label), Text(value))
    return grid
