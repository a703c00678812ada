"""Integrity of an artifact: a list of its files with sizes and sha256, written with it and checked before use.

Knows directories of files. Knows nothing of stages, keys and locks.
"""

import errno
import functools
import json
import os
import re
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

from jointq_cli.system.files import file_hash

# File systems and desktops leave these everywhere: no reason to discard hours of work.
IGNORED = re.compile(r"(^|/)(\.DS_Store|\._[^/]*|\.nfs[0-9a-f]+|Thumbs\.db|desktop\.ini)$")
CONTENTS = ".contents.json"  # in an artifact's directory; its modification time is the artifact's last use


def write_contents(directory: Path) -> None:
    """Writes the list of the files that `directory` holds now."""
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

    Reads every byte, but a file whose size and modification time stay the same only once per process.
    """
    listed, found = _read(directory), _files(directory)
    if listed is None:
        return f"{CONTENTS} is missing or damaged"
    if difference := _difference(listed, found):
        return difference
    with ThreadPoolExecutor() as pool:
        wrong = pool.map(functools.partial(_wrong_bytes, directory, listed), found, found.values())
        return next(filter(None, wrong), None)


def has_expected_sizes(directory: Path) -> bool:
    """Whether names and sizes are those that were written; reads no file but the list."""
    listed = _read(directory)
    return listed is not None and _difference(listed, _files(directory)) is None


def completed_at(directory: Path) -> float | None:
    """When the artifact was completed, in seconds since 1970; None for a directory without a list of its files."""
    contents = _load(directory)
    try:
        return None if contents is None else datetime.fromisoformat(contents["made"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return None


def walk(directory: Path, prefix: str = "") -> Iterator[tuple[str, os.stat_result]]:
    """(path below `directory`, status) of everything there except directories, sorted. Follows no link."""
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = prefix + entry.name
            try:
                if entry.is_dir(follow_symlinks=False):
                    yield from walk(Path(entry.path), f"{name}/")
                else:
                    yield name, entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # renamed or deleted meanwhile by the process that works there
                continue


def _files(directory: Path) -> dict[str, os.stat_result]:
    return {name: status for name, status in walk(directory) if name != CONTENTS and not IGNORED.search(name)}


def _difference(listed: dict[str, dict[str, Any]], found: dict[str, os.stat_result]) -> str | None:
    for name in sorted(listed.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in listed:
            return f"{name} does not belong there"
        if not stat.S_ISREG(found[name].st_mode):
            return f"{name} is not a regular file any more"
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
    """The listed files, each with size and sha256; None where the list is missing or damaged."""
    files = (_load(directory) or {}).get("files")
    if not isinstance(files, dict):
        return None
    valid = all(isinstance(entry, dict) and {"size", "sha256"} <= entry.keys() for entry in files.values())
    return files if valid else None


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
    """sha256 of a file, cached for as long as its inode, size and modification time stay the same."""
    return file_hash(path)
