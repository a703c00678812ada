"""The one border with Hydra: compose a config, make it a typed recipe, run the task, tell errors in one line.

Above the border there are words on a command line and yaml files, below it only dataclasses. A command gives
a task, `launch` gives it the recipe and its run directory. What goes wrong in composing is told by
`mistakes`; with HYDRA_FULL_ERROR=1 in the environment errors keep their traceback.
"""

import dataclasses
import functools
import io
import os
import re
import sys
import traceback
import typing
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
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from jointq_cli import resources
from jointq_cli.errors import ConfigError, Interrupted, JointqError
from jointq_cli.mistakes import Mistakes, UsageError
from jointq_cli.team import Team

_SCHEMA_REFERENCE = re.compile(r"^\s*- /schema@_here_: (\w+)", re.MULTILINE)
_FULL_ERROR = "HYDRA_FULL_ERROR"


@dataclass(frozen=True)
class Job:
    """Where a task writes, how it was asked for, and who does it together."""

    directory: Path
    overrides: list[str]
    config: str  # yaml: the whole config, in the form of a recipe that gives this very config again
    team: Team


Task = Callable[[Any, Job], None]


def launch(command: str, arguments: list[str], task: Task) -> int:
    """Composes the primary config of `command` and runs `task(recipe, job)`, in a sweep once per job.

    Returns 0, or 1 when a job of a sweep failed; the other jobs have run all the same, but not where several processes
    do them together. Raises JointqError for what a user can cause; any other exception is a bug and passes as it is.
    """
    from jointq_cli.processes import joined  # not above: it brings torch, and shell completion answers without

    with joined() as team, _in_place(team) as places:
        return _launch(command, [*arguments, *places], task, team)


def _launch(command: str, arguments: list[str], task: Task, team: Team) -> int:
    # Not above: it brings torch, and shell completion answers without.
    from jointq_cli.config import RECIPES, Recipe, keys, schemas

    overrides, options = _overrides_and_options(command, arguments)
    types: dict[str, Any] = {schema.__name__: schema for schema in schemas()}
    for name, schema in types.items():
        ConfigStore.instance().store(group="schema", name=name, node=_thawed(schema))
    recipe = RECIPES[command]
    groups = ["recipe"] if issubclass(recipe, Recipe) else []
    mistakes = Mistakes([*keys(recipe), *groups], types, overrides)
    border = _Border(command, options, task, types, mistakes, team)
    with _command_line([*overrides, *options]), _raised_by_hydra():
        return border.cross()


def complete(command: str, arguments: list[str]) -> list[str]:
    """What Hydra answers to a shell's question. COMP_LINE, if there, must not hold the command's name.

    Schemas stay empty: the yaml files have every key, and a shell should not have to wait for torch.
    """
    for path in resources.config_dir().rglob("*.yaml"):
        for name in _SCHEMA_REFERENCE.findall(path.read_text(encoding="utf-8")):
            ConfigStore.instance().store(group="schema", name=name, node={})
    answer = io.StringIO()
    with _command_line(arguments), redirect_stdout(answer):
        _hydra_main(command, lambda config: None)()
    return answer.getvalue().splitlines()


class _Border:
    """Takes one composed config after the other across, and remembers how the jobs ended."""

    def __init__(
        self,
        command: str,
        options: list[str],
        task: Task,
        types: dict[str, type[Any]],
        mistakes: Mistakes,
        team: Team,
    ) -> None:
        self._command = command
        self._options = [word for word in options if word not in ("-m", "--multirun")]
        self._task = task
        self._types = types
        self._mistakes = mistakes
        self._team = team
        self._started = False
        self._failure: Exception | None = None

    def cross(self) -> int:
        try:
            _hydra_main(self._command, self._job)()
        except _JobFailed:
            return 1  # told when it happened
        except _SweepStopped:
            pass
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError) as error:
            if self._started:
                raise
            raise self._mistakes.told(error) from error
        if self._failure is not None:
            raise self._failure
        return 0

    def _job(self, config: DictConfig) -> None:
        """One job. A failure is raised only in a sweep, where Hydra must count it; it prints more lines."""
        self._started = True
        context = HydraConfig.get()
        sweeping = context.mode == RunMode.MULTIRUN
        if sweeping:
            print(f"job {context.job.num}: {' '.join(context.overrides.task)}", flush=True)
        try:
            self._run(config, context)
        except JointqError as error:
            self._failure = error
            if sweeping and (isinstance(error, Interrupted) or self._team.size > 1):
                raise _SweepStopped from error
            if sweeping:
                print(f"error: job {context.job.num}: {error}", file=sys.stderr, flush=True)
                raise _JobFailed(str(error)) from error
        except Exception as error:
            if not sweeping:
                raise
            if self._team.size > 1:  # the others may be anywhere in this job, and cannot begin the next one with us
                self._failure = error
                raise _SweepStopped from error
            traceback.print_exc()
            raise _JobFailed(str(error)) from error

    def _run(self, config: DictConfig, context: Any) -> None:
        directory = Path(context.runtime.output_dir)
        try:
            recipe = self._typed(OmegaConf.to_object(config), "")
        except (OmegaConfBaseException, ConfigError) as error:
            _remove_empty(directory, Path(config.output_dir).absolute())
            raise self._mistakes.told(error) from error
        overrides = list(context.overrides.task)
        with _command_line([self._command, *overrides, *self._options]):
            text = _as_recipe(config, self._command, context.runtime.choices)
            self._task(recipe, Job(directory, overrides, text, self._team))

    def _typed(self, value: Any, path: str) -> Any:
        """The frozen dataclass for what Hydra filled in; `path` is its key."""
        if not dataclasses.is_dataclass(value):
            return value
        schema = self._types[type(value).__name__]
        names = [field.name for field in dataclasses.fields(schema)]
        for extra in vars(value).keys() - set(names):  # came with a leading +
            raise ConfigError(self._mistakes.unknown_key(path + extra, path, schema.__name__))
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
        *(f"  - override /{group}: {choices[group]}" for group in map(str, config) if group in choices),
        "",
    ]
    return "\n".join([*head, values])


class _JobFailed(Exception):
    """A job of a sweep failed and has said why."""


class _SweepStopped(BaseException):
    """Ctrl-C in a sweep: not an Exception, since Hydra would go on with the next job."""


@functools.cache
def _thawed(schema: type[Any]) -> type[Any]:
    """The same fields without `frozen`, which OmegaConf takes for: not to be set by yaml or overrides."""
    hints = typing.get_type_hints(schema)
    fields = [(field.name, _field_type(hints[field.name])) for field in dataclasses.fields(schema)]
    bases = tuple(_thawed(base) for base in schema.__bases__ if dataclasses.is_dataclass(base))
    return dataclasses.make_dataclass(schema.__name__, fields, bases=bases)


def _field_type(annotation: Any) -> Any:
    nested = isinstance(annotation, type) and dataclasses.is_dataclass(annotation)
    return _thawed(annotation) if nested else annotation


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
        yield [f"hydra.run.dir={folder}", f"hydra.sweep.dir={folder}"]


@contextmanager
def _command_line(arguments: list[str]) -> Iterator[None]:
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
