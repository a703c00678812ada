"""Ctrl-C that waits for the work at hand: nothing that was finished is lost, and nothing is half-written."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from jointq_cli.errors import Interrupted

_ECHO = 1.0  # seconds in which a second SIGINT is the first one: torchrun hands on what the terminal sent to all


class Interrupts:
    """Remembers the first SIGINT; a second one raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self._requested = False
        self._since = 0.0

    def raise_if_requested(self) -> None:
        """To be called where stopping is safe. Raises Interrupted (exit code 75)."""
        if self._requested:
            raise Interrupted("interrupted; everything finished is kept, and the same command continues here")

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if not self._requested:
            self._since = time.monotonic()
        elif time.monotonic() - self._since > _ECHO:
            raise KeyboardInterrupt
        self._requested = True


@contextmanager
def deferred() -> Iterator[Interrupts]:
    """Inside, SIGINT waits for `raise_if_requested`. Does nothing outside the main thread: no signal arrives there."""
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    previous = signal.signal(signal.SIGINT, interrupts._note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, previous)
