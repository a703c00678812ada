"""A content-addressed store of artifacts: what exists is complete, and nothing is computed twice.

An artifact is a directory named by its kind and its key (`artifact_key`). Knows nothing of what decides a key.
"""

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from jointq_cli.errors import ResourceError
from jointq_cli.system.distributed import SINGLE_PROCESS, Team
from jointq_cli.system.files import discard_unfinished, sync, sync_tree, translated_disk_errors
from jointq_cli.system.integrity import CONTENTS, find_damage, write_contents
from jointq_cli.system.inventory import (
    MARKER,
    Entry,
    artifact_path,
    check_inside,
    delete,
    delete_locked,
    entries,
    lock_path,
    lock_unused,
    partial_path,
    prune,
)
from jointq_cli.system.locks import Kind, Lock, try_lock

ATTEMPTS = 20  # a second, to get a lock


@dataclass(frozen=True)
class Artifact:
    """A finished directory of the store."""

    path: Path
    key: str  # sha256, 64 hex digits
    reused: bool


class Store:
    """Artifacts under one directory. Inside its context nobody removes what it gave out.

    Raises ResourceError where it cannot write.
    """

    def __init__(
        self,
        root: Path,
        pause: Callable[[], None] = lambda: None,
        log: Callable[[str], None] = lambda text: None,
        team: Team = SINGLE_PROCESS,
    ) -> None:
        """pause: called while waiting, may raise. tell: hears what is being waited for, and what is found damaged.
        team: all its processes ask this store for the same artifacts in the same order, and only the leader writes."""
        self.root = root
        self._team = team
        self._pause = pause
        self._log = log
        self._held: dict[str, Lock] = {}  # shared, by the name of the artifact
        with translated_disk_errors(root):
            root.mkdir(parents=True, exist_ok=True)
            check_inside(root)
            if not (root / MARKER).exists():
                (root / MARKER).touch()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of all artifacts: from now on they may be removed."""
        while self._held:
            self._held.popitem()[1].release()

    def reuse(
        self,
        kind: str,
        key: str,
        make: Callable[[Path], None],
        *,
        resumable: bool = False,
        together: bool = False,
    ) -> Artifact:
        """The artifact of this kind and key (`artifact_key`), written by `make(scratch directory)` if it is missing.

        resumable: `make` finds what an interrupted run has left in the scratch directory; otherwise that is empty. Two
        runs that want the same artifact take turns. An artifact whose files have changed since it was written is
        removed and computed again. together: all processes of the team call `make`, which writes on rank 0 only;
        otherwise rank 0 calls it and the others wait.
        """
        name = artifact_name(kind, key)
        if self._team.rank > 0:
            self._help(name, make, together)
            return Artifact(artifact_path(self.root, name), key, reused=False)
        made = False

        def make_together(scratch: Path) -> None:
            if together:
                self._team.broadcast(True)
            make(scratch)

        with translated_disk_errors(self.root):
            while not self._hold(name, is_new=made):  # who removes an artifact may have been quicker
                made = self._make(name, make_together, resumable) or made
        if together:
            self._team.broadcast(False)
        self._team.barrier()
        return Artifact(artifact_path(self.root, name), key, reused=not made)

    def reuse_within(
        self,
        kind: str,
        key: str,
        make: Callable[[Path], None],
        *,
        budget: int,
        size: int,
        resumable: bool = False,
        together: bool = False,
    ) -> Artifact | None:
        """As `reuse`, for large artifacts: all of this kind may take `budget` bytes together.

        size: the most that this one will take, in bytes. If it is missing, the least recently used of its kind are
        removed first; returns None, and removes none, where that is not enough because the others are in use.
        """
        name = artifact_name(kind, key)
        fits = False
        if self._team.rank == 0:
            with translated_disk_errors(self.root):
                fits = self._hold(name) or self._make_room(kind, name, budget - size)
        if not self._team.broadcast(fits):
            return None
        return self.reuse(kind, key, make, resumable=resumable, together=together)

    def _help(self, name: str, make: Callable[[Path], None], together: bool) -> None:
        """The part in `reuse` of a process that does not lead."""
        while together and self._team.broadcast(True):  # again where it was removed as soon as it was made
            make(partial_path(self.root, name))
        self._team.barrier()
        if not self._hold(name, is_new=True):
            place = artifact_path(self.root, name)
            raise ResourceError(f"{place}: is not there for process {self._team.rank}; all must see the same disk")

    def path(self, kind: str, key: str) -> Path:
        """The directory of an artifact, which need not exist."""
        return artifact_path(self.root, artifact_name(kind, key))

    def _hold(self, name: str, *, is_new: bool = False) -> bool:
        """Whether the artifact is there and whole; if so, nobody can remove it from now on."""
        final = artifact_path(self.root, name)
        lock = self._held.pop(name, None) or self._lock(name, Kind.SHARED)
        try:
            whole = final.is_dir() and (is_new or find_damage(final) is None)
        except BaseException:
            lock.release()
            raise
        if not whole:
            lock.release()
            return False
        self._held[name] = lock
        with contextlib.suppress(OSError):  # on a store that this user may only read
            os.utime(final / CONTENTS)
        return True

    def _make(self, name: str, make: Callable[[Path], None], resumable: bool) -> bool:
        """Puts a whole artifact in its place; False where another process was quicker."""
        final, scratch = artifact_path(self.root, name), partial_path(self.root, name)
        with self._lock(name, Kind.EXCLUSIVE):
            if os.path.lexists(final):
                damage = find_damage(final) if final.is_dir() else "is no directory"
                if damage is None:
                    return False
                self._log(f"warning: {final}: {damage}; it is taken away and made anew")
                delete_locked(self.root, final)
            if not resumable or scratch.is_symlink():
                delete(scratch)
            scratch.mkdir(parents=True, exist_ok=True)
            discard_unfinished(scratch)
            make(scratch)
            write_contents(scratch)
            sync_tree(scratch)
            os.rename(scratch, final)
            sync(self.root)
        return True

    def _make_room(self, kind: str, name: str, room: int) -> bool:
        """Whether the artifacts of this kind, without `name` itself, take at most `room` bytes. If they take more, the
        least recently used are removed; none is where that would not suffice."""
        others = [entry for entry in entries(self.root) if entry.stage == kind and entry.name != name]
        with contextlib.ExitStack() as locks:

            def take(entry: Entry) -> bool:
                lock = lock_unused(self.root, entry)
                return lock is not None and locks.enter_context(lock) is lock

            excess = sum(entry.size for entry in others) - room
            doomed = prune(others, excess, take).removed
            if sum(entry.size for entry in doomed) < excess:
                return False
            for entry in doomed:
                delete_locked(self.root, entry.path)
        return True

    def _lock(self, name: str, kind: Kind) -> Lock:
        """The lock of an artifact, however long that takes."""
        told = False
        while True:
            for _ in range(ATTEMPTS):
                lock = try_lock(lock_path(self.root, name), kind)
                if lock is not None:
                    return lock
                time.sleep(1 / ATTEMPTS)
            if not told:
                verb = "makes" if kind is Kind.SHARED else "makes or uses"
                self._log(f"waiting for another process, which {verb} {name}")
            told = True
            self._pause()


def artifact_name(kind: str, key: str) -> str:
    """The name of an artifact's directory."""
    return f"{kind}-{key[:16]}"
