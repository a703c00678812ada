"""The one border with Hydra: compose a config, make it a typed recipe, run the task, tell errors in one line.

Above the border there are words on a command line and yaml files, below it only dataclasses. A command gives a task,
`launch` gives it the recipe and its run directory. What goes wrong in composing is told by `mistakes`; with
HYDRA_FULL_ERROR=1 in the environment everything passes as Hydra raised it.
"""

import dataclasses
import functools
import io
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
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

_SCHEMA_REFERENCE = re.compile(r"^\s*- /schema@_here_: (\w+)", re.MULTILINE)
_FULL_ERROR = "HYDRA_FULL_ERROR"


@dataclass(frozen=True)
class Job:
    """Where a task writes, and how it was asked for."""

    directory: Path
    overrides: list[str]


Task = Callable[[Any, Job], None]


def launch(command: str, arguments: list[str], task: Task) -> int:
    """Composes the primary config of `command` and runs `task(recipe, job)`: once, or once per job of a sweep.

    Returns 0, or 1 when a job of a sweep failed; the other jobs have run all the same. Raises JointqError for what a
    user can cause; any other exception is a bug and passes as it is.
    """
    from jointq_cli.config import RECIPES, keys, schemas  # brings torch, which shell completion does without

    arguments = _options_last(command, arguments)
    types = {schema.__name__: schema for schema in schemas()}
    for name, schema in types.items():
        ConfigStore.instance().store(group="schema", name=name, node=_thawed(schema))
    border = _Border(task, types, Mistakes(keys(RECIPES[command]), types))
    with _command_line(arguments), _raised_by_hydra():
        return border.cross(command)


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

    def __init__(self, task: Task, types: dict[str, type[Any]], mistakes: Mistakes) -> None:
        self._task = task
        self._types = types
        self._mistakes = mistakes
        self._started = False
        self._failure: JointqError | None = None

    def cross(self, command: str) -> int:
        try:
            _hydra_main(command, self._job)()
        except _JobFailed:
            return 1  # told when it happened
        except _SweepStopped:
            pass
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError) as error:
            if self._started or not _made_by_hydra(error):
                raise
            raise self._mistakes.told(error) from error
        if self._failure is not None:
            raise self._failure
        return 0

    def _job(self, config: DictConfig) -> None:
        """One job. In a sweep a failure must be an exception, or Hydra counts it as done; else it would only add noise."""
        self._started = True
        context = HydraConfig.get()
        sweeping = context.mode == RunMode.MULTIRUN
        if sweeping:
            print(f"job {context.job.num}: {' '.join(context.overrides.task)}", flush=True)
        job = Job(Path(context.runtime.output_dir), list(context.overrides.task))
        try:
            self._run(config, job)
        except JointqError as error:
            self._failure = error
            if isinstance(error, Interrupted) and sweeping:
                raise _SweepStopped from error
            if sweeping:
                print(f"error: job {context.job.num}: {error}", file=sys.stderr, flush=True)
                raise _JobFailed(str(error)) from error
        except Exception as error:
            if not sweeping:
                raise
            traceback.print_exc()
            raise _JobFailed(str(error)) from error

    def _run(self, config: DictConfig, job: Job) -> None:
        try:
            recipe = self._typed(OmegaConf.to_object(config), "")
        except (OmegaConfBaseException, ConfigError) as error:
            _remove_if_empty(job.directory)
            raise self._mistakes.told(error) from error
        self._task(recipe, job)

    def _typed(self, value: Any, path: str) -> Any:
        """The frozen dataclass for what Hydra filled in; `path` is its key."""
        if not dataclasses.is_dataclass(value):
            return value
        schema = self._types[type(value).__name__]
        names = [field.name for field in dataclasses.fields(schema)]
        for extra in vars(value).keys() - set(names):  # came with a leading +
            raise ConfigError(self._mistakes.unknown_key(path + extra, schema.__name__))
        return schema(**{name: self._typed(getattr(value, name), f"{path}{name}.") for name in names})


class _JobFailed(Exception):
    """A job of a sweep failed and has said why."""


class _SweepStopped(BaseException):
    """Ctrl-C in a sweep: not an Exception, since Hydra would go on with the next job."""


@functools.cache
def _thawed(schema: type[Any]) -> type[Any]:
    """The same fields without `frozen`, which OmegaConf would take for "yaml and overrides may not set this"."""
    hints = typing.get_type_hints(schema)
    fields = [(field.name, _field_type(hints[field.name])) for field in dataclasses.fields(schema)]
    bases = tuple(_thawed(base) for base in schema.__bases__ if dataclasses.is_dataclass(base))
    return dataclasses.make_dataclass(schema.__name__, fields, bases=bases)


def _field_type(annotation: Any) -> Any:
    nested = isinstance(annotation, type) and dataclasses.is_dataclass(annotation)
    return _thawed(annotation) if nested else annotation


def _hydra_main(command: str, function: Callable[[DictConfig], None]) -> Callable[[], None]:
    directory = str(resources.config_dir())
    main: Callable[[], None] = hydra.main(version_base="1.3", config_path=directory, config_name=command)(function)
    return main


def _options_last(command: str, arguments: list[str]) -> list[str]:
    """Overrides, then options: argparse refuses overrides on both sides of an option. Raises UsageError."""
    known, rest = get_args_parser().parse_known_args(arguments)
    for word in rest:
        if word.startswith("-"):
            raise UsageError(f"jointq {command} has no option {word}; settings are written KEY=VALUE, see --help")
    overrides = [*known.overrides, *rest]
    return overrides + [word for word in arguments if word not in overrides]


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


def _made_by_hydra(error: BaseException) -> bool:
    """Whether the function that raised, or that called into the standard library, is Hydra's."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return not any(name.startswith("jointq_cli.") for name in modules[2:]) and any(
        name.startswith("hydra.") for name in modules
    )


def _remove_if_empty(directory: Path) -> None:
    """Hydra made it before the recipe was found wanting; so it did the folders above."""
    with suppress(OSError):
        for folder in (directory, directory.parent, directory.parent.parent):
            folder.rmdir()
