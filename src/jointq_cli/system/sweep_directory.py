"""The directory that a sweep leaves behind: what its jobs are, how each of them ended, and which need not run again.

    sweep.json             the command and the settings of every job; written before the first of them begins
    0/ 1/ 2/ ...           run directories, each with a job.json: how the job ended, or who is at it
    summary.csv .json .md .html
    recipe/best.yaml       the best job as a recipe

Knows names, states and locks. Knows nothing of Hydra, of how a job is run, or of what it measured.
"""

import dataclasses
import glob
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jointq_cli.errors import Interrupted, JointqError
from jointq_cli.setting_rules import places
from jointq_cli.system.files import translated_disk_errors, write_text_atomically
from jointq_cli.system.locks import Kind, Lock, is_locked, try_lock
from jointq_cli.system.store import code_version

PLAN, JOB, LOCK = "sweep.json", "job.json", ".job.lock"
LOOK_EVERY = 0.5  # seconds between two looks at a lock
WAITING, RUNNING, DONE, FAILED, INTERRUPTED = "waiting", "running", "done", "failed", "interrupted"
ENDED = (DONE, FAILED, INTERRUPTED)


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep was asked for. settings: of each job what it does not share with all others, by key as typed. keys:
    what decides each job's result, as `job_key` has it."""

    name: str
    command: list[str]
    settings: list[dict[str, str]]
    keys: list[str]


@dataclass(frozen=True)
class JobRecord:
    """How far a job is. `key` says of what: a job whose key has changed since must run again."""

    state: str
    key: str = ""
    seconds: float = 0.0
    error: str | None = None
    left: list[str] = dataclasses.field(default_factory=list)  # files in its directory without which it is not done


class SweepDirectory:
    """Raises ResourceError where it cannot write, JointqError for a sweep.json that is none."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def exists(self) -> bool:
        return (self.path / PLAN).is_file()

    def write_plan(self, plan: SweepPlan) -> None:
        with translated_disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
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
        """What is known of a job as it is planned now. One that is said to run, and that nobody is at, was
        interrupted."""
        record = load_job(self.run(number))
        if record.state == RUNNING and not is_locked(self.run(number) / LOCK):
            record = load_job(self.run(number))  # it may have ended between the two looks
            if record.state == RUNNING:
                record = dataclasses.replace(record, state=INTERRUPTED)
        if record.state in ENDED and record.key and record.key != self.plan().keys[number]:
            return JobRecord(WAITING)  # of other settings, code or texts
        return record


def attempt(directory: Path, key: str, run: Callable[[], None], on_wait: Callable[[], None] = lambda: None) -> bool:
    """Runs a job in its directory, unless it was done before with the same key; False where it was.

    Two processes that come to the same job take turns: `waits` is called when it is another one's. What `run` raises
    is noted and passes.
    """
    with translated_disk_errors(directory):
        lock = _lock(directory / LOCK, on_wait)
    with lock:
        kept = load_job(directory)
        if kept.state == DONE and kept.key == key and all((directory / name).is_file() for name in kept.left):
            return False
        started = time.monotonic()
        _keep(directory, JobRecord(RUNNING, key))
        try:
            run()
        except BaseException as error:
            state = INTERRUPTED if isinstance(error, (Interrupted, KeyboardInterrupt)) else FAILED
            _keep(directory, JobRecord(state, key, time.monotonic() - started, _one_line(error)))
            raise
        left = sorted(path.name for path in directory.iterdir() if path.suffix in (".json", ".yaml"))
        seconds = time.monotonic() - started
        _keep(directory, JobRecord(DONE, key, seconds, left=[name for name in left if name != JOB]))
        return True


def record_failure(directory: Path, error: Exception) -> None:
    """Keeps why a job could not even begin; what `attempt` has noted stays."""
    if load_job(directory).state not in (FAILED, INTERRUPTED):
        with translated_disk_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
        _keep(directory, JobRecord(FAILED, error=_one_line(error)))


def load_job(directory: Path) -> JobRecord:
    """The job.json of a run directory; WAITING where there is none that can be read."""
    try:
        return JobRecord(**json.loads((directory / JOB).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return JobRecord(WAITING)


def job_key(recipe: Any, config: str) -> str:
    """sha256 of what decides a job's results: its config in full, the code, and the local files that it names."""
    identity = [config, code_version(), *(_state_of(path) for path in _local_files(recipe))]
    return hashlib.sha256("\0".join(identity).encode()).hexdigest()


def _local_files(recipe: Any) -> Iterator[Path]:
    """The files that a recipe names: one by one, by a directory, or by a glob pattern."""
    for _, value in places(recipe):
        place = os.path.expanduser(value)
        inside = os.path.join(glob.escape(place), "*")
        found = glob.glob(inside if os.path.isdir(place) else place, recursive=True)
        yield from (path for path in map(Path, sorted(found)) if path.is_file())


def _state_of(path: Path) -> str:
    """Tells a changed file without reading it."""
    found = path.stat()
    return f"{path}:{found.st_size}:{found.st_mtime_ns}"


def _keep(directory: Path, record: JobRecord) -> None:
    write_text_atomically(directory / JOB, json.dumps(asdict(record), indent=2, ensure_ascii=False) + "\n")


def _one_line(error: BaseException) -> str:
    told = " ".join(str(error).split())
    return told if isinstance(error, JointqError) else f"{type(error).__name__}: {told}"


def _lock(path: Path, on_wait: Callable[[], None]) -> Lock:
    if (lock := try_lock(path, Kind.EXCLUSIVE)) is not None:
        return lock
    on_wait()
    while (lock := try_lock(path, Kind.EXCLUSIVE)) is None:
        time.sleep(LOOK_EVERY)
    return lock
