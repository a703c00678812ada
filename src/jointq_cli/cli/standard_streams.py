"""Standard output and error that commands can print on, whatever they are: closed, full, a terminal that is gone, or
of an encoding that lacks a character."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from jointq_cli.errors import ResourceError


def prepare() -> None:
    """Replaces sys.stdout and sys.stderr by streams that raise no UnicodeError, and no OSError but BrokenPipeError.

    Leaves streams alone that the caller of `main` has replaced.
    """
    for descriptor in (0, 1, 2):
        with suppress(OSError):
            os.fstat(descriptor)
            continue
        os.open(os.devnull, os.O_RDWR)  # takes the number, which would else go to the next file that is opened
    if sys.stdout is sys.__stdout__:
        sys.stdout = _Stream(1, sys.stdout, "replace", "standard output")
    if sys.stderr is sys.__stderr__:
        sys.stderr = _Stream(2, sys.stderr, "backslashreplace")


class _Stream(io.TextIOWrapper):
    """Writes to a descriptor. After an error it writes to os.devnull, since Python flushes once more at its exit.

    name: for the ResourceError after an error of the disk; if empty, no error is raised.
    """

    def __init__(self, descriptor: int, model: io.TextIOBase | None, errors: str, name: str = "") -> None:
        file = open(descriptor, "wb", closefd=False)  # noqa: SIM115 - lasts as long as the process
        encoding = (model and model.encoding) or "utf-8"
        super().__init__(file, encoding, errors, line_buffering=not name or file.isatty())
        self._called = name

    def write(self, text: str) -> int:
        with self._translated():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with self._translated():
            super().flush()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            if not self._called or error.errno == errno.EIO:  # EIO: the terminal is gone
                return
            if isinstance(error, BrokenPipeError):
                raise
            raise ResourceError(f"{self._called}: cannot be written ({error.strerror})") from error
