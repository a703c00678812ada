"""A setting: default, rule and role of one key of a recipe, stated once as metadata of its dataclass field.

    bits: int = setting(4, least=1, most=8)
    path: str | None = setting(None, place=True)

Error messages, descriptions, what `jointq reproduce` may change and what makes a job of a sweep run again follow from
it. A config has the same defaults in its yaml file, where each key is explained. Knows no config and no dataclass.
"""

import copy
import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass
from typing import TYPE_CHECKING, Any, Final

from jointq_cli.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RENAMED: Final = {"runtime.waiting_gb": "runtime.suspended_activations_gb"}
"""Old key -> new key. The old one still works on the command line and in recipes, and in those of old runs.

Here rather than at the fields, since reports of old runs need it and should not have to load torch.
"""

UNRECORDED: Final = ("tracking",)
"""Groups that recipe.yaml leaves out: where a run is logged is no part of what it does."""

_KINDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list, such as [a,b]",
    dict: "a dictionary, such as {a:1}",
}


@dataclass(frozen=True)
class Rule:
    """Which values a setting may have, and what it is to a result. In a list or dictionary, each item must obey."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    infinite: bool = False  # whether an infinite number is a value too
    choices: tuple[str, ...] = ()
    pattern: str = ""  # of the whole text
    form: str = ""  # what the pattern asks for, in words after "must"
    null: str = ""  # what null stands for
    place: bool = False  # of files, whose content may decide a result; where they are does not
    decides: bool = True  # whether the value takes part in a run's result
    used: Callable[[Any], bool] = lambda settings: True  # whether it has an effect beside the other settings

    def admits(self, value: Any) -> bool:
        """Whether a number or text obeys; NaN never does."""
        if isinstance(value, float) and not (math.isfinite(value) or (self.infinite and value == math.inf)):
            return False
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
            and (not self.choices or value in self.choices)
            and (not self.pattern or re.fullmatch(self.pattern, value, re.DOTALL) is not None)
        )

    def demand(self, value: Any) -> str:
        """What is demanded of a value like this one: "must be from 1 to 8"."""
        null = f", or null {self.null}" if self.null else ""
        if self.form:
            return f"must {self.form}{null}"
        if self.choices:
            choices = " or ".join(self.choices) if len(self.choices) == 2 else f"one of {', '.join(self.choices)}"
            return f"must be {choices}{null}"
        if self.least is not None and self.most is not None:
            return f"must be from {self.least} to {self.most}{null}"
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        words = [f"{word} {bound}" for word, bound in bounds.items() if bound is not None]
        unbounded = self.most is None and self.below is None and isinstance(value, float) and not self.infinite
        return f"must be {' and '.join([*words, *(['finite'] if unbounded else [])])}{null}"


def setting(
    default: Any = MISSING,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    infinite: bool = False,
    choices: tuple[str, ...] = (),
    pattern: str = "",
    form: str = "",
    null: str = "",
    place: bool = False,
    decides: bool = True,
    used: Callable[[Any], bool] = lambda settings: True,
) -> Any:
    """A dataclass field with the default and a `Rule` of the rest. Lists and dictionaries are copied."""
    rule = Rule(least, above, most, below, infinite, choices, pattern, form, null, place, decides and not place, used)
    metadata = {Rule: rule}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def rule_of(field: Field[Any]) -> Rule:
    rule: Rule = field.metadata.get(Rule, Rule())
    return rule


def check_settings(settings: "DataclassInstance", section: str = "") -> None:
    """Raises ConfigError for the first setting that breaks its rule. section: the key under which `settings` stands."""
    for field in dataclasses.fields(settings):
        key = _key(section, field.name)
        value, rule = getattr(settings, field.name), rule_of(field)
        if dataclasses.is_dataclass(value):
            continue  # has been checked, or will be by the one that holds it
        items = value.items() if isinstance(value, dict) else [("", value)]
        for name, item in items:
            _require(rule, f"{key}.{name}" if name else key, item)


def _require(rule: Rule, key: str, value: Any) -> None:
    if isinstance(value, list):
        wrong = [item for item in value if not rule.admits(item)]
        if wrong:
            raise ConfigError(f"{key}={value}: each value {rule.demand(wrong[0])}, and {shown(wrong[0])} is not")
    elif value is not None and not rule.admits(value):
        raise ConfigError(f"{key}={shown(value)}: {rule.demand(value)}")


def kind_in_words(annotation: Any) -> str:
    """A field's type, as in "must be an integer or null"; "" where it has no words."""
    if isinstance(annotation, types.UnionType):
        return " or ".join(_KINDS.get(part, "null") for part in typing.get_args(annotation))
    if annotation == list[float]:
        return "a list of numbers, such as [1,2]"
    return _KINDS.get(typing.get_origin(annotation) or annotation, "")


def is_of_kind(value: Any, annotation: Any) -> bool:
    """Whether a value of a config, where no schema has checked it, may stand in a field of this type."""
    if isinstance(annotation, types.UnionType):
        return any(is_of_kind(value, part) for part in typing.get_args(annotation))
    if typing.get_origin(annotation) is list:
        return isinstance(value, list) and all(is_of_kind(item, typing.get_args(annotation)[0]) for item in value)
    if isinstance(value, bool):  # which Python counts as an integer
        return annotation is bool
    return isinstance(value, int | float if annotation is float else annotation)


def changed(settings: "DataclassInstance") -> dict[str, Any]:
    """The settings that differ from their defaults and are used, by name."""
    return {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if rule_of(field).used(settings) and getattr(settings, field.name) != default_of(field)
    }


def default_of(field: Field[Any]) -> Any:
    """MISSING where there is none."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def places(settings: "DataclassInstance", section: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and value of each setting, here and in nested dataclasses, that names a place of files."""
    for field in dataclasses.fields(settings):
        key, value = _key(section, field.name), getattr(settings, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from places(value, key)
        elif rule_of(field).place and isinstance(value, str):
            yield key, value


def _key(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def shown(value: Any) -> str:
    """As yaml has it."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


# Values, as text, of settings that ask for nothing: runs of before the setting lack them.
UNSET = (None, "null", "none", "[]", "{}", "0")


@dataclass(frozen=True)
class SettingRoles:
    """The keys of a recipe, dotted, by what they are to a run's result."""

    known: frozenset[str]
    undeciding: frozenset[str]  # of those known
    dictionaries: frozenset[str]  # whose entries are keys of a user's own

    def decides(self, key: str) -> bool:
        """Whether a setting takes part in a run's result. Of those that only other versions know, all but what belongs
        to the machine do."""
        return key not in self.undeciding if key in self.known else not key.startswith("runtime.")

    def is_entry(self, key: str) -> bool:
        """Whether the key is one of a user's own, rather than one that this version does not know."""
        return any(key == name or key.startswith(f"{name}.") for name in self.dictionaries)

    @property
    def replayable(self) -> list[str]:
        """What a replay may change: what does not decide, except what a run is called and where it is written."""
        return sorted(key for key in self.undeciding if "." in key and key.partition(".")[0] not in UNRECORDED)
