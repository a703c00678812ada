"""A content-addressed store of artifacts: what exists is complete, and nothing is made twice.

An artifact is a directory named by its stage and the sha256 of everything that decides its content: the stage, the
types and values of its settings, the keys of what it was made from, and the versions of the code that makes it. Where
a run computes, how loudly and into which directory is no part of a key.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from jointq_cli.errors import ResourceError
from jointq_cli.team import ALONE, Team

LIBRARIES = ("torch", "transformers", "numba")  # whose versions may change a result's bits


@dataclass(frozen=True)
class Artifact:
    """A finished directory of the store."""

    path: Path
    key: str  # sha256, 64 hex digits
    reused: bool


class Store:
    """Artifacts under one directory. Raises ResourceError where it cannot write."""

    def __init__(
        self,
        root: Path,
        pause: Callable[[], None] = lambda: None,
        tell: Callable[[str], None] = lambda text: None,
        team: Team = ALONE,
    ) -> None:
        """pause: called while waiting, may raise. tell: hears what is being waited for. team: all its processes ask
        this store for the same artifacts in the same order, and only the leader writes."""
        self.root = root
        self._team = team
        self._pause = pause
        self._tell = tell
        self._scratch = root / "partial"
        with translated_disk_errors(root):
            self._scratch.mkdir(parents=True, exist_ok=True)

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
        """The artifact of `stage` for these settings and inputs, made by `make(scratch directory)` if it is not there.

        inputs: keys or hashes of what it is made from. A `resumable` stage finds what it left in its scratch directory
        when it was stopped; any other starts from an empty one. Two processes that want the same artifact take turns.
        The leader of a team makes it while the others wait, or they call `make` together; then it must leave writing to
        the leader.
        """
        key = artifact_key(stage, spec, inputs)
        final = self.root / f"{stage}-{key[:16]}"
        helped = together and self._team.rank > 0
        if helped and self._team.share(True):
            make(self._scratch / final.name)
        reused = False if self._team.rank > 0 else self._make(final, make, resumable, together)
        self._team.wait()
        if not final.is_dir():
            raise ResourceError(f"{final}: is not there for process {self._team.rank}; all must see the same disk")
        return Artifact(final, key, reused)

    def _make(self, final: Path, make: Callable[[Path], None], resumable: bool, together: bool) -> bool:
        """Whether it was there already."""
        begins = self._team.share if together else bool
        if final.is_dir():
            return not begins(False)
        scratch = self._scratch / final.name
        with translated_disk_errors(self.root), self._alone(scratch):
            if final.is_dir():
                return not begins(False)
            if not resumable:
                shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(exist_ok=True)
            begins(True)
            make(scratch)
            _sync_tree(scratch)
            os.rename(scratch, final)
            _sync(self.root)
        # The lock file stays: to delete it while another process waits on it would give out the same lock twice.
        return False

    def holds(self, stage: str, spec: object, inputs: list[str]) -> bool:
        """Whether `reuse` would find this artifact."""
        return (self.root / f"{stage}-{artifact_key(stage, spec, inputs)[:16]}").is_dir()

    @contextlib.contextmanager
    def _alone(self, scratch: Path) -> Iterator[None]:
        """Inside, no other process makes this artifact."""
        lock = FileLock(f"{scratch}.lock")
        waiting = False
        while True:
            try:
                lock.acquire(timeout=1)
                break
            except Timeout:
                if not waiting:
                    self._tell(f"waiting for another process, which makes {scratch.name}")
                waiting = True
                self._pause()
        try:
            yield
        finally:
            lock.release()


def artifact_key(stage: str, spec: object, inputs: list[str]) -> str:
    """sha256 over the canonical JSON of everything that decides an artifact's content."""
    identity = {"stage": stage, "spec": _canonical(spec), "inputs": inputs, "code": code_version()}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


@functools.cache
def code_version() -> str:
    """Digest of this package's sources and of the libraries that compute: other code makes other artifacts."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    for library in LIBRARIES:
        digest.update(f"{library}={version(library)}".encode())
    return digest.hexdigest()


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """`write(scratch file)`, then rename over `path`: readers see the old file or the new one, never a part."""
    scratch = path.with_name(f".{path.name}.partial")
    try:
        write(scratch)
        _sync(scratch)
        os.replace(scratch, path)
    finally:  # also after a rename onto another link of the same file, which leaves both names
        scratch.unlink(missing_ok=True)


def link_files(source: Path, target: Path, pattern: str = "*") -> None:
    """The files of directory `source`, and nothing else, in `target`: weights as hard links where the disk allows.

    A weight file is never edited in place, so it may be shared with the store; a config.json may well be.
    """
    target.mkdir(parents=True, exist_ok=True)
    files = sorted(source.glob(pattern))
    for old in target.iterdir():  # of an earlier run into this directory
        if old.name not in {file.name for file in files}:
            old.unlink()
    for file in files:
        write_atomically(target / file.name, functools.partial(_link_or_copy, file))


def _link_or_copy(file: Path, scratch: Path) -> None:
    scratch.unlink(missing_ok=True)
    if file.suffix == ".safetensors":
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(file, scratch)
            return
    shutil.copyfile(file, scratch)


@contextlib.contextmanager
def translated_disk_errors(path: Path) -> Any:
    """Turns the errors of a full, read-only or forbidden disk into a ResourceError that names the place."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(f"{error.filename or path}: the disk is full; what was finished is kept") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise ResourceError(f"{error.filename or path}: cannot be written ({error.strerror})") from error
        raise


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


def _sync_tree(directory: Path) -> None:
    for path in (*directory.rglob("*"), directory):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
