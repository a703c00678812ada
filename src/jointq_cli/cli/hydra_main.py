"""Hydra's entry point, called from Python: its arguments in sys.argv, its errors as exceptions, its completions."""

import io
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import hydra
import yaml
from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from jointq_cli.cli import config_files
from jointq_cli.cli.config_errors import UsageError, quoted_value
from jointq_cli.errors import ConfigError
from jointq_cli.setting_rules import shown

_SCHEMA_REFERENCE = re.compile(r"^\s*- /schema@_here_: (\w+)", re.MULTILINE)
_ESCAPED = re.compile(r"[\\()\[\]{}:=, \t]")  # in keys of dictionaries
_GRAMMAR = set("()[]{}'\"")  # lists, dictionaries, functions and quotes of Hydra
_FULL_ERROR = "HYDRA_FULL_ERROR"
_GET_MODE = Hydra.get_mode.__name__
SWEEP_MODE = "hydra.mode=MULTIRUN"


def hydra_main(command: str, function: Callable[[DictConfig], None]) -> None:
    """Composes the primary config of `command` by the arguments in sys.argv, and calls `function` with it."""
    decorate = hydra.main(version_base="1.3", config_path=str(config_files.config_dir()), config_name=command)
    main: Callable[[], None] = decorate(function)
    before = getattr(Hydra, _GET_MODE)
    setattr(Hydra, _GET_MODE, _mode)
    try:
        main()
    finally:
        setattr(Hydra, _GET_MODE, before)


def _mode(hydra: Hydra, config_name: str | None, overrides: list[str]) -> RunMode | None:
    """None: a run, or with -m a sweep. Hydra would compose the whole config once more, since files may set it too."""
    return RunMode.MULTIRUN if SWEEP_MODE in overrides else None


def overrides_and_options(command: str, arguments: list[str]) -> tuple[list[str], list[str]]:
    """Separated, since argparse refuses overrides on both sides of an option. Raises UsageError."""
    parser = get_args_parser()
    parser.prog, parser.usage = f"jointq {command}", "%(prog)s [KEY=VALUE ...] [OPTION ...], see --help"
    known, rest = parser.parse_known_args(arguments)
    for word in rest:
        if word.startswith("-"):
            raise UsageError(f"jointq {command} has no option {word}; settings are KEY=VALUE, see --help")
    overrides = [*known.overrides, *rest]
    return overrides, [word for word in arguments if word not in overrides]


def readable(word: str) -> str:
    """The override, with quotes around values that are plain text but not to Hydra: with ~, =, # or beyond ASCII."""
    key, equals, value = word.partition("=")
    if not equals or _is_readable(word) or _GRAMMAR & set(value):
        return word
    parts = [part if _is_readable(f"{key}={part}") else quoted_value(part) for part in value.split(",")]
    quoted = f"{key}={','.join(parts)}"
    return quoted if _is_readable(quoted) else word


def with_entries(word: str, dictionaries: Collection[str]) -> str:
    """The override, with the plus that Hydra demands of new entries where it gives a dictionary some."""
    key, _, value = word.partition("=")
    return f"+{word}" if key in dictionaries and value.startswith("{") and _is_readable(word) else word


def from_file(word: str, dictionaries: Collection[str]) -> str:
    """The override, with the entries of the yaml file that KEY=@FILE names where the key's value is a dictionary.
    Raises ConfigError."""
    key, _, value = word.partition("=")
    if key not in dictionaries or not value.startswith("@"):
        return word
    file = value.removeprefix("@")
    try:
        entries = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{word}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{word}: is not yaml ({' '.join(str(error).split())})") from error
    if not isinstance(entries, dict) or not entries or not all(isinstance(name, str) for name in entries):
        raise ConfigError(f"{word}: must hold entries such as v_proj: {{bits: 8}}, one a line")
    return f"{key}={_as_value(entries)}"


def _as_value(value: object) -> str:
    """Of a yaml file, as Hydra reads it."""
    if isinstance(value, dict):
        entries = (_ESCAPED.sub(r"\\\g<0>", str(name)) + ":" + _as_value(item) for name, item in value.items())
        return f"{{{','.join(entries)}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_as_value, value))}]"
    return quoted_value(value) if isinstance(value, str) else shown(value)


def _is_readable(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def complete(command: str, arguments: list[str]) -> list[str]:
    """Hydra's completions for a shell. COMP_LINE, if it is set, must not contain the command's name.

    Schemas are registered empty: the yaml files have every key, and a shell should not have to wait for torch.
    """
    for path in config_files.config_dir().rglob("*.yaml"):
        for name in _SCHEMA_REFERENCE.findall(path.read_text(encoding="utf-8")):
            ConfigStore.instance().store(group="schema", name=name, node={})
    answer = io.StringIO()
    with command_line(arguments), redirect_stdout(answer):
        hydra_main(command, lambda config: None)
    return answer.getvalue().splitlines()


@contextmanager
def command_line(arguments: list[str]) -> Iterator[None]:
    """Inside, sys.argv, which Hydra reads, has these arguments, without the command's name."""
    before = sys.argv
    sys.argv = ["jointq", *arguments]
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def errors_raised() -> Iterator[None]:
    """Inside, Hydra raises its errors, where it would print them in several lines and exit."""
    before = os.environ.get(_FULL_ERROR)
    os.environ[_FULL_ERROR] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FULL_ERROR]
        else:
            os.environ[_FULL_ERROR] = before
