"""A run displayed on a terminal with rich: panels, colours, one live progress bar."""

import math
from collections.abc import Callable, Sequence
from typing import TextIO

from rich.console import Console as Rich
from rich.panel import Panel
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from jointq_cli import __version__
from jointq_cli.records import LayerRecord
from jointq_cli.report.console.displays import Display, PhaseBar, State, outcome
from jointq_cli.report.console.final_summary import FinalSummary
from jointq_cli.report.console.layer_rows import layer_heading, layer_row
from jointq_cli.report.console.progress_rate import ProgressRate
from jointq_cli.report.number_format import duration
from jointq_cli.report.summary import DAMPED, FALLBACK, layer_notes
from jointq_cli.report.tables.table import BEST_MARK, GAP, TableDocument, TextTable

VERDICT_STYLES = {FALLBACK: "bold red", DAMPED: "yellow"}
STATES = {"done": ("✓", "green"), "reused": ("↺", "cyan"), "failed": ("✗", "bold red"), "interrupted": ("■", "yellow")}
FULL_WIDTH = 110  # columns; wider panels are harder to read
LABEL_STYLE = "dim"
LABEL_WIDTH = 20  # columns; the same in all parts of the final summary
NARROW = 64  # columns; below, there is room for two columns of text beside no bar


class TerminalDisplay(Display):
    """One live line at the bottom, everything else scrolls above it.

    The live line is the innermost open progress bar, or else one that says that the stage runs. rich obeys NO_COLOR.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float], width: int | None = None, job: str = "") -> None:
        super().__init__(clock, job)
        # force_terminal: the caller has already checked that the stream is a terminal.
        self._rich = Rich(file=stream, force_terminal=True, highlight=False, markup=False, emoji=False, width=width)
        self._panel_width = min(self._rich.width, FULL_WIDTH)
        self._is_narrow = self._rich.width < NARROW
        self._progress: Progress | None = None
        self._open: list[TaskID] = []
        self._needs_heading = True

    def header(self, pairs: list[tuple[str, str]]) -> None:
        if not self._job:
            title = Text(f"jointq {__version__}", style="bold")
            self._rich.print(Panel(_grid(pairs), title=title, title_align="left", width=self._panel_width))

    def stage_starts(self, name: str) -> None:
        self._needs_heading = True
        self.show_live(self._named(name), None)

    def stage_ends(self, name: str, state: State, seconds: float) -> None:
        self.drop_live()
        if not self._job:
            mark, style = STATES[state]
            self._rich.print(
                Text.assemble((mark, style), f" {name:<{LABEL_WIDTH - 2}}  ", (outcome(state, seconds), style))
            )

    def bar(self, description: str, total: int) -> PhaseBar:
        return TerminalPhaseBar(self._named(description), total, self._clock, self)

    def layer(self, record: LayerRecord) -> None:
        if self._job:
            return
        if self._needs_heading:
            self._print_line(Text(layer_heading(self._rich.width), style="bold"))
            self._needs_heading = False
        line = Text(layer_row(record, self._rich.width), style=VERDICT_STYLES.get(record.verdict, ""))
        notes = layer_notes(record)
        if notes and len(line) + len(notes) + 2 < self._rich.width:
            line.append(f"  {notes}", style="dim")
        self._print_line(line)

    def note(self, text: str) -> None:
        if not self._job:
            self._rich.print(text)

    def warn(self, text: str) -> None:
        self._rich.print(Text.assemble(("warning: ", "bold yellow"), (self._named(text), "yellow")))

    def summary(self, summary: FinalSummary) -> None:
        if self._job:
            return
        self._headline(summary.headline, summary.problems)
        self._rich.print(self._metrics(summary), "")
        self._rich.print(_grid(summary.details, label_width=0 if self._is_narrow else LABEL_WIDTH), "")
        for label, value in summary.next_steps:
            # Not folded, so that a path or a command can be copied in one piece.
            line = Text.assemble((f"{label:<{LABEL_WIDTH}}  ", LABEL_STYLE), value)
            self._rich.print(line, soft_wrap=True)

    def tables(self, document: TableDocument) -> None:
        self._headline(document.headline, [*document.problems, *document.warnings])
        for table in document.shown:
            self._rich.print("", Text(table.title, style="bold"), sep="\n")
            for part in table.folded(self._rich.width):
                self._rich.print(_columns(part))
            if table.note:
                self._rich.print(Text(table.note, style=LABEL_STYLE))
        self._rich.print("", *(Text(note, style=LABEL_STYLE) for note in document.notes), sep="\n")

    def close(self) -> None:
        self._open.clear()
        self._stop()

    def show_live(self, description: str, rate: ProgressRate | None) -> TaskID:
        """Replaces the live line by a new one. rate: None where it is not known how far the stage is."""
        if self._progress is None:
            columns = (
                TextColumn("{task.description}", markup=False),
                *([] if self._is_narrow else [BarColumn(None, complete_style="cyan", pulse_style="cyan")]),
                _CountColumn(),
            )
            self._progress = Progress(*columns, console=self._rich, transient=True, expand=True)
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
        self._rich.print(Panel(text, border_style="red" if problems else "green", width=self._panel_width))

    def _metrics(self, summary: FinalSummary) -> Table:
        rows = [(each.label, Text(each.value, "bold"), Text(each.detail, LABEL_STYLE)) for each in summary.metrics]
        if self._is_narrow:
            return _grid([(label, Text("\n").join([value, detail])) for label, value, detail in rows], ("", ""))
        return _grid(rows, ("", "", ""), LABEL_WIDTH)

    def _print_line(self, line: Text) -> None:
        self._rich.print(line, no_wrap=True, overflow="ellipsis")


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


class _CountColumn(ProgressColumn):
    """Steps, time so far and time left: rich's own columns would count what an earlier run has done as speed."""

    def render(self, task: Task) -> Text:
        rate: ProgressRate | None = task.fields["rate"]
        if rate is None:
            return Text(duration(task.elapsed or 0.0), style="dim")
        left = "" if math.isnan(rate.remaining) else f", {duration(rate.remaining)} left"
        return Text.assemble(f"{rate.done}/{rate.total}  {duration(rate.elapsed)}", (left, "cyan"))


def _grid(
    rows: Sequence[Sequence[str | Text]], styles: Sequence[str] = (LABEL_STYLE, ""), label_width: int = 0
) -> Table:
    """Labels in the first column; long cells are folded within their columns. styles: of the columns."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    for index, style in enumerate(styles):
        grid.add_column(style=style, overflow="fold", min_width=label_width if index == 0 else None)
    for row in rows:
        grid.add_row(*row)
    return grid


def _columns(text_table: TextTable) -> Table:
    """The best cell of a column is in colour."""
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style=LABEL_STYLE)
    for index, heading in enumerate(text_table.heading):
        table.add_column(Text(heading), justify="left" if index < text_table.stub else "right", overflow="fold")
    for row in text_table.rows:
        table.add_row(*(Text(cell, style="bold green" if cell.endswith(BEST_MARK) else "") for cell in row))
    return table
