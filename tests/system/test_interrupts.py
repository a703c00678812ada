"""Signals: the first is deferred, the second is not, and SIGHUP that is ignored stays so."""

import os
import signal
import threading

import pytest

from jointq_cli.errors import Interrupted
from jointq_cli.system import interrupts
from jointq_cli.system.interrupts import deferred, handled_by, raise_at_once

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_waits_for_a_safe_point_and_the_second_does_not(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(number)
    with deferred() as stop:
        stop.raise_if_requested()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # forwarded
        with pytest.raises(Interrupted, match="the same command continues"):
            stop.raise_if_requested()
        monkeypatch.setattr(interrupts, "_FORWARDED_WITHIN", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with handled_by(raise_at_once):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_nothing_is_handled() -> None:
    def within() -> None:
        with deferred():
            handlers.append(signal.getsignal(signal.SIGTERM))

    handlers = [signal.getsignal(signal.SIGTERM)]
    thread = threading.Thread(target=within)
    thread.start()
    thread.join()
    assert handlers[0] is handlers[1]
