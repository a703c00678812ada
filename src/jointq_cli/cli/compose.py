"""From a command line to a typed recipe and the task that runs it, once or as a sweep.

Hydra composes yaml files and overrides; beyond this module there are only dataclasses. What goes wrong in composing is
reported in one line by `config_errors`; with HYDRA_FULL_ERROR=1 in the environment errors keep their traceback.
"""

import dataclasses
import functools
import hashlib
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from jointq_cli.cli.config_errors import ConfigErrorFormatter, UsageError
from jointq_cli.cli.early_check import check_early
from jointq_cli.cli.hydra_main import (
    SWEEP_MODE,
    command_line,
    errors_raised,
    from_file,
    hydra_main,
    overrides_and_options,
    readable,
    with_entries,
)
from jointq_cli.cli.recipe_file import as_recipe
from jointq_cli.cli.renamed_keys import KeyRenamer, renamed_by
from jointq_cli.cli.schemas import mutable_schema
from jointq_cli.cli.sweep import Sweep, SweepRefused, current, job_overrides
from jointq_cli.errors import ConfigError, Interrupted, JointqError
from jointq_cli.system.distributed import SINGLE_PROCESS, Team
from jointq_cli.system.files import encoded
from jointq_cli.system.sweep_directory import attempt, job_key, record_failure


@dataclass(frozen=True)
class Job:
    """The run that a task is to do: where it writes, how it was requested, and by which processes."""

    directory: Path
    overrides: list[str]
    config: str  # yaml: the complete config, as a recipe that composes it again
    team: Team = SINGLE_PROCESS
    number: int | None = None  # in a sweep
    new: bool = False  # the directory is named after the time, so that a run never shares it with another
    elsewhere: bool = False  # in another process than the one that has the terminal

    @property
    def label(self) -> str:
        """For messages of one job among others; "" outside a sweep."""
        return "" if self.number is None else f"job {self.number}"


Task = Callable[[Any, Job], None]


def launch(command: str, arguments: list[str], task: Task, *, divided: bool = True) -> int:
    """Composes the primary config of `command` and runs `task(recipe, job)`, in a sweep once per job.

    Returns 0, or 1 when a job of a sweep failed; the other jobs have run all the same. The same sweep again runs
    only what is not done. Raises JointqError for what a user can cause; any other exception is a bug and passes.
    divided: the processes that torchrun has started share the work; else rank 0 does it, and the others nothing.
    """
    if "torch" not in sys.modules and "RANK" not in os.environ:  # several processes agree first on who says it
        words, options = overrides_and_options(command, arguments)
        check_early(command, list(map(readable, words)), options)
    # Not above: it brings torch, and what cannot be read is refused without.
    from jointq_cli.system.torchrun import is_rank0, process_group

    if not divided:
        return _launch(command, arguments, task, SINGLE_PROCESS) if is_rank0() else 0
    with process_group() as team, _silenced_unless_rank0(team) as more:
        return _launch(command, [*arguments, *more], task, team)


def _launch(command: str, arguments: list[str], task: Task, team: Team) -> int:
    # Not above: it brings torch, and shell completion answers without.
    from jointq_cli.recipe import RECIPES, Recipe, keys, schemas, setting_roles

    renamer = KeyRenamer(silent=team.rank > 0)
    words, options = overrides_and_options(command, arguments)
    types: dict[str, Any] = {schema.__name__: schema for schema in schemas()}
    dictionaries = setting_roles(RECIPES[command]).dictionaries
    named = [from_file(renamer.override(word), dictionaries) for word in words]
    overrides = [with_entries(readable(word), dictionaries) for word in named]
    for name, schema in types.items():
        ConfigStore.instance().store(group="schema", name=name, node=mutable_schema(schema))
    recipe = RECIPES[command]
    groups = ["recipe", "quality"] if issubclass(recipe, Recipe) else []
    formatter = ConfigErrorFormatter([*keys(recipe), *groups], types, overrides)
    runner = JobRunner(command, options, task, types, formatter, team)
    with renamed_by(renamer), errors_raised():
        if {"-m", "--multirun", SWEEP_MODE} & {*options, *overrides}:
            if team.size > 1:
                raise UsageError(
                    "-m: several processes do one run together; the jobs of a sweep take hydra/launcher=..."
                )
            return _sweep(runner, command, overrides, options)
        try:
            with command_line([*overrides, *options]):
                runner.run()
        except KeyboardInterrupt:  # before the run can stop in order, or a second Ctrl-C
            raise Interrupted from None
    return 0


