"""The entries of a store's directory, and how they are removed.

    STORE/.jointq-store        marks this directory as a store
    STORE/STAGE-KEY/           an artifact: the finished output of a stage, and .contents.json
    STORE/partial/STAGE-KEY/   the unfinished output of a stage that is running or was stopped
    STORE/locks/STAGE-KEY      locked by the processes that use it (shared), write it or remove it (exclusive)

Never follows a symbolic link, and never touches a name of any other form.
"""

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jointq_cli.errors import JointqError
from jointq_cli.system.integrity import CONTENTS, completed_at, find_damage, walk
from jointq_cli.system.locks import Kind, Lock, is_locked, try_lock

MARKER = ".jointq-store"
PARTIAL = "partial"
LOCKS = "locks"
REMOVED = ".removed"  # suffix of a directory that is being deleted
_ENTRY_NAME = re.compile(r"(?P<name>(?P<stage>\w+)-[0-9a-f]{16})(?P<removed>\.removed)?")


@dataclass(frozen=True)
class Entry:
    """An artifact, or unfinished output. No two entries share a file."""

    name: str  # STAGE-KEY
    stage: str
    path: Path
    is_partial: bool
    size: int  # bytes; a file with several hard links counts once
    freed: int  # bytes that its removal would free: not those of files that run directories link to
    is_listed: bool  # whether it has its list of files; an artifact without one is never removed
    completed: float | None  # seconds since 1970; None where unknown
    used: float  # last use, seconds since 1970

    @property
    def is_removable(self) -> bool:
        return self.is_partial or self.is_listed


@dataclass(frozen=True)
class Pruned:
    """removed: the entries that were removed. busy: those that were kept because a process uses them."""

    removed: list[Entry]
    busy: list[Entry]


def check_store(root: Path) -> None:
    """Raises JointqError for a directory that is not a store."""
    if not root.is_dir():
        raise JointqError(f"--store={root}: there is no such directory")
    if not (root / MARKER).is_file():
        raise JointqError(f"--store={root}: is not a store, for there is no {MARKER} in it")
    check_inside(root)


def check_inside(root: Path) -> None:
    """Raises JointqError where partial/ or locks/ is a link or on another disk: removing entries there would delete
    files that are not the store's, and finished output could not be renamed into the store."""
    for place in (root / PARTIAL, root / LOCKS):
        if place.is_symlink() or (place.exists() and place.stat().st_dev != root.stat().st_dev):
            raise JointqError(f"{place}: must be a directory of the store itself and on its disk; give another store")


def partial_path(root: Path, name: str) -> Path:
    return root / PARTIAL / name


def lock_path(root: Path, name: str) -> Path:
    return root / LOCKS / name


def entries(root: Path) -> list[Entry]:
    """Artifacts, then partial work, each by name."""
    found = [_entry(path, is_partial=False) for path in _directories(root)]
    found += [_entry(path, is_partial=True) for path in _directories(root / PARTIAL)]
    return [entry for entry in found if entry is not None]


def by_last_use(found: Iterable[Entry]) -> list[Entry]:
    """Least recently used first. Times in the future, by a clock that was set back since, come last."""
    return sorted(found, key=lambda entry: (entry.used, entry.name))


def is_in_use(root: Path, entry: Entry) -> bool:
    return is_locked(lock_path(root, entry.name))


def damage(root: Path, entry: Entry) -> str | None:
    """What is wrong with an artifact; None also where a process is writing or removing it."""
    lock = try_lock(lock_path(root, entry.name), Kind.SHARED)
    if lock is None:
        return None
    with lock:
        return find_damage(entry.path) if entry.path.is_dir() else None


def lock_unused(root: Path, entry: Entry) -> Lock | None:
    """The exclusive lock on an entry; None where a process uses it, or has used it since `entry` was read."""
    lock = try_lock(lock_path(root, entry.name), Kind.EXCLUSIVE)
    if lock is None:
        return None
    now = _entry(entry.path, is_partial=entry.is_partial)
    if now is None or now.used <= entry.used:
        return lock
    lock.release()
    return None


def remove(root: Path, entry: Entry) -> bool:
    """Removes an entry; False, and keeps it, where a process uses it."""
    lock = lock_unused(root, entry)
    if lock is None:
        return False
    with lock:
        delete_locked(root, entry.path)
        lock.discard_file()
    return True


def delete_locked(root: Path, path: Path) -> None:
    """Deletes `path`, on which the caller has the exclusive lock. If the process is killed at any point, no incomplete
    artifact is left under an artifact's name."""
    renamed = root / PARTIAL / f"{path.name.removesuffix(REMOVED)}{REMOVED}"
    if path != renamed:
        renamed.parent.mkdir(exist_ok=True)
        delete(renamed)
        with suppress(FileNotFoundError):  # another process has removed it first
            os.rename(path, renamed)
    delete(renamed)


def delete(path: Path) -> None:
    """Deletes a file, a link or a directory tree; the target of a link stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def prune(candidates: Iterable[Entry], excess: float, take: Callable[[Entry], bool]) -> Pruned:
    """Removes least recently used entries until `excess` bytes are gone. take: removes one, or returns False."""
    pruned = Pruned([], [])
    for entry in by_last_use(candidate for candidate in candidates if candidate.is_removable):
        if excess <= 0:
            break
        if take(entry):
            pruned.removed.append(entry)
            excess -= entry.size
        else:
            pruned.busy.append(entry)
    return pruned


def _directories(parent: Path) -> list[Path]:
    try:
        with os.scandir(parent) as found:
            return sorted(Path(entry.path) for entry in found if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []


def _entry(path: Path, *, is_partial: bool) -> Entry | None:
    """None for a name of another form, or a directory that has disappeared."""
    form = _ENTRY_NAME.fullmatch(path.name)
    if form is None or (form["removed"] and not is_partial):
        return None
    try:
        files = dict(walk(path))
        used = max((status.st_mtime for status in files.values()), default=path.stat().st_mtime)
    except FileNotFoundError:
        return None
    is_listed = not is_partial and CONTENTS in files
    size, freed = _sizes(list(files.values()))
    return Entry(
        name=form["name"],
        stage=form["stage"],
        path=path,
        is_partial=is_partial,
        size=size,
        freed=freed,
        is_listed=is_listed,
        completed=completed_at(path) if is_listed else None,
        used=files[CONTENTS].st_mtime if is_listed else used,
    )


def _sizes(files: list[os.stat_result]) -> tuple[int, int]:
    """Bytes of all files, and of those whose hard links are all among `files`."""
    statuses = {(status.st_dev, status.st_ino): status for status in files}
    names = Counter((status.st_dev, status.st_ino) for status in files)
    size = sum(status.st_size for status in statuses.values())
    freed = sum(status.st_size for inode, status in statuses.items() if names[inode] == status.st_nlink)
    return size, freed
