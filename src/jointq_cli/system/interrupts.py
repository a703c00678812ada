"""Deferred Ctrl-C: a run stops at the next safe point, so finished work is kept and no file is half-written."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from jointq_cli.errors import Interrupted

# Seconds in which a second SIGINT counts as the first: torchrun forwards the signal that the terminal sent to all.
_FORWARDED_WITHIN = 1.0


class Interrupts:
    """Remembers the first SIGINT; a second one raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self._requested = False
        self._since = 0.0

    def raise_if_requested(self) -> None:
        """Raises Interrupted (exit code 75) after a SIGINT; to be called where stopping is safe."""
        if self._requested:
            raise Interrupted("interrupted; everything finished is kept, and the same command continues here")

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if not self._requested:
            self._since = time.monotonic()
        elif time.monotonic() - self._since > _FORWARDED_WITHIN:
            raise KeyboardInterrupt
        self._requested = True


@contextmanager
def deferred() -> Iterator[Interrupts]:
    """Inside, SIGINT takes effect at the next `raise_if_requested`. Does nothing outside the main thread, where Python
    delivers no signals."""
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    previous = signal.signal(signal.SIGINT, interrupts._handle)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, previous)
