"""Ctrl-C that waits for the work at hand: nothing that was finished is lost, and nothing is half-written."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from jointq_cli.errors import Interrupted


class Interrupts:
    """Remembers the first SIGINT; a second one raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self._requested = False

    def raise_if_requested(self) -> None:
        """To be called where stopping is safe. Raises Interrupted (exit code 75)."""
        if self._requested:
            raise Interrupted("interrupted; everything finished is kept, and the same command continues here")

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._requested:
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
