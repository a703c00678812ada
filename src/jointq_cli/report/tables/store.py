"""What lies in a store as tables of text: the one source for terminals, pipes and logs.

Knows what is said of artifacts. Looks at no disk.
"""

from collections.abc import Mapping, Sequence

from jointq_cli.report import number_format as units
from jointq_cli.report.tables.table import MISSING, Cell, Sheet, TextTable
from jointq_cli.system.inventory import Entry, Pruned

PARTIAL = "partial"


def listing(root: str, entries: Sequence[Entry], states: Sequence[str], damages: Sequence[str], now: float) -> Sheet:
    """A row per artifact. states: one word each. damages: what is wrong, in full. now: seconds since 1970."""
    heading = ["name", "stage", "size", "made", "last used", "state"]
    rows = [
        [entry.name, entry.stage, units.size(entry.size), _ago(entry.completed, now), _ago(entry.used, now), state]
        for entry, state in zip(entries, states, strict=True)
    ]
    return Sheet(
        title=root,
        headline=_headline(root, entries),
        warnings=list(damages),
        notes=[],
        grids=_grids("Artifacts, then partial work", heading, rows),
    )


def sizes(root: str, entries: Sequence[Entry]) -> Sheet:
    """A row per stage, one for partial work, one for everything."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(PARTIAL if entry.is_partial else entry.stage, []).append(entry)
    rows = [_row(name, members) for name, members in _largest_first(groups)]
    if rows:
        rows.append(_row("in all", entries))
    return Sheet(
        title=root,
        headline=_headline(root, entries),
        warnings=[],
        notes=["would be freed: without the files that run directories link to, which stay there"] if rows else [],
        grids=_grids("By stage", ["stage", "artifacts", "size", "would be freed"], rows),
    )


def pruned(root: str, done: Pruned, now: float, *, dry: bool) -> Sheet:
    """What has been taken away, or in a dry run would be."""
    count = units.plural(len(done.removed), "item")
    freed = units.size(sum(entry.freed for entry in done.removed))
    would = "would be " if dry else ""
    rows = [
        [entry.name, units.size(entry.size), units.size(entry.freed), _ago(entry.used, now), _kind(entry)]
        for entry in done.removed
    ]
    return Sheet(
        title=root,
        headline=f"{count} {would}removed from {root}, {freed} {would}freed",
        warnings=[],
        notes=[f"in use, and left: {entry.name}" for entry in done.busy],
        grids=_grids("Least recently used first", ["name", "size", "freed", "last used", "kind"], rows),
    )


def _headline(root: str, entries: Sequence[Entry]) -> str:
    finished = [entry for entry in entries if not entry.is_partial]
    partial = len(entries) - len(finished)
    unfinished = f" and {partial} unfinished" if partial else ""
    return f"{units.plural(len(finished), 'artifact')}{unfinished} in {root}, {units.size(_size(entries))}"


def _row(name: str, entries: Sequence[Entry]) -> list[str]:
    freed = sum(entry.freed for entry in entries)
    return [name, str(len(entries)), units.size(_size(entries)), units.size(freed)]


def _largest_first(groups: Mapping[str, Sequence[Entry]]) -> list[tuple[str, Sequence[Entry]]]:
    return sorted(groups.items(), key=lambda group: (-_size(group[1]), group[0]))


def _size(entries: Sequence[Entry]) -> int:
    return sum(entry.size for entry in entries)


def _kind(entry: Entry) -> str:
    return PARTIAL if entry.is_partial else "whole"


def _ago(moment: float | None, now: float) -> str:
    return MISSING if moment is None else f"{units.age(now - moment)} ago"


def _grids(title: str, heading: list[str], rows: Sequence[Sequence[str]]) -> list[TextTable]:
    return [TextTable(title, 1, heading, [[Cell(text) for text in row] for row in rows])] if rows else []
