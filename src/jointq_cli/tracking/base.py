"""The interface of a tracking service: its settings, and one open run of it."""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jointq_cli.errors import ConfigError
from jointq_cli.setting_rules import check_settings


class Tracker:
    """One open run. This base class logs nowhere. Methods raise whatever the service's library raises."""

    def parameters(self, values: Mapping[str, str]) -> None:
        """By dotted key of the recipe, at the start."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Points of curves over depth. step: number of the decoder block."""

    def figures(self, values: Mapping[str, float]) -> None:
        """Of the complete run, at its end."""

    def files(self, paths: Sequence[Path]) -> None:
        """At the end."""

    def close(self, problem: str) -> None:
        """problem: why the run failed, "" if it did not."""


@dataclass(frozen=True)
class Tracking(ABC):
    """Settings of a service."""

    name = ""  # the option of the group, and the extra of this project that installs the library
    module = ""  # importable where the library is installed

    def __post_init__(self) -> None:
        check_settings(self, "tracking")

    def require_installed(self) -> None:
        """Raises ConfigError, which says how the library is installed, where it is not."""
        if self.module and not _is_installed(self.module):
            raise ConfigError(
                f"tracking={self.name}: {self.module} is not installed; pip install 'jointq[{self.name}]'"
            )

    @abstractmethod
    def open(self, run: str, sweep: str, directory: Path) -> Tracker:
        """A new run of the service. run: its name. sweep: the directory of its sweep, "" outside one. directory: of the
        run. Raises whatever the service's library raises."""


@dataclass(frozen=True)
class NoTracking(Tracking):
    """Runs are logged in their directories alone."""

    name = "none"

    def open(self, run: str, sweep: str, directory: Path) -> Tracker:
        return Tracker()


def _is_installed(module: str) -> bool:
    """A folder that is called like the library, as wandb leaves one, is no module with an origin."""
    found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None
