"""A composed config as a recipe file, which composes the same config again."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from jointq_cli.cli import config_files
from jointq_cli.setting_rules import UNRECORDED


def as_recipe(config: DictConfig, command: str, choices: Mapping[str, str]) -> str:
    """The text of a recipe file with all values. choices: the option of each config group."""
    config = OmegaConf.masked_copy(config, [key for key in map(str, config) if key not in UNRECORDED])
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
            f"  - override /{group}: {_bundled_option(group, choices[group], config)}"
            for group in map(str, config)
            if group in choices
        ),
        "",
    ]
    return "\n".join([*head, values])


def _bundled_option(group: str, option: str, config: DictConfig) -> str:
    """An option of the same type that comes with jointq: the values follow, so that any such option will do.

    Hydra adds the entries of a dictionary to those of the option, so the option may have no entries but these.
    """
    schema = OmegaConf.get_type(config, group)
    options = {name: _read(path) for name, path in config_files.options(group).items()}
    reference = {"/schema@_here_": schema.__name__} if schema else None
    same_type = [name for name, values in options.items() if name == option or reference in values["defaults"]]
    fitting = [name for name in same_type if _has_no_more(options[name], config[group])]
    return option if option in fitting or not fitting else fitting[0]


@functools.cache
def _read(path: Path) -> dict[str, Any]:
    """With an empty list of defaults where the file has none."""
    return {"defaults": [], **(yaml.safe_load(path.read_text(encoding="utf-8")) or {})}


def _has_no_more(option: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether every key of the option has a value, in nested dictionaries too."""
    return all(
        key in values and (not isinstance(value, dict) or _has_no_more(value, values[key]))
        for key, value in option.items()
        if key != "defaults"
    )
