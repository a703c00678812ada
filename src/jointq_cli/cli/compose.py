"""The one border with Hydra: compose a config, make it a typed recipe, run the task, tell errors in one line.

Above the border there are words on a command line and yaml files, below it only dataclasses. A command gives
a task, `launch` gives it the recipe and its run directory. What goes wrong in composing is told by
`mistakes`; with HYDRA_FULL_ERROR=1 in the environment errors keep their traceback.
"""

import dataclasses
import functools
import hashlib
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from jointq_cli.cli import config_files as resources
from jointq_cli.cli.config_errors import ConfigErrorFormatter, UsageError
from jointq_cli.cli.schemas import mutable_schema
from jointq_cli.cli.sweep import Refused, Sweep, current
from jointq_cli.errors import ConfigError, Interrupted, JointqError
from jointq_cli.system.distributed import SINGLE_PROCESS, Team
from jointq_cli.system.sweep_directory import attempt, job_key, record_failure

_SCHEMA_REFERENCE = re.compile(r"^\s*- /schema@_here_: (\w+)", re.MULTILINE)
_FULL_ERROR = "HYDRA_FULL_ERROR"


@dataclass(frozen=True)
class Job:
    """Where a task writes, how it was asked for, and who does it together."""

    directory: Path
    overrides: list[str]
    config: str  # yaml: the whole config, in the form of a recipe that gives this very config again
    team: Team = SINGLE_PROCESS
    number: int | None = None  # in a sweep
    elsewhere: bool = False  # in another process than the one that has the terminal

    @property
    def label(self) -> str:
        """Of a job among others."""
        return "" if self.number is None else f"job {self.number}"


Task = Callable[[Any, Job], None]


def launch(command: str, arguments: list[str], task: Task, *, divided: bool = True) -> int:
    """Composes the primary config of `command` and runs `task(recipe, job)`, in a sweep once per job.

    Returns 0, or 1 when a job of a sweep failed; the other jobs have run all the same. The same sweep again runs
    only what is not done. Raises JointqError for what a user can cause; any other exception is a bug and passes.
    divided: the processes that torchrun has started do it together; else the first does it, and the others nothing.
    """
    from jointq_cli.system.torchrun import (  # not above: it brings torch, and shell completion answers without
        is_rank0,
        process_group,
    )

    if not divided:
        return _launch(command, arguments, task, SINGLE_PROCESS) if is_rank0() else 0
    with process_group() as team, _in_place(team) as places:
        return _launch(command, [*arguments, *places], task, team)


def _launch(command: str, arguments: list[str], task: Task, team: Team) -> int:
    # Not above: it brings torch, and shell completion answers without.
    from jointq_cli.recipe import RECIPES, Recipe, keys, schemas

    overrides, options = _overrides_and_options(command, arguments)
    types: dict[str, Any] = {schema.__name__: schema for schema in schemas()}
    for name, schema in types.items():
        ConfigStore.instance().store(group="schema", name=name, node=mutable_schema(schema))
    recipe = RECIPES[command]
    groups = ["recipe"] if issubclass(recipe, Recipe) else []
    mistakes = ConfigErrorFormatter([*keys(recipe), *groups], types, overrides)
    runner = JobRunner(command, options, task, types, mistakes, team)
    if {"-m", "--multirun"} & set(options):
        if team.size > 1:
            raise UsageError("-m: several processes do one run together; the jobs of a sweep take hydra/launcher=...")
        return _sweep(runner, command, overrides, options)
    with command_line([*overrides, *options]), _raised_by_hydra():
        runner.run()
    return 0


def _sweep(runner: "JobRunner", command: str, overrides: list[str], options: list[str]) -> int:
    """Runs the jobs by whatever launcher Hydra is told to use, and sums up what they left on disk."""
    words = ["jointq", command, *overrides, *options]
    sweep = Sweep(words, runner.key, runner.mistakes.format, functools.partial(print, flush=True))
    runner.sweep = sweep
    OmegaConf.register_new_resolver("command_hash", lambda: _command_hash(words[1:]), replace=True)
    with command_line([*overrides, sweep.override, *options]), _raised_by_hydra(), current(sweep):
        try:
            with sweep.watched():
                runner.run()
        except Refused as refusal:
            raise refusal.error from None
        except (_SweepStopped, KeyboardInterrupt, Interrupted) as stop:
            sweep.close(stopped=True)
            raise Interrupted("interrupted; what is done is kept, and the same command does the rest") from stop
    return sweep.close(stopped=False)


