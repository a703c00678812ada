"""`jointq store`: the artifacts that runs share; lists them, checks them, and frees space."""

import argparse
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from jointq_cli.errors import JointqError
from jointq_cli.report import Console
from jointq_cli.report.tables.store import artifacts_document, pruned_document, sizes_document
from jointq_cli.report.tables.table import TableDocument
from jointq_cli.system import inventory
from jointq_cli.system.files import translated_disk_errors
from jointq_cli.system.inventory import Entry

WORDS = {
    "ls": "every artifact: its size, when it was written and last used, its state",
    "size": "the size of each stage's artifacts, and how much of it could be freed",
    "prune": "remove what is not in use: old, least recently used, unfinished, or all",
}
DEFAULT = Path("runs/store")
DAY = 86400  # seconds


def main(arguments: list[str]) -> int:
    parsed = _parser().parse_args(arguments)
    inventory.check_store(parsed.store)
    with translated_disk_errors(parsed.store):
        code: int = parsed.run(parsed)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("jointq store", description="Artifacts that runs share.")
    words = parser.add_subparsers(metavar="ACTION", required=True)
    ls, size, prune = (words.add_parser(word, help=text, description=text) for word, text in WORDS.items())
    for each, run in ((ls, _ls), (size, _size), (prune, _prune)):
        each.add_argument("--store", type=Path, default=DEFAULT, metavar="DIR", help=f"the store ({DEFAULT})")
        each.set_defaults(run=run)
    ls.add_argument("--verify", action="store_true", help="read every byte; exit with 1 if some are wrong")
    prune.add_argument("--dry-run", action="store_true", help="only list what would be removed")
    which = prune.add_mutually_exclusive_group(required=True)
    which.add_argument("--older-than", type=_amount, metavar="DAYS", help="what was not used for this many days")
    which.add_argument("--to", type=_amount, metavar="GB", help="least recently used first, until this much is left")
    which.add_argument("--partial", action="store_true", help="unfinished artifacts of stopped runs")
    which.add_argument("--all", action="store_true", help="everything")
    return parser


def _ls(parsed: argparse.Namespace) -> int:
    entries = inventory.entries(parsed.store)
    damages = _damages(parsed.store, entries) if parsed.verify else {}
    states = {entry.path: _state(parsed.store, entry, damages) for entry in entries}
    notes = [f"{entry.name}: {damages[entry.path]}" for entry in entries if entry.path in damages]
    _show(artifacts_document(str(parsed.store), entries, states, notes))
    if damages:
        raise JointqError(f"{parsed.store}: {len(damages)} damaged; a run that wants one of them computes it again")
    return 0


def _size(parsed: argparse.Namespace) -> int:
    _show(sizes_document(str(parsed.store), inventory.entries(parsed.store)))
    return 0


def _prune(parsed: argparse.Namespace) -> int:
    def take(entry: Entry) -> bool:
        if parsed.dry_run:
            return not inventory.is_in_use(parsed.store, entry)
        return inventory.remove(parsed.store, entry)

    candidates, excess = _candidates(parsed, inventory.entries(parsed.store), time.time())
    done = inventory.prune(candidates, excess, take)
    _show(pruned_document(str(parsed.store), done, dry=parsed.dry_run))
    return 0


def _candidates(parsed: argparse.Namespace, entries: Sequence[Entry], now: float) -> tuple[list[Entry], float]:
    """Which entries may be removed, and how many bytes must be."""
    if parsed.to is not None:
        return list(entries), sum(entry.size for entry in entries) - parsed.to * 1e9
    if parsed.older_than is not None:
        return [entry for entry in entries if entry.used <= now - parsed.older_than * DAY], math.inf
    return [entry for entry in entries if parsed.all or entry.is_partial], math.inf


def _damages(root: Path, entries: Sequence[Entry]) -> dict[Path, str]:
    found = {entry.path: inventory.damage(root, entry) for entry in entries if entry.is_listed}
    return {path: damage for path, damage in found.items() if damage is not None}


def _state(root: Path, entry: Entry, damages: dict[Path, str]) -> str:
    if entry.path in damages:
        return "damaged"
    if inventory.is_in_use(root, entry):
        return "in use"
    return "partial" if entry.is_partial else "complete" if entry.is_listed else "unlisted"


def _show(document: TableDocument) -> None:
    with Console() as console:
        console.show(document)


def _amount(text: str) -> float:
    with suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}: must be a number from 0 on")
