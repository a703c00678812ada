"""The tables of `jointq store`: artifacts, their sizes, and what was pruned.

Knows which properties of an artifact are shown. Reads no disk.
"""

from collections.abc import Sequence

from jointq_cli.report.grouping import grouped
from jointq_cli.report.number_format import MISSING, age, byte_size, plural
from jointq_cli.report.tables.table import Cell, TableDocument, TextTable
from jointq_cli.system.inventory import Entry, Pruned

PARTIAL = "partial"


def artifacts_document(
    root: str, entries: Sequence[Entry], states: Sequence[str], damages: Sequence[str], now: float
) -> TableDocument:
    """A row per artifact. states: one word each. damages: what is damaged, in full. now: seconds since 1970."""
    heading = ["name", "stage", "size", "created", "last used", "state"]
    rows = [
        [entry.name, entry.stage, byte_size(entry.size), _ago(entry.completed, now), _ago(entry.used, now), state]
        for entry, state in zip(entries, states, strict=True)
    ]
    return TableDocument(
        title=root,
        headline=_headline(root, entries),
        warnings=list(damages),
        notes=[],
        tables=_tables("Artifacts, then partial work", heading, rows),
    )


def sizes_document(root: str, entries: Sequence[Entry]) -> TableDocument:
    """A row per stage, one for partial work, one for everything."""
    groups = grouped(entries, lambda entry: PARTIAL if entry.is_partial else entry.stage)
    largest_first = sorted(groups.items(), key=lambda group: (-_size(group[1]), group[0]))
    rows = [_size_row(name, members) for name, members in largest_first]
    if rows:
        rows.append(_size_row("total", entries))
    return TableDocument(
        title=root,
        headline=_headline(root, entries),
        warnings=[],
        notes=["would be freed: without the files that run directories link to, which stay there"] if rows else [],
        tables=_tables("By stage", ["stage", "artifacts", "size", "would be freed"], rows),
    )


def pruned_document(root: str, done: Pruned, now: float, *, dry: bool) -> TableDocument:
    """What was removed, or would be in a dry run."""
    count = plural(len(done.removed), "item")
    freed = byte_size(sum(entry.freed for entry in done.removed))
    would = "would be " if dry else ""
    rows = [
        [entry.name, byte_size(entry.size), byte_size(entry.freed), _ago(entry.used, now), _kind(entry)]
        for entry in done.removed
    ]
    return TableDocument(
        title=root,
        headline=f"{count} {would}removed from {root}, {freed} {would}freed",
        warnings=[],
        notes=[f"in use, and left: {entry.name}" for entry in done.busy],
        tables=_tables("Least recently used first", ["name", "size", "freed", "last used", "kind"], rows),
    )


def _headline(root: str, entries: Sequence[Entry]) -> str:
    finished = [entry for entry in entries if not entry.is_partial]
    partial = len(entries) - len(finished)
    unfinished = f" and {partial} unfinished" if partial else ""
    return f"{plural(len(finished), 'artifact')}{unfinished} in {root}, {byte_size(_size(entries))}"


def _size_row(name: str, entries: Sequence[Entry]) -> list[str]:
    freed = sum(entry.freed for entry in entries)
    return [name, str(len(entries)), byte_size(_size(entries)), byte_size(freed)]


def _size(entries: Sequence[Entry]) -> int:
    return sum(entry.size for entry in entries)


def _kind(entry: Entry) -> str:
    return PARTIAL if entry.is_partial else "complete"


def _ago(moment: float | None, now: float) -> str:
    return MISSING if moment is None else f"{age(now - moment)} ago"


def _tables(title: str, heading: list[str], rows: Sequence[Sequence[str]]) -> list[TextTable]:
    return [TextTable(title, 1, heading, [[Cell(text) for text in row] for row in rows])] if rows else []