def _command_hash(words: list[str]) -> str:
    """What configs call a sweep's directory by: what was typed, not the time, so that the same command finds it."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:8]


def complete(command: str, arguments: list[str]) -> list[str]:
    """What Hydra answers to a shell's question. COMP_LINE, if there, must not hold the command's name.

    Schemas stay empty: the yaml files have every key, and a shell should not have to wait for torch.
    """
    for path in resources.config_dir().rglob("*.yaml"):
        for name in _SCHEMA_REFERENCE.findall(path.read_text(encoding="utf-8")):
            ConfigStore.instance().store(group="schema", name=name, node={})
    answer = io.StringIO()
    with command_line(arguments), redirect_stdout(answer):
        _hydra_main(command, lambda config: None)()
    return answer.getvalue().splitlines()


class JobRunner:
    """Takes one composed config after the other across. Launchers send copies of it to other processes."""

    def __init__(
        self,
        command: str,
        options: list[str],
        task: Task,
        types: dict[str, type[Any]],
        mistakes: ConfigErrorFormatter,
        team: Team,
    ) -> None:
        self._command = command
        self._options = [word for word in options if word not in ("-m", "--multirun")]
        self._task = task
        self._types = types
        self.mistakes = mistakes
        self._team = team
        self._started = False
        self._failure: JointqError | None = None
        self._outputs: set[str] = set()  # files that jobs were asked to write
        self.sweep: Sweep | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sweep": None}

    def run(self) -> None:
        try:
            _hydra_main(self._command, self._job)()
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError) as error:
            if self._started:
                raise
            raise self.mistakes.format(error) from error
        if self._failure is not None:
            raise self._failure

    def key(self, config: DictConfig) -> str:
        """Of a job that would be run with this config, Hydra's own part included, after those asked for before.

        Raises where none can be.
        """
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
        return job_key(recipe, _as_recipe(config, self._command, choices))

    def _job(self, config: DictConfig) -> None:
        self._started = True
        context = HydraConfig.get()
        if context.mode == RunMode.MULTIRUN:
            self._job_of_sweep(config, context)
            return
        try:
            self._run(*self._crossed(config, context))
        except JointqError as error:
            self._failure = error  # not raised here: Hydra would print more lines

    def _job_of_sweep(self, config: DictConfig, context: Any) -> None:
        """A failure is kept in the job's directory, and the sweep goes on: Hydra need not hear of it."""
        directory = Path(context.runtime.output_dir)
        try:
            recipe, job = self._crossed(config, context)
            attempt(directory, job_key(recipe, job.config), lambda: self._run(recipe, job), self._wait_told(job))
        except Interrupted as error:
            raise _SweepStopped from error
        except JointqError as error:
            record_failure(directory, error)
        except Exception as error:
            traceback.print_exc()
            record_failure(directory, error)
        if self.sweep is not None:
            self.sweep.ended(context.job.num)

    def _wait_told(self, job: Job) -> Callable[[], None]:
        told = f"{job.label}: another process is at it; waiting for it to end"
        return functools.partial(print, told, file=sys.stderr, flush=True)

    def _crossed(self, config: DictConfig, context: Any) -> tuple[Any, Job]:
        """The recipe, and the job it is for."""
        directory = Path(context.runtime.output_dir)
        try:
            recipe = self._typed(OmegaConf.to_object(config), "")
        except (OmegaConfBaseException, ConfigError) as error:
            _remove_empty(directory, Path(config.output_dir).absolute())
            raise self.mistakes.format(error) from error
        overrides = list(context.overrides.task)
        text = _as_recipe(config, self._command, context.runtime.choices)
        if context.mode != RunMode.MULTIRUN:
            return recipe, Job(directory, overrides, text, self._team)
        return recipe, Job(directory, overrides, text, SINGLE_PROCESS, context.job.num, elsewhere=self.sweep is None)

    def _run(self, recipe: Any, job: Job) -> None:
        with command_line([self._command, *job.overrides, *self._options]):
            self._task(recipe, job)

    def _typed(self, value: Any, path: str) -> Any:
        """The frozen dataclass for what Hydra filled in; `path` is its key."""
        if not dataclasses.is_dataclass(value):
            return value
        schema = self._types[type(value).__name__]
        names = [field.name for field in dataclasses.fields(schema)]
        for extra in vars(value).keys() - set(names):  # came with a leading +
            raise ConfigError(self.mistakes.unknown_key(path + extra, path, schema.__name__))
        return schema(**{name: self._typed(getattr(value, name), f"{path}{name}.") for name in names})


