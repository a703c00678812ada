"""Config keys by their old names: accepted on the command line and in yaml files, and announced once."""

import copy
import functools
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra._internal import hydra as hydra_main
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from jointq_cli.errors import ConfigError
from jointq_cli.setting_rules import RENAMED

LOADER = ConfigLoaderImpl.__name__  # where Hydra looks up the class
SWEPT = "hydra.sweeper.params"  # a dictionary whose keys are those of a recipe, dotted


class KeyRenamer:
    """Replaces old keys by new ones. silent: without saying so."""

    def __init__(self, *, silent: bool = False) -> None:
        self._silent = silent
        self._announced: set[str] = set()

    def override(self, word: str) -> str:
        """An override such as KEY=VALUE or ++KEY=VALUE."""
        return re.sub(r"^([+~]*)([^=]+)", lambda found: found[1] + self._renamed(found[2]), word)

    def config(self, config: Any) -> None:
        """In place, a config whose keys begin at the top of a recipe."""
        for old, new in RENAMED.items():
            section, _, name = old.rpartition(".")
            self._move(OmegaConf.select(config, section), name, new.removeprefix(f"{section}."), old)
            self._move(OmegaConf.select(config, SWEPT), old, new, old)

    def _move(self, node: Any, old: str, new: str, key: str) -> None:
        if not isinstance(node, DictConfig) or old not in node.keys():  # noqa: SIM118 - `in` overlooks a missing value
            return
        if new in node.keys():  # noqa: SIM118
            raise ConfigError(f"{key}: is the old name of {self._renamed(key)}, which has a value too; remove one")
        values = OmegaConf.to_container(node, resolve=False)
        assert isinstance(values, dict)
        with open_dict(node):
            del node[old]
            node[new] = values[old]
        self._renamed(key)

    def _renamed(self, key: str) -> str:
        if key in RENAMED and not self._silent and key not in self._announced:
            print(f"{key} is now {RENAMED[key]}; the old name still works", file=sys.stderr, flush=True)
            self._announced.add(key)
        return RENAMED.get(key, key)


class RenamingConfigLoader(ConfigLoaderImpl):
    """Hydra's loader, which renames the keys of every file. Launchers send it to other processes.

    Jobs of a sweep that differ in values alone are composed once: the rest of composing one takes .2 s, and Hydra does
    it whenever a job is checked or started.
    """

    def __init__(self, config_search_path: ConfigSearchPath, renamer: KeyRenamer) -> None:
        super().__init__(config_search_path)
        self._renamer = renamer
        self._composed: dict[tuple[str, ...], DictConfig] = {}  # by the overrides of groups

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_composed": {}}

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        words = OverridesParser.create().parse_overrides(sweep_overrides)
        values = [  # not options of groups, by Hydra's own rule
            word
            for word in words
            if isinstance(word.value(), dict) or not self.repository.group_exists(word.key_or_group)
        ]
        groups = [str(word.input_line) for word in words if word not in values]
        if tuple(groups) not in self._composed:
            self._composed[tuple(groups)] = super().load_sweep_config(master_config, groups)
        config = copy.deepcopy(self._composed[tuple(groups)])
        try:
            self._apply_overrides_to_config(values, config)
        except Exception:  # a value that is refused, or a group that only a config's own search path has
            return super().load_sweep_config(master_config, sweep_overrides)
        config.hydra.overrides.task = sweep_overrides
        naming = config.hydra.job.config.override_dirname
        config.hydra.job.override_dirname = get_overrides_dirname(
            words, kv_sep=naming.kv_sep, item_sep=naming.item_sep, exclude_keys=naming.exclude_keys
        )
        return config

    def _load_single_config(self, *arguments: Any, **options: Any) -> Any:
        loaded = super()._load_single_config(*arguments, **options)
        self._renamer.config(loaded.config)
        return loaded


@contextmanager
def renamed_by(renamer: KeyRenamer) -> Iterator[None]:
    """Inside, Hydra reads config files by a RenamingConfigLoader."""
    before = getattr(hydra_main, LOADER)
    setattr(hydra_main, LOADER, functools.partial(RenamingConfigLoader, renamer=renamer))
    try:
        yield
    finally:
        setattr(hydra_main, LOADER, before)
