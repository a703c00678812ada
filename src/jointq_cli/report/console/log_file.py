"""The complete log of a run in log.txt: each line with its time, and the warnings of all libraries."""

import contextlib
import logging
import warnings
from datetime import datetime
from pathlib import Path
from typing import Self

from jointq_cli.system.files import translated_disk_errors

# The root, and those of libraries that do not propagate to it.
LOGGERS = ("", "transformers", "datasets", "huggingface_hub", "accelerate")
LOGGED = "_jointq_logged"


class LogFile(logging.Handler):
    """An open log. Appends, so that a continued run keeps its log; each line is written to the file at once.

    While it is open, warnings of loggers and of Python's `warnings` enter it. Raises ResourceError when writing fails.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        self.path = path
        self.library_warnings = 0  # how many
        with translated_disk_errors(path):
            self._file = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)

    def __enter__(self) -> Self:
        for name in LOGGERS:
            logging.getLogger(name).addHandler(self)
        # logging.captureWarnings does not nest, and may already be on.
        self._show_warning = warnings.showwarning
        logging.captureWarnings(True)
        return self

    def __exit__(self, *error: object) -> None:
        if warnings.showwarning is not self._show_warning:
            logging.captureWarnings(False)
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(self)
        # close() tries to write the buffer again after a full disk; that failure has already been raised.
        with contextlib.suppress(OSError):
            self._file.close()

    def write(self, text: str) -> None:
        """Writes each line of `text` with the local time before it."""
        stamp = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        with translated_disk_errors(self.path):
            self._file.write("".join(f"{stamp}  {line.rstrip()}\n" for line in text.splitlines()))

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, LOGGED, False):  # by the library's own logger
            setattr(record, LOGGED, True)
            self.library_warnings += 1
            self.write(self.format(record))