def _as_recipe(config: DictConfig, command: str, choices: Mapping[str, str]) -> str:
    """A recipe file of all values, with the group options whose types they have."""
    values = OmegaConf.to_yaml(config, resolve=True)
    if "recipe" not in choices:
        return f"# What jointq {command} did, in full.\n\n{values}"
    head = [
        "# @package _global_",
        f"# What jointq {command} did, in full. As FOLDER/recipe/{config.name}.yaml it does the same again:",
        f"#   jointq {command} --config-dir FOLDER recipe={config.name}",
        "",
        "defaults:",
        *(
            f"  - override /{group}: {_bundled(group, choices[group], config)}"
            for group in map(str, config)
            if group in choices
        ),
        "",
    ]
    return "\n".join([*head, values])


def _bundled(group: str, option: str, config: DictConfig) -> str:
    """An option that is there for everybody: all values follow, so one of the same type will do.

    Values of a dictionary are added to those of the option, so it may have none beyond them.
    """
    schema = OmegaConf.get_type(config, group)
    texts = {name: path.read_text(encoding="utf-8") for name, path in resources.options(group).items()}
    reference = f"/schema@_here_: {schema.__name__}\n" if schema else None
    alike = [name for name, text in texts.items() if name == option or (reference and reference in text)]
    fitting = [name for name in alike if _has_no_more(yaml.safe_load(texts[name]), config[group])]
    return option if option in fitting or not fitting else fitting[0]


def _has_no_more(option: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether every key of the option has a value, in the dictionaries that it holds too."""
    return all(
        key in values and (not isinstance(value, dict) or _has_no_more(value, values[key]))
        for key, value in option.items()
        if key != "defaults"
    )


class _SweepStopped(BaseException):
    """Ctrl-C in a sweep: not an Exception, since Hydra would go on with the next job."""


def _hydra_main(command: str, function: Callable[[DictConfig], None]) -> Callable[[], None]:
    directory = str(resources.config_dir())
    decorate = hydra.main(version_base="1.3", config_path=directory, config_name=command)
    main: Callable[[], None] = decorate(function)
    return main


def _overrides_and_options(command: str, arguments: list[str]) -> tuple[list[str], list[str]]:
    """Apart, since argparse refuses overrides on both sides of an option. Raises UsageError."""
    parser = get_args_parser()
    parser.prog, parser.usage = f"jointq {command}", "%(prog)s [KEY=VALUE ...] [OPTION ...], see --help"
    known, rest = parser.parse_known_args(arguments)
    for word in rest:
        if word.startswith("-"):
            raise UsageError(f"jointq {command} has no option {word}; settings are KEY=VALUE, see --help")
    overrides = [*known.overrides, *rest]
    return overrides, [word for word in arguments if word not in overrides]


@contextmanager
def _in_place(team: Team) -> Iterator[list[str]]:
    """Inside, the leader of a team has the screen and the run directory, and the others nothing that is seen.

    Yields what that takes on the command line.
    """
    if team.rank == 0:
        yield []
        return
    with TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield [f"hydra.run.dir={folder}"]


@contextmanager
def command_line(arguments: list[str]) -> Iterator[None]:
    """Hydra reads sys.argv: without the command's name, and whatever started this process under ours."""
    before = sys.argv
    sys.argv = ["jointq", *arguments]
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def _raised_by_hydra() -> Iterator[None]:
    """Hydra prints errors in several lines and exits; under this variable it raises them."""
    before = os.environ.get(_FULL_ERROR)
    os.environ[_FULL_ERROR] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FULL_ERROR]
        else:
            os.environ[_FULL_ERROR] = before


def _remove_empty(directory: Path, above: Path) -> None:
    """Takes back what Hydra made below `above` before the recipe was refused; never what has content."""
    with suppress(OSError):
        for folder in (directory, *directory.parents):
            if not folder.is_relative_to(above) or folder == above:
                return
            folder.rmdir()
