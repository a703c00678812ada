"""Deferred Ctrl-C: a run stops at the next safe point, so finished work is kept and no file is half-written.

SIGTERM (kill, a scheduler, torchrun) and SIGHUP (the terminal is closed) are treated as SIGINT.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jointq_cli.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Seconds in which a second signal counts as the first: torchrun forwards the signal that the terminal sent to all.
_FORWARDED_WITHIN = 1.0


class Interrupts:
    """Remembers the first signal; a second one raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self._requested = False
        self._since = 0.0

    def raise_if_requested(self) -> None:
        """Raises Interrupted (exit code 75) after a signal; to be called where stopping is safe."""
        if self._requested:
            raise Interrupted

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if not self._requested:
            self._since = time.monotonic()
        elif time.monotonic() - self._since > _FORWARDED_WITHIN:
            raise KeyboardInterrupt
        self._requested = True


@contextmanager
def deferred() -> Iterator[Interrupts]:
    """Inside, the signals take effect at the next `raise_if_requested`."""
    interrupts = Interrupts()
    with handled_by(interrupts._handle):
        yield interrupts


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], Any] | signal.Handlers) -> Iterator[None]:
    """Inside, the signals call `handler`, except SIGHUP where it is ignored (nohup). Does nothing outside the main
    thread, where Python delivers no signals."""
    numbers = _SIGNALS if threading.current_thread() is threading.main_thread() else ()
    previous = {number: signal.getsignal(number) for number in numbers}
    if previous.get(signal.SIGHUP) is signal.SIG_IGN:
        del previous[signal.SIGHUP]
    for number in previous:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def raise_at_once(signum: int, frame: FrameType | None) -> None:
    """A handler: raises KeyboardInterrupt."""
    raise KeyboardInterrupt
