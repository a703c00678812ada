"""Tables of text and documents made of them: the one source for the terminal, pipes, Markdown and HTML."""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import StringIO
from typing import Any, TypeVar

from jointq_cli.report.number_format import MISSING, KeyMetric

GAP = 2  # blanks between columns
BEST_MARK = " *"
Item = TypeVar("Item")


@dataclass(frozen=True)
class TextTable:
    """The first `stub` columns are text, the others numbers; a cell that ends in BEST_MARK is the best of its column.

    shades: of a heat map, how strongly pages colour each cell, in percent.
    """

    title: str
    heading: list[str]
    rows: list[list[str]]
    stub: int = 1
    note: str = ""
    shades: Sequence[Sequence[int]] = ()

    @classmethod
    def of(
        cls, title: str, items: Iterable[Item], columns: Mapping[str, Callable[[Item], str]], stub: int = 1,
        note: str = "",
    ) -> "TextTable":  # fmt: skip
        """A row per item; columns: what a cell says of it, by heading."""
        return cls(title, list(columns), [[text(item) for text in columns.values()] for item in items], stub, note)

    def filled(self) -> "TextTable":
        """Without the columns of numbers in which all cells are empty or MISSING."""
        columns = range(len(self.heading))
        return self._part(
            [c for c in columns if c < self.stub or {row[c].strip() for row in self.rows} - {"", MISSING}]
        )

    def folded(self, width: int) -> list["TextTable"]:
        """The same table in parts of at most `width` characters, if cells allow it; each has the first column."""
        widths = [max(map(len, column)) for column in zip(self.heading, *self.rows, strict=True)]
        parts, taken = [[0]], 0
        for column in range(1, len(widths)):
            taken += GAP + widths[column]
            if widths[0] + taken > width and len(parts[-1]) > 1:
                parts.append([0])
                taken = GAP + widths[column]
            parts[-1].append(column)
        last = len(parts) - 1
        return [replace(self._part(part), note=self.note * (at == last)) for at, part in enumerate(parts)]

    def _part(self, columns: Sequence[int]) -> "TextTable":
        rows = [[row[c] for c in columns] for row in self.rows]
        stub = sum(c < self.stub for c in columns)
        return replace(self, heading=[self.heading[c] for c in columns], rows=rows, stub=stub)


@dataclass(frozen=True)
class TableDocument:
    """Tables with what is said about them, in the order in which they are read."""

    title: str
    headline: str
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: list[TextTable] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # reasons not to use the result, worse than warnings
    sound: str = ""  # said where there are none
    words: str = ""  # what those of the title mean
    metrics: list[KeyMetric] = field(default_factory=list)
    first_tables: list[TextTable] = field(default_factory=list)  # before the figures of a page
    origin: list[tuple[str, str]] = field(default_factory=list)  # (label, value) of what the result was made from
    next_steps: list[tuple[str, str]] = field(default_factory=list)  # (label, path or command), for a terminal

    @property
    def shown(self) -> list[TextTable]:
        """All tables that have rows."""
        return [table for table in [*self.first_tables, *self.tables] if table.rows]


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """A column for each name that a row has, at full precision."""
    text = StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
