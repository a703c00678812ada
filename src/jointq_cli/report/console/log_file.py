"""The complete log of a run in log.txt: each line with its time, and the warnings of all libraries.

Knows the logging module and one text file. Knows no terminal.
"""

import contextlib
import logging
import warnings
from datetime import datetime
from pathlib import Path
from typing import Self

from jointq_cli.system.files import translated_disk_errors

# Libraries whose loggers do not propagate to the root logger.
PRIVATE_LOGGERS = ("transformers", "datasets", "huggingface_hub", "accelerate")
LOGGED = "_jointq_logged"


class LogFile:
    """An open log. Appends, so that a continued run keeps its log; each line is written to the file at once.

    While it is open, Python's warnings become log records. Raises ResourceError when writing fails.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with translated_disk_errors(path):
            self._file = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        self._handler = _WarningHandler(self)
        self._loggers = [logging.getLogger(), *(logging.getLogger(name) for name in PRIVATE_LOGGERS)]

    @property
    def library_warnings(self) -> int:
        """The number of records of level WARNING and above."""
        return self._handler.count

    def __enter__(self) -> Self:
        for logger in self._loggers:
            logger.addHandler(self._handler)
        # logging.captureWarnings does not nest, and may already be on.
        self._show_warning = warnings.showwarning
        logging.captureWarnings(True)
        return self

    def __exit__(self, *error: object) -> None:
        if warnings.showwarning is not self._show_warning:
            logging.captureWarnings(False)
        for logger in self._loggers:
            logger.removeHandler(self._handler)
        # close() tries to write the buffer again after a full disk; that failure has already been raised.
        with contextlib.suppress(OSError):
            self._file.close()

    def write(self, text: str) -> None:
        """Writes each line of `text` with the local time before it."""
        stamp = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        with translated_disk_errors(self.path):
            self._file.write("".join(f"{stamp}  {line}\n" for line in text.splitlines() or [""]))


class _WarningHandler(logging.Handler):
    def __init__(self, log: LogFile) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        self.count = 0
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, LOGGED, False):  # by the library's own logger
            return
        setattr(record, LOGGED, True)
        self.count += 1
        self._log.write(self.format(record))
