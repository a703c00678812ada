"""The tables of `jointq store`: artifacts, their sizes, and what was pruned."""

from collections.abc import Sequence

from jointq_cli.report.grouping import grouped
from jointq_cli.report.number_format import MISSING, age, byte_size, plural
from jointq_cli.report.tables.table import TableDocument, TextTable
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
    table = TextTable("Artifacts, then partial work", heading, rows)
    return TableDocument(root, _headline(root, entries), list(damages), [], [table])


def sizes_document(root: str, entries: Sequence[Entry]) -> TableDocument:
    """A row per stage, one for partial work, one for everything."""
    groups = grouped(entries, lambda entry: PARTIAL if entry.is_partial else entry.stage)
    largest_first = sorted(groups.items(), key=lambda group: (-_size(group[1]), group[0]))
    rows = [
        [name, str(len(members)), byte_size(_size(members)), byte_size(sum(entry.freed for entry in members))]
        for name, members in [*largest_first, ("total", entries)]
        if members
    ]
    notes = ["would be freed: without the files that run directories link to, which stay there"] if rows else []
    table = TextTable("By stage", ["stage", "artifacts", "size", "would be freed"], rows)
    return TableDocument(root, _headline(root, entries), [], notes, [table])


def pruned_document(root: str, done: Pruned, now: float, *, dry: bool) -> TableDocument:
    """What was removed, or would be in a dry run."""
    would, freed = "would be " * dry, byte_size(sum(entry.freed for entry in done.removed))
    columns = {
        "name": lambda entry: entry.name,
        "size": lambda entry: byte_size(entry.size),
        "freed": lambda entry: byte_size(entry.freed),
        "last used": lambda entry: _ago(entry.used, now),
        "kind": lambda entry: PARTIAL if entry.is_partial else "complete",
    }
    headline = f"{plural(len(done.removed), 'item')} {would}removed from {root}, {freed} {would}freed"
    busy = [f"in use, and left: {entry.name}" for entry in done.busy]
    return TableDocument(root, headline, [], busy, [TextTable.of("Least recently used first", done.removed, columns)])


def _headline(root: str, entries: Sequence[Entry]) -> str:
    partial = sum(entry.is_partial for entry in entries)
    unfinished = f" and {partial} unfinished" if partial else ""
    return f"{plural(len(entries) - partial, 'artifact')}{unfinished} in {root}, {byte_size(_size(entries))}"


def _size(entries: Sequence[Entry]) -> int:
    return sum(entry.size for entry in entries)


def _ago(moment: float | None, now: float) -> str:
    return MISSING if moment is None else f"{age(now - moment)} ago"
