"""Config errors in one line: the key as typed, the rule, the value, and a similar key or option that exists.

Knows the exceptions of Hydra and OmegaConf and the types of a recipe.
"""

import dataclasses
import difflib
import inspect
import re
import shlex
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    ConfigTypeError,
    ConfigValueError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from jointq_cli.cli import config_files
from jointq_cli.errors import ConfigError, JointqError, ResourceError
from jointq_cli.setting_rules import kind_in_words

LAUNCHERS = {"joblib": "joblib", "submitit_slurm": "slurm", "submitit_local": "slurm", "ray": "ray"}  # option: extra
NO_PACKAGE = "a recipe must begin with the line `# @package _global_`"


class UsageError(ConfigError):
    """The command line is not of the form that the command reads. Exit code 2, as argparse has it."""

    exit_code = 2


class ConfigErrorFormatter:
    """Explains errors of Hydra and OmegaConf. keys: all that the config may have. schemas: its types by name.
    overrides: those of the command line."""

    def __init__(self, keys: Iterable[str], schemas: Mapping[str, type[Any]], overrides: list[str]) -> None:
        self._schemas = schemas
        self._overrides = overrides
        self._keys = list(dict.fromkeys(keys))

    def format(self, error: BaseException) -> JointqError:
        """An error whose message says in one line what `error` means."""
        if isinstance(error, JointqError):
            return error
        if isinstance(error, MissingConfigException):
            return ConfigError(self._unknown_option(error))
        if isinstance(error, OverrideParseException):
            return ConfigError(self._unreadable(error.override))
        for link in _chain(error):
            if isinstance(link, OmegaConfBaseException):
                return ConfigError(_place(error) + self._broken_rule(link, str(error)))
        if isinstance(error, yaml.YAMLError):
            return ConfigError(_one_line(f"not readable as yaml: {error}"))
        if isinstance(error, OSError):
            return ResourceError(f"output_dir: cannot make {error.filename}: {error.strerror}")
        return ConfigError(self._composition(str(error)))

    def unknown_key(self, key: str, prefix: str, owner: str) -> str:
        """`key` does not exist. `prefix`, empty or with a dot at its end, does, and is of type `owner`."""
        message = f"no such key {key}"
        if owner not in self._schemas:
            group = prefix.removesuffix(".")
            rule = f"; the file of an option of {group} begins with `- /schema@_here_: CLASSNAME` in its defaults"
            return message + (rule if group in config_files.groups() else "")
        if key in ("recipe", "quality"):  # the keys of such a file lie there, not at the top
            return NO_PACKAGE
        here = [prefix + field.name for field in dataclasses.fields(self._schemas[owner])]
        if key in self._keys:
            others = ", ".join(name for name in self._owners(key.removeprefix(prefix)) if name != owner)
            return f"{message} with {owner}: it belongs to {others}"
        above = [name for name in self._keys if key.startswith(f"{name}.")]
        beside = [name for name in self._keys if prefix and name.startswith(prefix)]  # of the field's other types
        meant = _nearest(key, here, [name for name in self._keys if name not in above + beside])
        return f"{message}; did you mean {meant}?" if meant else f"{message}; there are {', '.join(here)}"

    def _owners(self, name: str) -> list[str]:
        return [
            schema.__name__
            for schema in self._schemas.values()
            if name in (field.name for field in dataclasses.fields(schema))
        ]

    def _broken_rule(self, error: OmegaConfBaseException, context: str) -> str:
        key = error.full_key or str(error.key)
        override = re.search(r"Error merging override \+*(.+)", context)
        typed = override.group(1) if override else f"{key}={error.value}"
        owner = error.object_type.__name__ if error.object_type else ""
        if isinstance(error, MissingMandatoryValue):
            return f"{key}: has no value; give one with {key}=..."
        if isinstance(error, ConfigKeyError | ConfigAttributeError) and error.object_type is dict:
            return f"no entry {key} yet; add it with a plus: +{key}=VALUE"
        if isinstance(error, ConfigKeyError | ConfigAttributeError):
            unknown = re.search(r"Could not override '([^']+)'", context)
            return self.unknown_key(unknown.group(1) if unknown else key, key[: key.rfind(".") + 1], owner)
        if typed.startswith("~"):
            return f"{typed}: cannot be removed from a recipe"
        if isinstance(error, InterpolationResolutionError):
            return f"{key}: {_first_line(error)}"
        kind = self._kind(owner, key.rpartition(".")[2])
        if isinstance(error, ValidationError | ConfigValueError | ConfigTypeError) and kind:
            return f"{typed}: must be {kind}"
        return f"{typed}: {_first_line(error)}"

    def _kind(self, owner: str, name: str) -> str:
        """The type of a field, or of the list that NAME[0] is in, in words; "" where it is not known."""
        name, item, _ = name.partition("[")
        owners = [owner] if owner in self._schemas else self._owners(name) if item else []
        hint = typing.get_type_hints(self._schemas[owners[0]]).get(name) if owners else None
        return kind_in_words(hint)

    def _unknown_option(self, error: MissingConfigException) -> str:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        first, _, rest = (error.missing_cfg_file or "").partition("/")
        if first in config_files.groups() and first != "hydra":  # model=org/name, which Hydra takes for a subgroup
            group, option = first, rest
        if not group:
            return f"no config called {option}"
        if group == "hydra/launcher" and option in LAUNCHERS:
            return f"hydra/launcher={option}: is not installed; pip install 'jointq[{LAUNCHERS[option]}]'"
        if group == "schema":
            return _place(error) + self._unknown_schema(option)
        options = error.options or list(config_files.options(group))
        if not options:
            return f"{group}={option}: there is no config group {group}"
        own = _own_option(group, option)
        if own and ("/" in option or Path(option).suffix[1:].isalpha()):
            return f"{group}={option}: no such option{own}"
        close = difflib.get_close_matches(option, options, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}? It " if close else ""
        own = "" if close or group != "model" else own
        return f"{group}={option}: {hint}must be one of {', '.join(options)}{own}"

    def _unknown_schema(self, name: str) -> str:
        """The first line of an option's file names a class that no setting can hold."""
        bases = {base for schema in self._schemas.values() for base in schema.__mro__ if dataclasses.is_dataclass(base)}
        for child in (child for base in bases for child in base.__subclasses__() if child.__name__ == name):
            if inspect.isabstract(child):
                return f"/schema@_here_: {name} is abstract: it lacks {', '.join(sorted(child.__abstractmethods__))}"
        close = difflib.get_close_matches(name, self._schemas, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"/schema@_here_: no dataclass called {name} is the type of a setting{hint}"

    def _unreadable(self, override: str) -> str:
        key, equals, value = override.partition("=")
        if value.startswith("{"):
            rule = "a backslash goes before each of : = ( ) [ ] { } in a dictionary's keys"
            return f"{override}: cannot be read; {rule}"
        if equals:
            quoted = shlex.quote(f"{key}={quoted_value(value)}")
            return f"{override}: cannot be read; quote a value that has spaces, quotes or brackets: {quoted}"
        if override.endswith((".yaml", ".yml")):
            return f"{override}: settings are written KEY=VALUE{_own_recipe(override)}"
        if "/" in override or Path(override).exists():
            return f"{override}: settings are written KEY=VALUE; a model is named by model.path={override}"
        recipes = config_files.options("recipe")
        close = difflib.get_close_matches(override, recipes, n=1)
        hint = f"did you mean recipe={close[0]}?" if close else "see --help"
        return f"{override}: settings are written KEY=VALUE; {hint}"

    def _composition(self, message: str) -> str:
        sweep = re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.*)'", message)
        if sweep:
            rule = "several values make a sweep, which needs --multirun (-m); a list is written [a,b]"
            key, _, value = sweep.group(1).partition("=")
            text = f", and one text with a comma {shlex.quote(f'{key}={quoted_value(value)}')}" if value else ""
            return f"{sweep.group(1)}: {rule}{text}"
        unplaced = re.match(r"In '(recipe/[^']+)': Could not override '[^']+@recipe\.", message)
        if unplaced:
            return f"{unplaced.group(1)}.yaml: {NO_PACKAGE}"
        no_group = re.match(r"Could not override '([^']+)'\.\s+No match", message)
        if no_group and no_group.group(1) == "sweep":
            word = next((word for word in self._overrides if word.startswith("sweep=")), "sweep=NAME")
            return f"{word}: a sweep is added to the recipe with a plus, and needs -m: -m +{word}"
        if no_group:
            groups = ", ".join(key for key in self._keys if "." not in key)
            return f"no such group {no_group.group(1)}; there are {groups}"
        nulls = [word for word in self._overrides if word.lower().endswith("=null")]
        if message.startswith("Config group override must be") and nulls:
            return f"{nulls[0]}: a group needs one of its options"
        return _one_line("\n".join(line for line in message.splitlines() if not line.startswith("To append")))


