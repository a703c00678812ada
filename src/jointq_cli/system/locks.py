"""Locks on files (flock): shared for reading, exclusive for writing or removing.

The kernel releases the locks of a process that ends, however it ends, so there are no stale locks. POSIX only. Never
waits, and knows nothing of what is locked.
"""

import enum
import errno
import fcntl
import os
from pathlib import Path
from typing import Self

from jointq_cli.system.files import nearest_existing


class Kind(enum.Enum):
    """SHARED: any number of holders at once. EXCLUSIVE: a single holder."""

    SHARED = fcntl.LOCK_SH
    EXCLUSIVE = fcntl.LOCK_EX


class Lock:
    """A lock that is held until it is released."""

    def __init__(self, path: Path, descriptor: int | None) -> None:
        self._path = path
        self._descriptor = descriptor

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def discard_file(self) -> None:
        """Deletes the lock file; only for an exclusive holder. Other processes notice, see `try_lock`."""
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def try_lock(path: Path, kind: Kind) -> Lock | None:
    """The lock on `path`, which is created if needed; None while another process holds a conflicting one.

    On a read-only disk nothing can be written or removed, so a shared lock needs no lock file there.
    """
    if kind is Kind.SHARED and not path.exists() and not os.access(nearest_existing(path), os.W_OK):
        return Lock(path, None)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Opening for reading is enough for a shared lock, also on another user's file; NFS requires a writable file for an
    # exclusive one.
    mode = os.O_RDONLY if kind is Kind.SHARED else os.O_RDWR
    while True:
        descriptor = os.open(path, mode | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, kind.value | fcntl.LOCK_NB)
            if _is_still(path, descriptor):
                return Lock(path, descriptor)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the file was deleted in between: a lock on it would exclude no one


def is_locked(path: Path) -> bool:
    """Whether any process holds a lock on `path` at this moment. Creates nothing."""
    mode = os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY  # as in `try_lock`
    try:
        descriptor = os.open(path, mode | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno != errno.EBADF:  # NFS, of a file that only its owner may write
            raise
        return True  # it may be locked: leave it alone
    finally:
        os.close(descriptor)
    return False


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
