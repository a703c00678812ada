"""The complete account of a run in log.txt: every line with its time, and every warning of any library.

Knows the logging module and one text file. Knows no terminal.
"""

import contextlib
import logging
import warnings
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from jointq_cli.system.files import translated_disk_errors

# Libraries whose loggers end at their own handler, so that the root logger never hears them.
PRIVATE_LOGGERS = ("transformers", "datasets", "huggingface_hub", "accelerate")
SEEN = "_jointq_seen"


class LogFile:
    """An open log. Appends, so that a continued run keeps what was there; each line reaches the disk at once.

    While it is open, Python's warnings are turned into log records. Raises ResourceError when writing fails.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with translated_disk_errors(path):
            self._file = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        self._handler = _Listener(self)
        self._listened = [logging.getLogger(), *(logging.getLogger(name) for name in PRIVATE_LOGGERS)]

    @property
    def library_warnings(self) -> int:
        """How many records of WARNING and up have been heard."""
        return self._handler.heard

    def __enter__(self) -> Self:
        for logger in self._listened:
            logger.addHandler(self._handler)
        # Remembered by hand: logging.captureWarnings does not nest, and may have been switched on before.
        self._show_warning = warnings.showwarning
        logging.captureWarnings(True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if warnings.showwarning is not self._show_warning:
            logging.captureWarnings(False)
        for logger in self._listened:
            logger.removeHandler(self._handler)
        # What a full disk refused is tried again by close, and was told when it was written.
        with contextlib.suppress(OSError):
            self._file.close()

    def write(self, text: str) -> None:
        """Each line of `text` behind the local time."""
        stamp = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        with translated_disk_errors(self.path):
            self._file.write("".join(f"{stamp}  {line}\n" for line in text.splitlines() or [""]))


class _Listener(logging.Handler):
    def __init__(self, log: LogFile) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        self.heard = 0
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, SEEN, False):  # heard on a library's own logger already
            return
        setattr(record, SEEN, True)
        self.heard += 1
        self._log.write(self.format(record))