def quoted_value(value: str) -> str:
    """The value of an override as Hydra reads one text, whatever characters it has."""
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', value)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f'"{escaped}{chr(92) * trailing}"'


def _own_option(group: str, option: str) -> str:
    """How to say what `GROUP=OPTION` may have been meant to say, where it is a path or a name of one's own."""
    if group == "model":
        return f"; a directory, a GGUF file or a hub id is named by model.path={option}"
    if group in ("calibration", "evaluation"):
        return f"; a file is named by {group}=text {group}.path={option}"
    if group == "recipe":
        return _own_recipe(option)
    return ""


def _own_recipe(word: str) -> str:
    path = Path(word)
    if path.parent.name == "recipe" and path.is_file():
        return f"; this file is given by --config-dir {shlex.quote(str(path.parent.parent))} recipe={path.stem}"
    place = f"a file FOLDER/recipe/{path.stem}.yaml"
    return f"; a recipe of your own is {place}, given by --config-dir FOLDER recipe={path.stem}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _place(error: BaseException) -> str:
    """The config file that an error is in, with a colon; "" for an error in an override."""
    found = re.match(r"In '([^']+)':", str(error))
    return f"{found.group(1)}.yaml: " if found else ""


def _nearest(key: str, here: list[str], elsewhere: list[str]) -> str | None:
    """The same name anywhere, else a similar one in the same place, else a similar key anywhere."""
    name = _last(key)
    close = difflib.get_close_matches(name, map(_last, here), n=1)
    similar = [other for other in here if [_last(other)] == close]
    same = [other for other in elsewhere if _last(other) == name]
    return next(iter([*same, *similar, *difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.7)]), None)


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _first_line(error: OmegaConfBaseException) -> str:
    return _one_line(str(error.msg or error).splitlines()[0])


def _one_line(text: str) -> str:
    return " ".join(text.split())
