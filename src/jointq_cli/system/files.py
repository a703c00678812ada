"""Files on disk, whole or not at all: atomic writes, hard links, and what a disk that refuses is told as.

Knows no artifact and no run directory.
"""

import contextlib
import errno
import functools
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from jointq_cli.errors import ResourceError

UNFINISHED = ".partial"  # at the end of the names of files that are being written


def nearest_existing(path: Path) -> Path:
    """The path itself, or the closest directory above it that exists."""
    path = path.expanduser().absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """`write(scratch file)`, then rename over `path`: readers see the old file or the new one, never a part."""
    # Of this thread alone: two that write the same file, be it on two hosts, must not rename each other's.
    author = f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    scratch = path.with_name(f".{path.name}.{author}{UNFINISHED}")
    try:
        write(scratch)
        sync(scratch)
        os.replace(scratch, path)
    finally:  # also after a rename onto another link of the same file, which leaves both names
        scratch.unlink(missing_ok=True)


def discard_unfinished(directory: Path) -> None:
    """Deletes what a killed `write_atomically` has left, where nobody else is writing."""
    for path in directory.rglob(f".*{UNFINISHED}"):
        path.unlink()


def write_text_atomically(path: Path, text: str) -> None:
    """Puts `text` at `path` as UTF-8, whole or not at all. Raises ResourceError."""
    with translated_disk_errors(path):
        write_atomically(path, lambda scratch: _write_text(scratch, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def link_files(source: Path, target: Path, pattern: str = "*") -> None:
    """The files of directory `source`, and no others, in `target`: weights as hard links where the disk allows.

    A weight file is never edited in place, so it may be shared with the store; a config.json may well be.
    """
    target.mkdir(parents=True, exist_ok=True)
    files = sorted(source.glob(pattern))
    for old in target.iterdir():  # of an earlier run into this directory
        if old.name not in {file.name for file in files} and not old.is_dir():
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
def translated_disk_errors(path: Path) -> Iterator[None]:
    """Turns the errors of a full, read-only or forbidden disk into a ResourceError that names the place."""
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
    for path in (*directory.rglob("*"), directory):
        sync(path)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
