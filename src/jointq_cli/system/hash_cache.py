"""The hashes of model files as a run last computed them, so that `plan` need not read gigabytes.

An entry is valid while every file keeps its size and modification time. Only `plan` uses it: a run always reads and
hashes the weights itself. Knows nothing of what is in the files.
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
    """Records in the store at `root` the common hash of `files`, which belong to the model at `place`. If several
    processes write at once, the last one wins."""
    cache = {**_read(root), str(place.resolve()): {"files": _states(files), "sha256": digest}}
    with suppress(OSError, ResourceError):  # the cache is optional; writes that are needed report a read-only store
        write_text_atomically(root / FILE, json.dumps(cache, indent=1, sort_keys=True) + "\n")


def cached_hash(root: Path, place: Path, files: Sequence[Path]) -> str | None:
    """The hash that `cache_hash` recorded; None if there is none or a file has changed since."""
    entry = _read(root).get(str(place.resolve()))
    if not isinstance(entry, dict) or entry.get("files") != _states(files):
        return None
    return str(entry["sha256"])


def _states(files: Sequence[Path]) -> dict[str, list[int]]:
    """[size, modification time in ns] by file name."""
    states = {file.name: file.stat() for file in files}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}


def _read(root: Path) -> dict[str, Any]:
    try:
        cache = json.loads((root / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cache if isinstance(cache, dict) else {}
