"""What lies in a store's directory, and how some of it is taken away.

    STORE/.jointq-store        says that this directory is a store
    STORE/STAGE-KEY/           an artifact: what a stage has finished, and .contents.json
    STORE/partial/STAGE-KEY/   what a stage has done so far, or had when it was stopped
    STORE/locks/STAGE-KEY      held by those who use it (shared) and by who makes or removes it (exclusive)

Never follows a symbolic link, and never touches what has not the form of the above.
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
REMOVED = ".removed"  # behind the name of what is being deleted
_FORM = re.compile(r"(?P<name>(?P<stage>\w+)-[0-9a-f]{16})(?P<removed>\.removed)?")


@dataclass(frozen=True)
class Entry:
    """An artifact, or partial work. No two of them share a file."""

    name: str  # STAGE-KEY
    stage: str
    path: Path
    is_partial: bool
    size: int  # bytes, each file counted once however many names it has
    freed: int  # bytes that the disk would get back: not those of files that run directories link to
    is_listed: bool  # whether it has its list of what it holds; without one it is never removed
    completed: float | None  # seconds since 1970; None where that is not known
    used: float  # last time, seconds since 1970

    @property
    def is_removable(self) -> bool:
        return self.is_partial or self.is_listed


@dataclass(frozen=True)
class Pruned:
    """removed: what was taken away. busy: what would have been, had nobody used it."""

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
    """Raises JointqError where a store's own directories lie elsewhere: what is removed there would not be the store's,
    and what is made there could not be given its name."""
    for place in (root / PARTIAL, root / LOCKS):
        if place.is_symlink() or (place.exists() and place.stat().st_dev != root.stat().st_dev):
            raise JointqError(f"{place}: must be a directory of the store itself and on its disk; give another store")


def artifact_path(root: Path, name: str) -> Path:
    return root / name


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
    """Least recently used first. What was used in the future, by a clock that went back since, comes last."""
    return sorted(found, key=lambda entry: (entry.used, entry.name))


def is_in_use(root: Path, entry: Entry) -> bool:
    return is_locked(lock_path(root, entry.name))


def damage(root: Path, entry: Entry) -> str | None:
    """What is wrong with an artifact that nobody is just making."""
    lock = try_lock(lock_path(root, entry.name), Kind.SHARED)
    if lock is None:
        return None
    with lock:
        return find_damage(entry.path) if entry.path.is_dir() else None


def lock_unused(root: Path, entry: Entry) -> Lock | None:
    """The exclusive lock on an entry; None where somebody uses it, or has used it since it was looked at."""
    lock = try_lock(lock_path(root, entry.name), Kind.EXCLUSIVE)
    if lock is None:
        return None
    now = _entry(entry.path, is_partial=entry.is_partial)
    if now is None or now.used <= entry.used:
        return lock
    lock.release()
    return None


def remove(root: Path, entry: Entry) -> bool:
    """Takes an entry away; False, and leaves it, where somebody uses it."""
    lock = lock_unused(root, entry)
    if lock is None:
        return False
    with lock:
        delete_locked(root, entry.path)
        lock.discard_file()
    return True


def delete_locked(root: Path, path: Path) -> None:
    """Deletes `path`, of which the caller has the exclusive lock. Killed at any point, it leaves no half of an
    artifact under an artifact's name."""
    doomed = root / PARTIAL / f"{path.name.removesuffix(REMOVED)}{REMOVED}"
    if path != doomed:
        doomed.parent.mkdir(exist_ok=True)
        delete(doomed)
        with suppress(FileNotFoundError):  # somebody else was quicker
            os.rename(path, doomed)
    delete(doomed)


def delete(path: Path) -> None:
    """A file, a link or a whole directory; what a link points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def prune(candidates: Iterable[Entry], excess: float, take: Callable[[Entry], bool]) -> Pruned:
    """Takes least recently used entries away until at least `excess` bytes are gone; take: tells whether it could."""
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
    """None for what is none, or has disappeared by now."""
    form = _FORM.fullmatch(path.name)
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
    """Bytes of all files, and of those that have all their names here."""
    statuses = {(status.st_dev, status.st_ino): status for status in files}
    names = Counter((status.st_dev, status.st_ino) for status in files)
    size = sum(status.st_size for status in statuses.values())
    freed = sum(status.st_size for inode, status in statuses.items() if names[inode] == status.st_nlink)
    return size, freed
