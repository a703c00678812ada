"""The output directory of a sweep: its jobs, the state of each, and which need not run again.

    sweep.json             the command and the settings of every job; written before the first job starts
    0/ 1/ 2/ ...           run directories, each with a job.json: the state of the job
    summary.csv .json .md .html
    recipe/best.yaml       the best job as a recipe

Knows names, states and locks. Knows nothing of Hydra, of how a job runs, or of its results.
"""

import dataclasses
import glob
import hashlib
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jointq_cli.errors import ConfigError, Interrupted, JointqError
from jointq_cli.setting_rules import places
from jointq_cli.system.code_version import package_version
from jointq_cli.system.files import translated_disk_errors, write_text_atomically
from jointq_cli.system.locks import Kind, Lock, is_locked, try_lock

PLAN, JOB, LOCK, PLAN_LOCK = "sweep.json", "job.json", ".job.lock", ".sweep.lock"
POLL_SECONDS = 0.5  # between two attempts to get a lock
WAITING, RUNNING, DONE, FAILED, INTERRUPTED = "waiting", "running", "done", "failed", "interrupted"
ENDED = (DONE, FAILED, INTERRUPTED)


@dataclass(frozen=True)
class SweepPlan:
    """The jobs of a sweep. settings: for each job the overrides that differ between jobs, by key as typed. keys: each
    job's `job_key`."""

    name: str
    command: list[str]
    settings: list[dict[str, str]]
    keys: list[str]


@dataclass(frozen=True)
class JobRecord:
    """The state of a job. key: the `job_key` it ran with; a job whose key has changed since must run again."""

    state: str
    key: str = ""
    seconds: float = 0.0
    error: str | None = None
    left: list[str] = dataclasses.field(default_factory=list)  # files of a finished job; if one is missing, it reruns


class SweepDirectory:
    """Raises ResourceError where it cannot write, JointqError for a sweep.json that cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def exists(self) -> bool:
        return (self.path / PLAN).is_file()

    def begin(self, plan: SweepPlan) -> None:
        """Writes the plan. Raises ConfigError where the directory has another sweep, whose jobs it would replace: one
        by another command, unless the jobs of `plan` begin with its jobs."""
        with translated_disk_errors(self.path), _lock(self.path / PLAN_LOCK, lambda: None):
            if self.exists:
                last = self.plan()
                if last.command != plan.command and last.keys != plan.keys[: len(last.keys)]:
                    raise ConfigError(
                        f"hydra.sweep.dir={self.path}: has the sweep of `{shlex.join(last.command)}`; name another "
                        "directory, or remove this one"
                    )
            write_text_atomically(self.path / PLAN, json.dumps(asdict(plan), indent=2, ensure_ascii=False) + "\n")

    def plan(self) -> SweepPlan:
        try:
            return SweepPlan(**json.loads((self.path / PLAN).read_text(encoding="utf-8")))
        except OSError as error:
            raise JointqError(f"{self.path / PLAN}: cannot be read ({error.strerror})") from error
        except (ValueError, TypeError) as error:
            raise JointqError(f"{self.path / PLAN}: not the plan of a sweep ({error})") from error

    def run(self, number: int) -> Path:
        """The run directory of a job."""
        return self.path / str(number)

    def record(self, number: int) -> JobRecord:
        """The state of a job with the settings it has in the plan now. A job that is recorded as running, but that no
        process has locked, was interrupted."""
        record = load_job(self.run(number))
        if record.state == RUNNING and not is_locked(self.run(number) / LOCK):
            record = load_job(self.run(number))  # it may have ended before the lock was tested
            if record.state == RUNNING:
                record = dataclasses.replace(record, state=INTERRUPTED)
        if record.state in ENDED and record.key and record.key != self.plan().keys[number]:
            return JobRecord(WAITING)  # it ran with other settings, code or texts
        return record


def attempt(directory: Path, key: str, run: Callable[[], None], on_wait: Callable[[], None] = lambda: None) -> bool:
    """Runs a job in its directory and returns True; False if it was done before with the same key.

    Two processes with the same job take turns: `on_wait` is called before waiting for the other. An exception of `run`
    is recorded in job.json and raised again.
    """
    with translated_disk_errors(directory):
        lock = _lock(directory / LOCK, on_wait)
    with lock:
        last = load_job(directory)
        if last.state == DONE and last.key == key and all((directory / name).is_file() for name in last.left):
            return False
        started = time.monotonic()
        _save(directory, JobRecord(RUNNING, key))
        try:
            run()
        except BaseException as error:
            state = INTERRUPTED if isinstance(error, (Interrupted, KeyboardInterrupt)) else FAILED
            _save(directory, JobRecord(state, key, time.monotonic() - started, _one_line(error)))
            raise
        left = sorted(path.name for path in directory.iterdir() if path.suffix in (".json", ".yaml"))
        seconds = time.monotonic() - started
        _save(directory, JobRecord(DONE, key, seconds, left=[name for name in left if name != JOB]))
        return True


def record_failure(directory: Path, error: Exception) -> None:
    """Records why a job could not start; keeps a failure or an interrupt that `attempt` has recorded."""
    if load_job(directory).state not in (FAILED, INTERRUPTED):
        with translated_disk_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
        _save(directory, JobRecord(FAILED, error=_one_line(error)))


def load_job(directory: Path) -> JobRecord:
    """The job.json of a run directory; WAITING where it is missing or cannot be read."""
    try:
        return JobRecord(**json.loads((directory / JOB).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return JobRecord(WAITING)


def job_key(recipe: Any, config: str) -> str:
    """sha256 of everything that decides a job's results: its complete config, the code, and the local files."""
    identity = [config, package_version(), *(_state_of(path) for path in _local_files(recipe))]
    return hashlib.sha256("\0".join(identity).encode()).hexdigest()


def _local_files(recipe: Any) -> Iterator[Path]:
    """The files that a recipe names, each as a path, a directory or a glob pattern."""
    for _, place in places(recipe):
        path = os.path.expanduser(place)
        pattern = os.path.join(glob.escape(path), "*") if os.path.isdir(path) else path
        found = glob.glob(pattern, recursive=True)
        yield from (file for file in map(Path, sorted(found)) if file.is_file())


def _state_of(path: Path) -> str:
    """Changes when the file changes; computed without reading it."""
    status = path.stat()
    return f"{path}:{status.st_size}:{status.st_mtime_ns}"


def _save(directory: Path, record: JobRecord) -> None:
    write_text_atomically(directory / JOB, json.dumps(asdict(record), indent=2, ensure_ascii=False) + "\n")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, JointqError) else f"{type(error).__name__}: {text}"


def _lock(path: Path, on_wait: Callable[[], None]) -> Lock:
    if (lock := try_lock(path, Kind.EXCLUSIVE)) is not None:
        return lock
    on_wait()
    while (lock := try_lock(path, Kind.EXCLUSIVE)) is None:
        time.sleep(POLL_SECONDS)
    return lock
