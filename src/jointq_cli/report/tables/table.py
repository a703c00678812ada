"""Tables of text, and documents made of them: the one source for the terminal, pipes, Markdown and HTML.

Knows rows, columns and widths. Knows nothing of what the cells say, no markup, no file and no terminal.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jointq_cli.report.number_format import shortened

GAP = 2  # blanks between columns
BEST_MARK = " *"
MOST_CELL_WIDTH = 40  # where the width is limited


@dataclass(frozen=True)
class Cell:
    text: str
    best: bool = False  # of its column


@dataclass(frozen=True)
class TextTable:
    """A table. Its first `stub` columns identify a row, and are repeated in each part of a table that is folded."""

    title: str
    stub: int
    heading: list[str]
    rows: list[list[Cell]]
    note: str = ""
    short_stub: bool = False  # an earlier table has the same stub: if space is short, its first column is enough

    def folded(self, width: int) -> list["TextTable"]:
        """The same table in parts that are at most `width` characters wide; long cells lose their beginnings."""
        table = self._clipped(min(MOST_CELL_WIDTH, (width - GAP) // 2))
        widths = table.widths()
        if sum(widths[: table.stub]) + GAP * table.stub <= width // 2:
            return [table._part(table.stub, columns) for columns in _packed(widths, table.stub, table.stub, width)]
        first = table.stub if table.short_stub else 1
        return [table._part(1, columns) for columns in _packed(widths, 1, first, width)]

    def widths(self) -> list[int]:
        """Of each column, in characters."""
        columns = zip(self.heading, *([cell.text for cell in row] for row in self.rows), strict=True)
        return [max(map(len, column)) for column in columns]

    def as_text(self) -> list[str]:
        """Lines: title, heading, rows and note."""
        widths = self.widths()
        rows = [self.heading, *([cell.text for cell in row] for row in self.rows)]
        lines = [
            (" " * GAP)
            .join(
                f"{text:<{width}}" if column < self.stub else f"{text:>{width}}"
                for column, (text, width) in enumerate(zip(row, widths, strict=True))
            )
            .rstrip()
            for row in rows
        ]
        return [self.title, *lines, *([self.note] if self.note else [])]

    def _part(self, stub: int, columns: Sequence[int]) -> "TextTable":
        chosen = [*range(stub), *columns]
        rows = [[row[column] for column in chosen] for row in self.rows]
        return replace(self, stub=stub, heading=[self.heading[column] for column in chosen], rows=rows)

    def _clipped(self, width: int) -> "TextTable":
        rows = [[replace(cell, text=shortened(cell.text, width)) for cell in row] for row in self.rows]
        return replace(self, heading=[shortened(text, width) for text in self.heading], rows=rows)


@dataclass(frozen=True)
class TableDocument:
    """Tables with what is said about them, such as the comparison of several runs."""

    title: str
    headline: str
    warnings: list[str]
    notes: list[str]
    tables: list[TextTable]

    def as_text(self) -> list[str]:
        """Lines for a pipe: rows are not folded, so that `grep` and `cut` work on them."""
        warnings = [f"[warning] {warning}" for warning in self.warnings]
        tables = [line for table in self.tables for line in ["", *table.as_text()]]
        return [self.headline, *warnings, *tables, *([""] if self.notes else []), *self.notes]


def aligned(pairs: list[tuple[str, str]]) -> list[str]:
    """One line per (label, value): labels in one column, values in the next."""
    width = max((len(label) for label, _ in pairs), default=0)
    return [f"{label:<{width}}  {value}".rstrip() for label, value in pairs]


def _packed(widths: Sequence[int], stub: int, first: int, width: int) -> list[list[int]]:
    """The columns from `first` on, in as few parts as `width` allows beside the stub, each with at least one column."""
    stub_width = sum(widths[:stub]) + GAP * (stub - 1)
    parts: list[list[int]] = []
    taken = width
    for column in range(first, len(widths)):
        if taken + GAP + widths[column] > width:
            parts.append([])
            taken = stub_width
        parts[-1].append(column)
        taken += GAP + widths[column]
    return parts
