"""A sweep while it runs: every job is checked before the first begins, a row is shown for each that ends.

Knows Hydra's sweeper and where jobs leave their records. The rows come from what lies on disk, so it does not matter
whether a job ran in this process, in another one or on another machine. `launch` runs the jobs.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from jointq_cli.errors import ConfigError, JointqError
from jointq_cli.report.compare.sweep import load_jobs
from jointq_cli.report.pages.sweep import best_command, best_recipe, write_summary
from jointq_cli.report.tables.sweep import SweepRows, sweep_document
from jointq_cli.system.sweep_directory import DONE, ENDED, JobRecord, SweepDirectory, SweepPlan

VALIDATE = "validate_batch_is_legal"  # of Hydra's sweepers: composes every job once more
LOOK_EVERY = 2.0  # seconds between two looks at what other processes have finished


class Refused(BaseException):
    """A job breaks a rule, and none has begun. Not an Exception: of those that a callback raises, Hydra only warns."""

    def __init__(self, error: JointqError) -> None:
        super().__init__(str(error))
        self.error = error


class Sweep:
    """What the process that started a sweep does around its jobs.

    key: of what a job is, from its config with Hydra's own part; raises where no job can be run with it. told: the
    error in one line. tell: shows a line.
    """

    def __init__(
        self,
        command: Sequence[str],
        key: Callable[[DictConfig], str],
        told: Callable[[BaseException], JointqError],
        tell: Callable[[str], None],
    ) -> None:
        self._command = list(command)
        self._key = key
        self._told = told
        self._tell = tell
        self._looking = threading.Lock()
        self._before: dict[int, JobRecord] = {}  # of the jobs that have no row yet
        self.directory: SweepDirectory | None = None

    @property
    def override(self) -> str:
        """Makes Hydra call `begin`."""
        return f"+hydra.callbacks.jointq._target_={Announcer.__module__}.{Announcer.__qualname__}"

    def begin(self, config: DictConfig) -> None:
        """Before the first job. config: what Hydra composed for the sweep as a whole. Raises Refused."""
        try:
            directory = SweepDirectory(Path(config.hydra.sweep.dir).absolute())
            _pin(config, directory.path)
            jobs = _jobs(config)
            keys = [self._key_of(config, number, overrides) for number, overrides in enumerate(jobs)]
            plan = SweepPlan(str(config.name), self._command, varying(jobs), keys)
            directory.write_plan(plan)
        except Exception as error:  # Hydra would print a warning, and go on
            raise Refused(self._told(error)) from error
        self._before = {number: directory.record(number) for number in range(len(jobs))}
        self._rows = SweepRows(plan.settings)
        self._tell(f"{len(jobs)} jobs -> {shown(directory.path)}")
        self._tell(self._rows.heading)
        self.directory = directory

    def look(self) -> None:
        """A row for every job that has ended since the last look."""
        if self.directory is None:
            return
        with self._looking:
            self._tell_of([number for number, before in self._before.items() if self._has_ended(number, before)])

    def ended(self, number: int) -> None:
        """A job that this process has run, or found done."""
        if self.directory is None:
            return
        with self._looking:
            self._tell_of([number] if number in self._before else [])

    def close(self, *, stopped: bool) -> int:
        """After the last job: the rows that are missing, unless the sweep was `stopped`, and the summary in full.

        Returns 0 where all jobs are done, else 1.
        """
        if self.directory is None:
            return 1
        if not stopped:
            self._tell_of(list(self._before))
        write_summary(self.directory, page=True)
        jobs = load_jobs(self.directory)
        document = sweep_document(self.directory.plan().name, jobs)
        self._tell(f"\n{document.headline}\nsummary   {shown(self.directory.path)}/summary.html, .md, .csv, .json")
        if best_recipe(self.directory).is_file():
            self._tell(f"the best  {best_command(shown(self.directory.path))}")
        return 0 if all(job.record.state == DONE for job in jobs) else 1

    def _tell_of(self, numbers: Sequence[int]) -> None:
        assert self.directory is not None
        for job in load_jobs(self.directory, numbers):
            del self._before[job.number]
            self._tell(self._rows.row(job))
        if numbers:
            write_summary(self.directory, page=False)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, what other processes finish is seen."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(LOOK_EVERY):
                self.look()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    def _has_ended(self, number: int, before: JobRecord) -> bool:
        assert self.directory is not None
        record = self.directory.record(number)
        return record.state in ENDED and record != before

    def _key_of(self, config: DictConfig, number: int, overrides: Sequence[str]) -> str:
        try:
            composed = GlobalHydra.instance().config_loader().load_sweep_config(config, list(overrides))
            with open_dict(composed):
                composed.hydra.job.num = number
                composed.hydra.runtime.output_dir = str(Path(composed.hydra.sweep.dir, str(number)))
            HydraConfig.instance().set_config(composed)
            return self._key(composed)
        except Exception as error:
            told = self._told(error)
            raise type(told)(f"job {number} ({' '.join(overrides)}): {told}; no job has begun") from error


def _pin(config: DictConfig, directory: Path) -> None:
    """All jobs go into one directory, also where they differ in what it would be called by."""
    if any(word.lstrip("+").startswith("hydra.sweep.subdir=") for word in config.hydra.overrides.hydra):
        raise ConfigError("hydra.sweep.subdir: cannot be given, since a sweep knows its jobs by their numbers")
    quoted = str(directory).replace("'", "\\'")
    with read_write(config), open_dict(config):
        config.hydra.sweep.dir = str(directory)
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{quoted}'")


_sweeps: list[Sweep] = []


@contextmanager
def current(sweep: Sweep) -> Iterator[None]:
    """Inside, Hydra's callbacks reach this sweep, and Hydra leaves it to the sweep to check its jobs."""
    validate = getattr(Sweeper, VALIDATE)
    setattr(Sweeper, VALIDATE, lambda sweeper, batch: None)
    _sweeps.append(sweep)
    try:
        yield
    finally:
        _sweeps.pop()
        setattr(Sweeper, VALIDATE, validate)


class Announcer(Callback):
    """Hydra makes one by its name, and so it finds the sweep in a variable of this module."""

    def on_multirun_start(self, config: DictConfig, **unused: Any) -> None:
        _sweeps[-1].begin(config)


def shown(path: Path) -> Path:
    """The shorter way to write a path under the working directory."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def varying(jobs: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """Of each job's overrides, KEY=VALUE, those that not all jobs share; of a single job all."""
    pairs = [dict(override.lstrip("+").split("=", 1) for override in overrides) for overrides in jobs]
    keys = [key for key in pairs[0] if len(jobs) == 1 or len({job.get(key) for job in pairs}) > 1] if pairs else []
    return [{key: job[key] for key in keys if key in job} for job in pairs]


def _jobs(config: DictConfig) -> list[list[str]]:
    """The overrides of every job, in the order of their numbers."""
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    words = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)  # ${hydra:job.num} is each job's own
    assert isinstance(words, list)
    overrides = parser.parse_overrides([*params, *words])
    [jobs] = BasicSweeper.split_arguments(overrides, None)
    return jobs
