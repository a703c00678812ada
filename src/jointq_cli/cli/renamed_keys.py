"""Config keys by their old names: accepted on the command line and in yaml files, and announced once."""

import functools
import pickle
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra._internal import hydra as hydra_main
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_search_path import ConfigSearchPath
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

    A job of a sweep is composed once, when all jobs are checked: Hydra would compose it again when it starts.
    """

    def __init__(self, config_search_path: ConfigSearchPath, renamer: KeyRenamer) -> None:
        super().__init__(config_search_path)
        self._renamer = renamer
        self._jobs: dict[tuple[str, ...], bytes] = {}  # by overrides; pickled, a tenth of a config's memory

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_jobs": {}}

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        job = tuple(sweep_overrides)
        if job in self._jobs:
            known: DictConfig = pickle.loads(self._jobs.pop(job))
            return known
        composed = super().load_sweep_config(master_config, sweep_overrides)
        self._jobs[job] = pickle.dumps(composed)
        return composed

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
