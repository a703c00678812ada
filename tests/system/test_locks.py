"""Locks: many readers or one writer, and no stale lock after a killed process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jointq_cli.system import locks
from jointq_cli.system.locks import Kind, is_locked, try_lock

HOLD = """
import sys, time
from pathlib import Path
from jointq_cli.system.locks import Kind, try_lock
lock = try_lock(Path(sys.argv[1]), Kind[sys.argv[2]])
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("first", Kind)
@pytest.mark.parametrize("second", Kind)
def test_only_shared_locks_coexist(first: Kind, second: Kind, tmp_path: Path) -> None:
    holder = try_lock(tmp_path / "lock", first)
    assert holder is not None
    other = try_lock(tmp_path / "lock", second)
    assert (other is not None) == (first is second is Kind.SHARED)
    assert is_locked(tmp_path / "lock")
    for lock in filter(None, (holder, other)):
        lock.release()
    assert not is_locked(tmp_path / "lock")


@pytest.mark.parametrize("kind", Kind)
def test_a_killed_process_leaves_no_lock(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, path, kind.name], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert try_lock(path, Kind.EXCLUSIVE) is None
        process.send_signal(signal.SIGKILL)
    lock = try_lock(path, Kind.EXCLUSIVE)
    assert lock is not None
    lock.release()


def test_a_lock_file_that_is_deleted_gives_out_no_second_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a waiter's open and its flock the holder deletes the file, and another process locks a new one."""
    path = tmp_path / "lock"
    holder = try_lock(path, Kind.EXCLUSIVE)
    assert holder is not None
    quicker = []
    original = os.open

    def slow_open(*arguments: object) -> int:
        descriptor = original(*arguments)  # type: ignore[arg-type]
        monkeypatch.setattr(os, "open", original)
        holder.discard_file()
        holder.release()
        quicker.append(try_lock(path, Kind.EXCLUSIVE))
        return descriptor

    monkeypatch.setattr(os, "open", slow_open)
    assert try_lock(path, Kind.EXCLUSIVE) is None
    [winner] = quicker
    assert winner is not None
    winner.release()


def test_testing_a_lock_creates_nothing(tmp_path: Path) -> None:
    assert not is_locked(tmp_path / "lock")
    assert not list(tmp_path.iterdir())


def test_on_a_read_only_disk_a_shared_lock_needs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks.os, "access", lambda path, mode: False)
    lock = try_lock(tmp_path / "locks" / "a", Kind.SHARED)
    assert lock is not None
    lock.release()
    assert list(tmp_path.iterdir()) == []
