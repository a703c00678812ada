"""A content-addressed store of artifacts: an artifact that exists is complete, and is never computed twice.

An artifact is a directory named by its stage and the sha256 of everything that decides its content: the stage, the
types and values of its settings, the keys of its inputs, and the versions of the code that computes it. Device, output
directory and verbosity of a run are not part of a key.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

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

LIBRARIES = ("torch", "transformers", "numba")  # whose versions may change a result's bits
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
        self._held: dict[str, Lock] = {}  # shared locks by name of the artifact
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
        while self._held:
            self._held.popitem()[1].release()

    def reuse(
        self,
        stage: str,
        spec: object,
        inputs: list[str],
        make: Callable[[Path], None],
        *,
        resumable: bool = False,
        together: bool = False,
    ) -> Artifact:
        """The artifact of `stage` for these settings and inputs; computed by `make(scratch directory)` if it does not
        exist yet.

        inputs: keys or hashes of what it is computed from. A `resumable` stage finds in its scratch directory what it
        wrote before it was stopped; any other starts with an empty one. Two runs that need the same artifact take
        turns. An artifact whose files have changed since it was written is removed and computed again.
        together: all processes of the group call `make`, which may write on rank 0 only; otherwise only rank 0 calls
        it while the others wait.
        """
        key = artifact_key(stage, spec, inputs)
        name = _name(stage, key)
        if self._team.rank > 0:
            self._assist(name, make, together)
            return Artifact(artifact_path(self.root, name), key, reused=False)
        made = False

        def make_together(scratch: Path) -> None:
            if together:
                self._team.broadcast(True)
            make(scratch)

        with translated_disk_errors(self.root):
            while not self._hold(name, is_new=made):  # another process may have removed it in between
                made = self._make(name, make_together, resumable) or made
        if together:
            self._team.broadcast(False)
        self._team.barrier()
        return Artifact(artifact_path(self.root, name), key, reused=not made)

    def reuse_within(
        self,
        stage: str,
        spec: object,
        inputs: list[str],
        make: Callable[[Path], None],
        *,
        budget: int,
        size: int,
        resumable: bool = False,
        together: bool = False,
    ) -> Artifact | None:
        """As `reuse`, for large artifacts: all artifacts of `stage` together may take `budget` bytes.

        size: the expected bytes of this one. Before it is computed, least recently used artifacts of its stage are
        removed. Returns None, and removes nothing, if that cannot free enough because the others are in use.
        """
        name = _name(stage, artifact_key(stage, spec, inputs))
        fits = False
        if self._team.rank == 0:
            with translated_disk_errors(self.root):
                fits = self._hold(name) or self._make_room(stage, name, budget - size)
        if not self._team.broadcast(fits):
            return None
        return self.reuse(stage, spec, inputs, make, resumable=resumable, together=together)

    def _assist(self, name: str, make: Callable[[Path], None], together: bool) -> None:
        """What `reuse` does on ranks other than 0."""
        while together and self._team.broadcast(True):  # more than once if another run removes it immediately
            make(partial_path(self.root, name))
        self._team.barrier()
        if not self._hold(name, is_new=True):
            place = artifact_path(self.root, name)
            raise ResourceError(f"{place}: does not exist for process {self._team.rank}; all must see the same disk")

    def holds(self, stage: str, spec: object, inputs: list[str]) -> bool:
        """Whether `reuse` would find this artifact."""
        return artifact_path(self.root, _name(stage, artifact_key(stage, spec, inputs))).is_dir()

    def _hold(self, name: str, *, is_new: bool = False) -> bool:
        """Whether the artifact exists and is intact; if so, keeps a shared lock, so that it cannot be removed."""
        final = artifact_path(self.root, name)
        lock = self._held.pop(name, None) or self._lock(name, Kind.SHARED)
        try:
            intact = final.is_dir() and (is_new or find_damage(final) is None)
        except BaseException:
            lock.release()
            raise
        if not intact:
            lock.release()
            return False
        self._held[name] = lock
        with contextlib.suppress(OSError):  # a read-only store
            os.utime(final / CONTENTS)
        return True

    def _make(self, name: str, make: Callable[[Path], None], resumable: bool) -> bool:
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

    def _make_room(self, stage: str, name: str, room: int) -> bool:
        """Whether the other artifacts of `stage` take at most `room` bytes, if necessary after least recently used ones
        have been removed. Removes none if that would not be enough."""
        others = [entry for entry in entries(self.root) if entry.stage == stage and entry.name != name]
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


def _name(stage: str, key: str) -> str:
    return f"{stage}-{key[:16]}"


def artifact_key(stage: str, spec: object, inputs: list[str]) -> str:
    """sha256 over the canonical JSON of everything that decides an artifact's content."""
    identity = {"stage": stage, "spec": _canonical(spec), "inputs": inputs, "code": code_version()}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


@functools.cache
def code_version() -> str:
    """Digest of this package's sources and of the libraries that compute: other code makes other artifacts."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    for library in LIBRARIES:
        digest.update(f"{library}={version(library)}".encode())
    return digest.hexdigest()


def _canonical(value: object) -> Any:
    """JSON that tells apart what may compute differently: the type of a dataclass is part of it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _canonical(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": f"{type(value).__module__}.{type(value).__qualname__}", **fields}
    if isinstance(value, dict):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a store key cannot hold a {type(value).__name__}")
