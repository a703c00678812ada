"""Files on disk: atomic writes, hard links, hashes, and errors of the file system as ResourceError.

Knows nothing of artifacts and run directories.
"""

import contextlib
import errno
import functools
import hashlib
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jointq_cli.errors import ResourceError

UNFINISHED = ".partial"  # suffix of files that are being written


def nearest_existing(path: Path) -> Path:
    """The path itself, or its nearest parent that exists."""
    path = path.expanduser().absolute()
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hashes(root: Path, files: Iterable[Path]) -> dict[str, str]:
    """sha256 of each file's bytes by its path below `root`."""
    listed = list(files)
    with ThreadPoolExecutor() as pool:
        digests = pool.map(file_hash, listed)
        return {file.relative_to(root).as_posix(): digest for file, digest in zip(listed, digests, strict=True)}


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write(scratch file)` and renames the scratch file to `path`: readers see the old file or the new one."""
    # Unique to this thread: two writers of the same file, even on two hosts, must not rename each other's scratch file.
    author = f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    scratch = path.with_name(f".{path.name}.{author}{UNFINISHED}")
    try:
        write(scratch)
        sync(scratch)
        os.replace(scratch, path)
    finally:  # a rename onto another hard link of the same file leaves both names
        scratch.unlink(missing_ok=True)


def discard_unfinished(directory: Path) -> None:
    """Deletes scratch files that killed calls of `write_atomically` left. No other process may be writing there."""
    for path in directory.rglob(f".*{UNFINISHED}"):
        path.unlink()


def write_text_atomically(path: Path, text: str) -> None:
    """Writes `text` to `path` as UTF-8, completely or not at all. Raises ResourceError."""
    with translated_disk_errors(path):
        write_atomically(path, lambda scratch: _write_text(scratch, text))


def _write_text(path: Path, text: str) -> None:
    path.write_bytes(encoded(text))


def encoded(text: str) -> bytes:
    """UTF-8. A byte of a path that is not UTF-8, which Python holds as a surrogate, becomes an escape such as \\udcff,
    which JSON and yaml read back."""
    return text.encode("utf-8", "backslashreplace")


def check_utf8(path: Path) -> None:
    """Raises ResourceError for a path that safetensors cannot open."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ResourceError(
            f"{path}: has bytes that are not UTF-8, and safetensors opens no such file; rename it, or name a link to it"
        ) from error


def link_files(source: Path, target: Path, pattern: str = "*") -> None:
    """Makes `target` hold the files of `source` that match `pattern`, and no other files.

    Weights become hard links where the disk allows: nobody edits a weight file in place, so it may be shared with the
    store. Other files, such as config.json, are copied because people do edit them.
    """
    target.mkdir(parents=True, exist_ok=True)
    files = sorted(source.glob(pattern))
    for old in target.iterdir():  # left by an earlier run into this directory
        if old.name not in {file.name for file in files} and not old.is_dir():
            old.unlink()
    for file in files:
        write_atomically(target / file.name, functools.partial(_link_or_copy, file))


def _link_or_copy(file: Path, scratch: Path) -> None:
    scratch.unlink(missing_ok=True)
    if file.suffix in (".safetensors", ".gguf"):
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(file, scratch)
            return
    shutil.copyfile(file, scratch)


@contextlib.contextmanager
def translated_disk_errors(path: Path) -> Iterator[None]:
    """Turns the errors of a full, read-only or forbidden disk into a ResourceError that names the file, or `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(f"{error.filename or path}: the disk is full; what was finished is kept") from error
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise ResourceError(f"{error.filename or path}: the file system has no locks ({error.strerror})") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
            raise ResourceError(f"{error.filename or path}: cannot be written ({error.strerror})") from error
        raise


def sync_tree(directory: Path) -> None:
    """Flushes a directory and everything below it to disk (fsync)."""
    for path in (*directory.rglob("*"), directory):
        sync(path)


def sync(path: Path) -> None:
    """Flushes one file or directory to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