def _sweep(runner: "JobRunner", command: str, overrides: list[str], options: list[str]) -> int:
    """Runs the jobs by the launcher that Hydra is configured with, and sums up what they have written."""
    words = ["jointq", command, *overrides, *options]
    sweep = Sweep(words, runner.key, runner.formatter.format, functools.partial(print, flush=True))
    runner.sweep = sweep
    OmegaConf.register_new_resolver("command_hash", lambda: _command_hash(words[1:]), replace=True)
    with command_line([*overrides, sweep.override, *options]), current(sweep):
        try:
            with sweep.watched():
                runner.run()
        except SweepRefused as refusal:
            raise refusal.error from None
        except (_SweepStopped, KeyboardInterrupt, Interrupted) as stop:
            sweep.close(stopped=True)
            raise Interrupted from stop
    return sweep.close(stopped=False)


def _command_hash(words: list[str]) -> str:
    """Names a sweep's directory by its command, not by the time, so that the same command finds it again."""
    return hashlib.sha256(encoded("\0".join(words))).hexdigest()[:8]


class JobRunner:
    """Turns each composed config into a recipe and runs the task with it. Launchers send copies to other processes."""

    def __init__(
        self,
        command: str,
        options: list[str],
        task: Task,
        types: dict[str, type[Any]],
        formatter: ConfigErrorFormatter,
        team: Team,
    ) -> None:
        self._command = command
        self._options = [word for word in options if word not in ("-m", "--multirun")]
        self._task = task
        self._types = types
        self.formatter = formatter
        self._team = team
        self._started = False
        self._failure: JointqError | None = None
        self._outputs: set[str] = set()  # files that jobs are to write
        self.sweep: Sweep | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sweep": None}

    def run(self) -> None:
        """The job, or all jobs of the sweep, that the arguments in sys.argv ask for."""
        try:
            hydra_main(self._command, self._job)
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError) as error:
            if self._started:
                raise
            raise self.formatter.format(error) from error
        if self._failure is not None:
            raise self._failure

    def key(self, config: DictConfig) -> str:
        """The `job_key` of a sweep's job. config: with Hydra's own part. Raises where this job or the jobs before it
        cannot be run."""
        choices = config.hydra.runtime.choices
        with open_dict(config):
            del config["hydra"]
        recipe = self._typed(OmegaConf.to_object(config), "")
        if isinstance(output := getattr(recipe, "output", None), str):
            if output in self._outputs:
                raise ConfigError(
                    f"output: {output}: another job writes it too; output='NAME_${{hydra:job.num}}.safetensors' "
                    f"gives each its own"
                )
            self._outputs.add(output)
        return job_key(recipe, as_recipe(config, self._command, choices))

    def _job(self, config: DictConfig) -> None:
        self._started = True
        context = HydraConfig.get()
        if context.mode == RunMode.MULTIRUN:
            self._job_of_sweep(config, context)
            return
        try:
            self._run(*self._recipe_and_job(config, context))
        except JointqError as error:
            self._failure = error  # not raised here: Hydra would print more lines

    def _job_of_sweep(self, config: DictConfig, context: Any) -> None:
        """A failure is recorded in the job's directory and kept from Hydra, so that the sweep goes on."""
        directory = Path(context.runtime.output_dir)
        try:
            recipe, job = self._recipe_and_job(config, context)
            waiting = f"{job.label}: another process runs it; waiting for it to end"
            on_wait = functools.partial(print, waiting, file=sys.stderr, flush=True)
            attempt(directory, job_key(recipe, job.config), lambda: self._run(recipe, job), on_wait)
        except Interrupted as error:
            raise _SweepStopped from error
        except JointqError as error:
            record_failure(directory, error)
        except Exception as error:
            traceback.print_exc()
            record_failure(directory, error)
        if self.sweep is not None:
            self.sweep.ended(context.job.num)

    def _recipe_and_job(self, config: DictConfig, context: Any) -> tuple[Any, Job]:
        directory = Path(context.runtime.output_dir)
        try:
            if context.mode != RunMode.MULTIRUN:
                self._refuse_sweep(context)
            recipe = self._typed(OmegaConf.to_object(config), "")
        except (OmegaConfBaseException, ConfigError) as error:
            _remove_empty(directory, Path(config.output_dir).absolute())
            raise self.formatter.format(error) from error
        overrides = list(context.overrides.task)
        text = as_recipe(config, self._command, context.runtime.choices)
        if context.mode != RunMode.MULTIRUN:
            # Of two runs that start in the same second, Hydra gives both the same directory.
            new = "${now:" in str(OmegaConf.to_container(context.run, resolve=False))
            return recipe, Job(directory, overrides, text, self._team, new=new)
        return recipe, Job(directory, overrides, text, SINGLE_PROCESS, context.job.num, elsewhere=self.sweep is None)

    def _refuse_sweep(self, context: Any) -> None:
        """Raises UsageError where a config sweeps, though one run is requested, over keys that no override sets."""
        words = map(str, OmegaConf.to_container(context.overrides.task, resolve=False) or ())
        chosen = {word.lstrip("+").partition("=")[0] for word in words}
        swept = [key for key in context.sweeper.get("params") or () if key not in chosen]
        if swept:
            first = shlex.join(["jointq", self._command, *job_overrides(context)[0]])
            every = shlex.join(["jointq", self._command, "-m", *sys.argv[1:]])
            way = f"for its first job: {first}" if self._command == "plan" else f"needs -m: {every}"
            raise UsageError(f"a sweep over {', '.join(swept)}: {way}")

    def _run(self, recipe: Any, job: Job) -> None:
        with command_line([self._command, *job.overrides, *self._options]):
            self._task(recipe, job)

    def _typed(self, value: Any, path: str) -> Any:
        """The frozen dataclass with the values of a mutable one; `path` is its key, with a dot at the end."""
        if not dataclasses.is_dataclass(value):
            return value
        schema = self._types[type(value).__name__]
        names = [field.name for field in dataclasses.fields(schema)]
        for extra in vars(value).keys() - set(names):  # added by a leading +
            raise ConfigError(self.formatter.unknown_key(path + extra, path, schema.__name__))
        return schema(**{name: self._typed(getattr(value, name), f"{path}{name}.") for name in names})


class _SweepStopped(BaseException):
    """A signal in a sweep: not an Exception, since Hydra would go on with the next job."""


@contextmanager
def _silenced_unless_rank0(team: Team) -> Iterator[list[str]]:
    """Inside, other processes than rank 0 print nothing, and their run directory is a temporary one.

    Yields what that takes on the command line.
    """
    if team.rank == 0:
        yield []
        return
    with TemporaryDirectory() as folder, open(os.devnull, "w", errors="replace") as nowhere, redirect_stdout(nowhere):
        yield [f"hydra.run.dir={folder}"]


def _remove_empty(directory: Path, above: Path) -> None:
    """Removes the folders below `above` that Hydra made before the recipe was refused, if they are empty."""
    with suppress(OSError):
        for folder in (directory, *directory.parents):
            if not folder.is_relative_to(above) or folder == above:
                return
            folder.rmdir()
