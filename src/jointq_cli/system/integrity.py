"""What an artifact consists of: a list of its files with their sizes and sha256, made with it and checked before use.

Knows directories of files. Knows nothing of stages, keys and locks.
"""

import errno
import functools
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

# What file systems and desktops leave everywhere: no reason to take hours of work away.
DROPPING = re.compile(r"(^|/)(\.DS_Store|\._[^/]*|\.nfs[0-9a-f]+|Thumbs\.db|desktop\.ini)$")
CONTENTS = ".contents.json"  # in an artifact's directory; its own time is that of the artifact's last use


def write_contents(directory: Path) -> None:
    """Writes down what `directory` holds by now."""
    files = _files(directory)
    with ThreadPoolExecutor() as pool:
        digests = pool.map(functools.partial(_file_digest, directory), files, files.values())
        listed = {
            name: {"size": found.st_size, "sha256": digest}
            for (name, found), digest in zip(files.items(), digests, strict=True)
        }
    contents = {"made": datetime.now().astimezone().isoformat(timespec="seconds"), "files": listed}
    (directory / CONTENTS).write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")


def find_damage(directory: Path) -> str | None:
    """What is wrong with a finished directory, or None: "layers/a.safetensors has 10 bytes, not 20".

    Reads every byte, but none twice in a process while size and time of its file stay the same.
    """
    listed, found = _read(directory), _files(directory)
    if listed is None:
        return f"{CONTENTS} is missing or damaged"
    if misfit := _misfit(listed, found):
        return misfit
    with ThreadPoolExecutor() as pool:
        wrong = pool.map(functools.partial(_wrong_bytes, directory, listed), found, found.values())
        return next(filter(None, wrong), None)


def has_expected_sizes(directory: Path) -> bool:
    """Whether names and sizes are those that were written; no file is read."""
    listed = _read(directory)
    return listed is not None and _misfit(listed, _files(directory)) is None


def completed_at(directory: Path) -> float | None:
    """Seconds since 1970, or None for a directory without a list of what it holds."""
    contents = _load(directory)
    try:
        return None if contents is None else datetime.fromisoformat(contents["made"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return None


def walk(directory: Path, prefix: str = "") -> Iterator[tuple[str, os.stat_result]]:
    """(name below `directory`, status) of everything there but directories, in order. Follows no link."""
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = prefix + entry.name
            try:
                if entry.is_dir(follow_symlinks=False):
                    yield from walk(Path(entry.path), f"{name}/")
                else:
                    yield name, entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # renamed or deleted since: who is at work there knows
                continue


def _files(directory: Path) -> dict[str, os.stat_result]:
    return {name: status for name, status in walk(directory) if name != CONTENTS and not DROPPING.search(name)}


def _misfit(listed: dict[str, dict[str, Any]], found: dict[str, os.stat_result]) -> str | None:
    for name in sorted(listed.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in listed:
            return f"{name} does not belong there"
        if not stat.S_ISREG(found[name].st_mode):
            return f"{name} is no file any more"
        if found[name].st_size != listed[name]["size"]:
            return f"{name} has {found[name].st_size} bytes, not {listed[name]['size']}"
    return None


def _load(directory: Path) -> dict[str, Any] | None:
    try:
        contents = json.loads((directory / CONTENTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return contents if isinstance(contents, dict) else None


def _read(directory: Path) -> dict[str, dict[str, Any]] | None:
    """The listed files, each with size and sha256."""
    files = (_load(directory) or {}).get("files")
    if not isinstance(files, dict):
        return None
    sound = all(isinstance(entry, dict) and {"size", "sha256"} <= entry.keys() for entry in files.values())
    return files if sound else None


def _wrong_bytes(directory: Path, listed: dict[str, dict[str, Any]], name: str, status: os.stat_result) -> str | None:
    try:
        digest = _file_digest(directory, name, status)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return f"{name} cannot be read ({error.strerror})"  # a bad sector
    return None if digest == listed[name]["sha256"] else f"{name} has other bytes than were written"


def _file_digest(directory: Path, name: str, status: os.stat_result) -> str:
    return _digest(directory / name, status.st_ino, status.st_size, status.st_mtime_ns)


@functools.cache
def _digest(path: Path, inode: int, size: int, mtime: int) -> str:
    """sha256 of a file as it is while inode, size and time stay what they are."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
