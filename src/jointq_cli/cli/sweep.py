"""A sweep while it runs: every job is checked before the first begins, a row is printed for each that ends.

Knows Hydra's sweeper and where jobs write their records. The rows come from files, so it does not matter whether a job
ran in this process, in another one or on another machine. `compose` runs the jobs.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from jointq_cli.report.number_format import shortest_suffixes
from jointq_cli.report.pages.sweep import best_command, best_recipe, write_summary
from jointq_cli.report.run_files import load_jobs
from jointq_cli.report.tables.comparison import job_line
from jointq_cli.system.sweep_directory import DONE, ENDED, JobRecord, SweepDirectory, SweepPlan

VALIDATE = "validate_batch_is_legal"  # of Hydra's sweepers: composes every job once more
POLL_INTERVAL = 2.0  # seconds between two checks of what other processes have finished


class SweepRefused(BaseException):
    """A job breaks a rule, and none has begun. Not an Exception: for those that a callback raises, Hydra only warns."""

    def __init__(self, error: JointqError) -> None:
        super().__init__(str(error))
        self.error = error


class Sweep:
    """What the process that started a sweep does around its jobs.

    key: the `job_key` of a job by its config, Hydra's own part included; raises where the job cannot be run.
    format_error: the error with a message of one line. show: prints a line.
    """

    def __init__(
        self,
        command: Sequence[str],
        key: Callable[[DictConfig], str],
        format_error: Callable[[BaseException], JointqError],
        show: Callable[[str], None],
    ) -> None:
        self._command = list(command)
        self._key = key
        self._format_error = format_error
        self._show = show
        self._showing = threading.Lock()
        self._before: dict[int, JobRecord] = {}  # of the jobs that have no row yet
        self.directory: SweepDirectory | None = None

    @property
    def override(self) -> str:
        """Makes Hydra call `begin`."""
        return f"+hydra.callbacks.jointq._target_={SweepCallback.__module__}.{SweepCallback.__qualname__}"

    def begin(self, config: DictConfig) -> None:
        """Before the first job. config: what Hydra composed for the sweep as a whole. Raises SweepRefused."""
        try:
            directory = SweepDirectory(Path(config.hydra.sweep.dir).absolute())
            _pin(config, directory.path)
            jobs = job_overrides(config.hydra)
            keys = [self._key_of(config, number, overrides) for number, overrides in enumerate(jobs)]
            plan = SweepPlan(str(config.name), self._command, varying(jobs), keys)
            directory.begin(plan)
        except Exception as error:  # Hydra would print a warning, and go on
            raise SweepRefused(self._format_error(error)) from error
        self._before = {number: directory.record(number) for number in range(len(jobs))}
        self._width = max(map(len, map(_text, plan.settings)))
        self._show(f"{len(jobs)} jobs -> {short_path(directory.path)}")
        self.directory = directory

    def poll(self) -> None:
        """Shows a row for every job that has ended since the last call."""
        if self.directory is None:
            return
        with self._showing:
            self._show_rows([number for number, before in self._before.items() if self._has_ended(number, before)])

    def ended(self, number: int) -> None:
        """Shows the row of a job that this process has run, or found done."""
        if self.directory is None:
            return
        with self._showing:
            self._show_rows([number] if number in self._before else [])

    def close(self, *, stopped: bool) -> int:
        """After the last job: shows the missing rows, unless the sweep was `stopped`, and writes the complete summary.

        Returns 0 where all jobs are done, else 1.
        """
        if self.directory is None:
            return 1
        if not stopped:
            self._show_rows(list(self._before))
        document = write_summary(self.directory, page=True)
        place = short_path(self.directory.path)
        self._show(f"\n{document.headline}\nsummary   {place}/summary.html, .md, .csv, .json")
        if best_recipe(self.directory).is_file():
            self._show(f"the best  {best_command(place)}")
        return 0 if all(job.record.state == DONE for job in load_jobs(self.directory)) else 1

    def _show_rows(self, numbers: Sequence[int]) -> None:
        assert self.directory is not None
        for job in load_jobs(self.directory, numbers):
            del self._before[int(job.name)]
            self._show(job_line(job, _text(job.settings), self._width))
        if numbers:
            write_summary(self.directory, page=False)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, a thread shows the rows of jobs that other processes finish."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(POLL_INTERVAL):
                self.poll()

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
            known = self._format_error(error)
            raise type(known)(f"job {number} ({' '.join(overrides)}): {known}; no job has begun") from error


def _text(settings: Mapping[str, str]) -> str:
    names = shortest_suffixes(list(settings))
    return " ".join(f"{name}={value}" for name, value in zip(names, settings.values(), strict=True))


def _pin(config: DictConfig, directory: Path) -> None:
    """Fixes the sweep's directory, which Hydra would otherwise name anew by the settings of each job."""
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


class SweepCallback(Callback):
    """Hydra creates it by its name, without arguments, so it finds the sweep in a variable of this module."""

    def on_multirun_start(self, config: DictConfig, **unused: Any) -> None:
        _sweeps[-1].begin(config)


def short_path(path: Path) -> Path:
    """Relative to the working directory where the path lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def varying(jobs: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """Of each job's overrides KEY=VALUE those that not all jobs share; for a single job all."""
    pairs = [dict(override.lstrip("+").split("=", 1) for override in overrides) for overrides in jobs]
    keys = [key for key in pairs[0] if len(jobs) == 1 or len({job.get(key) for job in pairs}) > 1] if pairs else []
    return [{key: job[key] for key in keys if key in job} for job in pairs]


def job_overrides(hydra: Any) -> list[list[str]]:
    """The overrides of every job, in the order of their numbers. hydra: Hydra's own part of a config."""
    params = [f"{key}={value}" for key, value in (hydra.sweeper.get("params") or {}).items()]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    words = OmegaConf.to_container(hydra.overrides.task, resolve=False)  # ${hydra:job.num} is each job's own
    assert isinstance(words, list)
    overrides = parser.parse_overrides([*params, *words])
    [jobs] = BasicSweeper.split_arguments(overrides, None)
    return jobs
