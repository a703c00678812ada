"""A content-addressed store of artifacts: an artifact that exists is complete, and is never computed twice.

An artifact is a directory named by its kind and its key. Knows nothing of what decides a key: that is `artifact_key`'s.
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

ATTEMPTS = 20  # to get a lock, per second


@dataclass(frozen=True)
class Artifact:
    """A finished directory of the store."""

    path: Path
    key: str  # sha256, 64 hex digits
    reused: bool


class Store:
    """Artifacts under one directory. Until it is closed, no process can remove the artifacts that it has returned.

    Raises ResourceError where it cannot write.
    """

    def __init__(
        self,
        root: Path,
        pause: Callable[[], None] = lambda: None,
        log: Callable[[str], None] = lambda text: None,
        team: Team = SINGLE_PROCESS,
    ) -> None:
        """pause: called while waiting for a lock, may raise. log: receives a line when the store waits for another
        process or finds a damaged artifact. team: all its processes must request the same artifacts in the same order;
        only rank 0 writes."""
        self.root = root
        self._team = team
        self._pause = pause
        self._log = log
        self._locks: dict[str, Lock] = {}  # shared locks by name of the artifact
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
        """Releases all artifacts: from now on they may be removed."""
        while self._locks:
            self._locks.popitem()[1].release()

    def reuse(
        self,
        kind: str,
        key: str,
        make: Callable[[Path], None],
        *,
        resumable: bool = False,
        together: bool = False,
    ) -> Artifact:
        """The artifact of this kind and key; computed by `make(scratch directory)` if it does not exist yet.

        resumable: `make` finds in its scratch directory what it wrote before it was stopped; otherwise it starts with
        an empty one. Two runs that need the same artifact take turns. An artifact whose files have changed since it
        was written is removed and computed again.
        together: all processes of the group call `make`, which may write on rank 0 only; otherwise only rank 0 calls
        it while the others wait.
        """
        name = artifact_name(kind, key)
        if self._team.rank > 0:
            self._assist(name, make, together)
            return Artifact(artifact_path(self.root, name), key, reused=False)
        computed = False

        def compute_together(scratch: Path) -> None:
            if together:
                self._team.broadcast(True)
            make(scratch)

        with translated_disk_errors(self.root):
            while not self._acquire(name, is_new=computed):  # another process may have removed it in between
                computed = self._compute(name, compute_together, resumable) or computed
        if together:
            self._team.broadcast(False)
        self._team.barrier()
        return Artifact(artifact_path(self.root, name), key, reused=not computed)

    def make_room(self, kind: str, key: str, *, budget: int, size: int) -> bool:
        """Whether `reuse` of a large artifact keeps all artifacts of its kind within `budget` bytes together.

        size: the expected bytes of this one. If it does not exist, least recently used artifacts of its kind are
        removed. False, and nothing is removed, if that cannot free enough because the others are in use.
        """
        name = artifact_name(kind, key)
        fits = False
        if self._team.rank == 0:
            with translated_disk_errors(self.root):
                fits = self._acquire(name) or self._reduce(kind, name, budget - size)
        return self._team.broadcast(fits)

    def _assist(self, name: str, make: Callable[[Path], None], together: bool) -> None:
        """What `reuse` does on ranks other than 0."""
        while together and self._team.broadcast(True):  # more than once if another run removes it immediately
            make(partial_path(self.root, name))
        self._team.barrier()
        if not self._acquire(name, is_new=True):
            place = artifact_path(self.root, name)
            raise ResourceError(f"{place}: does not exist for process {self._team.rank}; all must see the same disk")

    def path(self, kind: str, key: str) -> Path:
        """The directory of an artifact, which need not exist."""
        return artifact_path(self.root, artifact_name(kind, key))

    def _acquire(self, name: str, *, is_new: bool = False) -> bool:
        """Whether the artifact exists and is intact; if so, keeps a shared lock, so that it cannot be removed."""
        final = artifact_path(self.root, name)
        lock = self._locks.pop(name, None) or self._lock(name, Kind.SHARED)
        try:
            intact = final.is_dir() and (is_new or find_damage(final) is None)
        except BaseException:
            lock.release()
            raise
        if not intact:
            lock.release()
            return False
        self._locks[name] = lock
        with contextlib.suppress(OSError):  # a read-only store
            os.utime(final / CONTENTS)
        return True

    def _compute(self, name: str, make: Callable[[Path], None], resumable: bool) -> bool:
        """Computes an artifact and renames it into the store; False where another process has done so first."""
        final, scratch = artifact_path(self.root, name), partial_path(self.root, name)
        with self._lock(name, Kind.EXCLUSIVE):
            if os.path.lexists(final):
                damage = find_damage(final) if final.is_dir() else "is not a directory"
                if damage is None:
                    return False
                self._log(f"warning: {final}: {damage}; it is removed and computed again")
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

    def _reduce(self, kind: str, name: str, room: int) -> bool:
        """Whether the other artifacts of this kind take at most `room` bytes, if necessary after least recently used
        ones have been removed. Removes none if that would not be enough."""
        others = [entry for entry in entries(self.root) if entry.stage == kind and entry.name != name]
        with contextlib.ExitStack() as locks:

            def take(entry: Entry) -> bool:
                lock = lock_unused(self.root, entry)
                return lock is not None and locks.enter_context(lock) is lock

            excess = sum(entry.size for entry in others) - room
            unused = prune(others, excess, take).removed
            if sum(entry.size for entry in unused) < excess:
                return False
            for entry in unused:
                delete_locked(self.root, entry.path)
        return True

    def _lock(self, name: str, kind: Kind) -> Lock:
        """The lock of an artifact; waits as long as another process holds it."""
        is_logged = False
        while True:
            for _ in range(ATTEMPTS):
                lock = try_lock(lock_path(self.root, name), kind)
                if lock is not None:
                    return lock
                time.sleep(1 / ATTEMPTS)
            if not is_logged:
                verb = "writes" if kind is Kind.SHARED else "writes or uses"
                self._log(f"waiting for another process, which {verb} {name}")
            is_logged = True
            self._pause()


def artifact_name(kind: str, key: str) -> str:
    """The name of an artifact's directory."""
    return f"{kind}-{key[:16]}"
