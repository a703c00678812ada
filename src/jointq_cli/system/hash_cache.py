"""What the files of a model hashed to when a run read them last, so that a plan need not read them.

A note holds for as long as every file has the size and the time of change that it had. Only plans believe it: a run
reads the weights and hashes them, always. Knows nothing of what is in the files.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jointq_cli.errors import ResourceError
from jointq_cli.system.files import write_text_atomically

FILE = "hashes.json"


def cache_hash(root: Path, place: Path, files: Sequence[Path], digest: str) -> None:
    """Notes in the store at `root` what `files` of the model at `place` hashed to together. The last writer wins."""
    notes = {**_read(root), str(place.resolve()): {"files": _states(files), "sha256": digest}}
    with suppress(OSError, ResourceError):  # a store that cannot be written is told of by what has to be written
        write_text_atomically(root / FILE, json.dumps(notes, indent=1, sort_keys=True) + "\n")


def cached_hash(root: Path, place: Path, files: Sequence[Path]) -> str | None:
    """What `note_hash` was told, None where it was told nothing or a file has changed since."""
    note = _read(root).get(str(place.resolve()))
    if not isinstance(note, dict) or note.get("files") != _states(files):
        return None
    return str(note["sha256"])


def _states(files: Sequence[Path]) -> dict[str, list[int]]:
    """Size and time of change by name."""
    states = {file.name: file.stat() for file in files}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}


def _read(root: Path) -> dict[str, Any]:
    try:
        notes = json.loads((root / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}
