"""The tables of `jointq store`: artifacts, their sizes, and what was pruned."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from jointq_cli.report.grouping import grouped
from jointq_cli.report.number_format import MISSING, byte_size, plural
from jointq_cli.report.tables.table import TableDocument, TextTable
from jointq_cli.system.inventory import Entry, Pruned

PARTIAL = "partial"
COLUMNS: dict[str, Callable[[Entry], str]] = {
    "name": lambda entry: entry.name,
    "stage": lambda entry: entry.stage,
    "size": lambda entry: byte_size(entry.size),
    "freed": lambda entry: byte_size(entry.freed),
    "created": lambda entry: _date(entry.completed),
    "last used": lambda entry: _date(entry.used),
}


def artifacts_document(
    root: str, entries: Sequence[Entry], states: Mapping[Path, str], damages: Sequence[str]
) -> TableDocument:
    """A row per artifact. states: one word each. damages: what is damaged, in full."""
    columns = COLUMNS | {"state": lambda entry: states[entry.path]}
    del columns["freed"]
    table = TextTable.of("Artifacts, then partial work", entries, columns)
    return TableDocument(root, _headline(root, entries), list(damages), tables=[table])


def sizes_document(root: str, entries: Sequence[Entry]) -> TableDocument:
    """A row per stage, one for partial work, one for everything."""
    groups = grouped(entries, lambda entry: PARTIAL if entry.is_partial else entry.stage)
    largest_first = dict(sorted(groups.items(), key=lambda group: (-_size(group[1]), group[0]))) | {"total": entries}
    columns: dict[str, Callable[[str], str]] = {
        "stage": lambda name: name,
        "artifacts": lambda name: str(len(largest_first[name])),
        "size": lambda name: byte_size(_size(largest_first[name])),
        "would be freed": lambda name: byte_size(sum(entry.freed for entry in largest_first[name])),
    }
    table = TextTable.of("By stage", largest_first if entries else [], columns)
    notes = ["would be freed: without the files that run directories link to, which stay there"] if entries else []
    return TableDocument(root, _headline(root, entries), notes=notes, tables=[table])


def pruned_document(root: str, done: Pruned, *, dry: bool) -> TableDocument:
    """What was removed, or would be in a dry run."""
    would, freed = "would be " * dry, byte_size(sum(entry.freed for entry in done.removed))
    columns = COLUMNS | {"kind": lambda entry: PARTIAL if entry.is_partial else "complete"}
    headline = f"{plural(len(done.removed), 'item')} {would}removed from {root}, {freed} {would}freed"
    busy = [f"in use, and left: {entry.name}" for entry in done.busy]
    table = TextTable.of("Least recently used first", done.removed, columns)
    return TableDocument(root, headline, notes=busy, tables=[table])


def _headline(root: str, entries: Sequence[Entry]) -> str:
    partial = sum(entry.is_partial for entry in entries)
    unfinished = f" and {partial} unfinished" if partial else ""
    return f"{plural(len(entries) - partial, 'artifact')}{unfinished} in {root}, {byte_size(_size(entries))}"


def _size(entries: Sequence[Entry]) -> int:
    return sum(entry.size for entry in entries)


def _date(moment: float | None) -> str:
    return MISSING if moment is None else datetime.fromtimestamp(moment).isoformat(" ", "minutes")
