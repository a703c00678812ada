"""Documents of tables and texts as rich renders them, for terminals, pipes and the log."""

from collections.abc import Iterable, Iterator

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from jointq_cli.report.tables.table import BEST_MARK, GAP, TableDocument, TextTable

FULL_WIDTH = 110  # columns; wider panels are harder to read
LABEL_WIDTH = 21  # columns


def rendered(document: TableDocument, width: int, *, boxed: bool) -> Iterator[RenderableType]:
    """The document's parts from above. width: of a line, which tables are folded to. boxed: the headline has a frame,
    which no pipe needs."""
    problems = [*document.problems, *document.warnings]
    headline = Text(document.headline, style="bold").append("".join(f"\n! {each}" for each in problems), style="red")
    yield framed(headline, width, style="red" if problems else "green") if boxed else headline
    if document.metrics:
        most = max(len(metric.value) for metric in document.metrics)
        yield pairs(
            (metric.label, Text.assemble((f"{metric.value:<{most}}", "bold"), "  ", (metric.detail, "dim")))
            for metric in document.metrics
        )
    if document.origin:
        yield ""
        yield pairs(document.origin)
    for table in document.shown:
        yield Text(f"\n{table.title}", style="bold")
        yield from map(_columns, table.folded(width))
        if table.note:
            yield Text(table.note, style="dim")
    if document.notes:
        yield Text("\n".join(["", *document.notes]), style="dim")
    if document.next_steps:  # each on one line, so that a path or a command can be copied in one piece
        steps = [(f"{label:<{LABEL_WIDTH}}  ", text) for label, text in document.next_steps]
        yield Group(
            "", *(Text.assemble((label, "dim"), text, no_wrap=True, overflow="ignore") for label, text in steps)
        )


def framed(content: RenderableType, width: int, title: str = "", style: str = "none") -> Panel:
    heading = Text(title, style="bold") if title else None
    return Panel(content, title=heading, title_align="left", border_style=style, width=min(width, FULL_WIDTH))


def pairs(rows: Iterable[tuple[str, str | Text]], label_width: int = LABEL_WIDTH) -> Table:
    """Labels in the first column; long texts are folded within the second."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", min_width=label_width)
    grid.add_column(overflow="fold")
    for label, text in rows:
        grid.add_row(label, text)
    return grid


def _columns(text_table: TextTable) -> Table:
    """The best cell of a column is in colour."""
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="dim")
    for index, heading in enumerate(text_table.heading):
        table.add_column(Text(heading), justify="left" if index < text_table.stub else "right", overflow="fold")
    for row in text_table.rows:
        table.add_row(*(Text(cell, style="bold green" if cell.endswith(BEST_MARK) else "") for cell in row))
    return table
