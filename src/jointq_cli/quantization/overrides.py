"""Layers with settings of their own: the quantizer of each layer, from patterns and settings."""

import dataclasses
import re
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jointq_cli.errors import ConfigError
from jointq_cli.formats.k_quant import SUPER_BLOCK
from jointq_cli.models.k_mixes import FALLBACKS, UNIFORM_SETTINGS
from jointq_cli.models.layer_selection import KEEP, LayerSelection, override_key
from jointq_cli.quantization.quantizers.base import Quantizer
from jointq_cli.setting_rules import is_of_kind, kind_in_words, rule_of, shown


def quantizers_of_patterns(layers: LayerSelection, quantizer: Quantizer) -> dict[str, Quantizer | None]:
    """The quantizer of each pattern of `layers.overrides`, None where layers are left alone. Raises ConfigError, as
    `overridden` does."""
    return {
        pattern: None if settings == KEEP else overridden(quantizer, settings, override_key(pattern))
        for pattern, settings in layers.overrides.items()
    }


def overridden(quantizer: Quantizer, settings: Mapping[str, Any], key: str) -> Quantizer:
    """The quantizer with some settings changed. key: under which these stand. Raises ConfigError, naming the key, for
    an unknown setting and for a value that is not allowed."""
    if not settings:
        return quantizer
    try:
        changed: Quantizer = _changed(quantizer, settings, key)
    except ConfigError as error:
        raise ConfigError(renamed(str(error), settings, key)) from error
    if settings.get("incoherence") == "auto":  # of the whole recipe, which has decided by what its layers have
        raise ConfigError(f"{key}.incoherence=auto: is decided for all layers together; input or none")
    for field in dataclasses.fields(changed):
        if field.name in settings and not rule_of(field).used(changed):
            grid = getattr(changed, "grid", None)
            others = f"grid={grid}; add grid: null" if grid else "the other settings"
            raise ConfigError(f"{key}.{field.name}={shown(settings[field.name])}: has no effect beside {others}")
    return changed


def on_type(quantizer: Quantizer, name: str, key: str) -> Quantizer:
    """The quantizer whose result a type of `k_mixes` holds; its groups are of neighbouring columns, as in GGUF. Raises
    ConfigError, naming the key, where it has no K grids."""
    known = [field.name for field in dataclasses.fields(quantizer)]
    if "grid" not in known:
        raise ConfigError(f"{key}: {type(quantizer).__name__} has no K grids; quantizer=rtn, gptq or jointq")
    settings = dict(UNIFORM_SETTINGS.get(name, {"grid": name}))
    if name in UNIFORM_SETTINGS and "static_groups" in known:
        settings["static_groups"] = True
    return overridden(quantizer, settings, key)


def fitting(quantizer: Quantizer, in_features: int) -> Quantizer:
    """The quantizer of a layer of so many columns: another one where its K grid does not fit."""
    grid: Any = getattr(quantizer, "grid", None)
    if grid not in FALLBACKS or in_features % SUPER_BLOCK == 0:
        return quantizer
    return on_type(quantizer, FALLBACKS[grid], "quantizer.grid")


def renamed(message: str, settings: Mapping[str, Any], key: str) -> str:
    """A message about `quantizer` that names another key, under which some of its settings stand."""
    if message.startswith(key):
        return message
    names = "|".join(map(re.escape, map(str, settings)))
    found, count = re.subn(rf"\bquantizer\.(?=({names})\b)", lambda _: f"{key}.", message)
    return found if count else f"{key}: {message}"


def _changed(value: Any, settings: Mapping[str, Any], key: str) -> Any:
    """A dataclass with other values, in nested ones too."""
    kinds = typing.get_type_hints(type(value))
    names = [field.name for field in dataclasses.fields(value)]
    changes: dict[str, Any] = {}
    for name, setting in settings.items():
        if name not in names:
            raise ConfigError(f"{key}.{name}: {type(value).__name__} has {', '.join(names)}")
        if dataclasses.is_dataclass(getattr(value, name)) and isinstance(setting, dict):
            changes[name] = _changed(getattr(value, name), setting, f"{key}.{name}")
        elif not is_of_kind(setting, kinds[name]):
            raise ConfigError(f"{key}.{name}={shown(setting)}: must be {kind_in_words(kinds[name]) or 'a dictionary'}")
        else:
            changes[name] = float(setting) if kinds[name] is float else setting
    return dataclasses.replace(value, **changes)


def most_common(quantizers: Sequence[Quantizer]) -> Quantizer:
    """The one of most layers, the first of several."""
    return by_text(quantizers)[Counter(map(repr, quantizers)).most_common(1)[0][0]]


def by_text(quantizers: Sequence[Quantizer]) -> dict[str, Quantizer]:
    """The different ones. Quantizers hold lists, which are no keys of a dictionary."""
    return {repr(quantizer): quantizer for quantizer in quantizers}


def describe(quantizers: Sequence[Quantizer]) -> str:
    """Those of all layers in one line, of the rarer ones what differs: "RTN W4 g128 asymmetric mse + 3 layers W8"."""
    usual = most_common(quantizers)
    different = by_text(quantizers)
    others = [
        f"{count} layer{'s' * (count > 1)} {_difference(different[text], usual)}"
        for text, count in Counter(map(repr, quantizers)).most_common()
        if different[text] != usual
    ]
    return f"{usual.describe()} + {', '.join(others)}" if others else usual.describe()


def _difference(one: Quantizer, usual: Quantizer) -> str:
    """In the words of `describe` that the usual one has not, else by settings."""
    words = [word for word in one.describe().split() if word not in usual.describe().split()]
    fields = [field.name for field in dataclasses.fields(one)]
    changed = [name for name in fields if getattr(one, name) != getattr(usual, name)]
    return " ".join(words or [f"{name}={shown(getattr(one, name))}" for name in changed])
