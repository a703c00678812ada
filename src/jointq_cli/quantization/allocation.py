"""The config group `allocation`: whether layers get bits by what they do to the loss, within a budget."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jointq_cli.errors import ConfigError
from jointq_cli.quantization.overrides import overridden
from jointq_cli.quantization.quantizers.base import Quantizer
from jointq_cli.setting_rules import check_settings, setting, shown

MOST_CANDIDATES = 16


@dataclass(frozen=True)
class Allocation(ABC):
    """Base of the settings under `allocation`."""

    @abstractmethod
    def of(self, quantizer: Quantizer) -> list[Quantizer]:
        """The candidates of a layer that has this quantizer, none where nothing is allocated. Raises ConfigError, as
        `overridden` does."""

    @abstractmethod
    def check(self, quantizer: Quantizer) -> None:
        """Raises ConfigError where the settings do not fit the recipe's quantizer."""

    @abstractmethod
    def describe(self) -> str:
        """One line for reports, "" for none."""


@dataclass(frozen=True)
class NoAllocation(Allocation):
    """The settings under `quantizer` and `layers` say how each layer is stored."""

    def of(self, quantizer: Quantizer) -> list[Quantizer]:
        return []

    def check(self, quantizer: Quantizer) -> None:
        return None

    def describe(self) -> str:
        return ""


@dataclass(frozen=True)
class Budget(Allocation):
    """The fields are described in configs/allocation/budget.yaml."""

    bits_per_weight: float | None = setting(None, above=0, null="where size_gb is given")
    size_gb: float | None = setting(None, above=0, null="where bits_per_weight is given")
    candidates: list[Any] = setting([{"bits": 2}, {"bits": 3}, {"bits": 4}])
    sensitivity: str = setting("kfac", choices=("kfac", "fisher"))
    tie: str = setting("none", choices=("none", "kernel"))

    def __post_init__(self) -> None:
        check_settings(self, "allocation")
        if not 2 <= len(self.candidates) <= MOST_CANDIDATES:
            raise ConfigError(f"allocation.candidates: must be from 2 to {MOST_CANDIDATES} settings of the quantizer")
        for number, settings in enumerate(self.candidates):
            if not isinstance(settings, dict) or not settings:
                rule = "must be settings of the quantizer, such as {bits: 3}"
                raise ConfigError(f"allocation.candidates[{number}]={shown(settings)}: {rule}")
            if settings in self.candidates[:number]:
                raise ConfigError(f"allocation.candidates[{number}]={in_words(settings)}: is there already")

    def of(self, quantizer: Quantizer) -> list[Quantizer]:
        return [
            overridden(quantizer, settings, f"allocation.candidates[{number}]")
            for number, settings in enumerate(self.candidates)
        ]

    def check(self, quantizer: Quantizer) -> None:
        given = [name for name in ("bits_per_weight", "size_gb") if getattr(self, name) is not None]
        if len(given) != 1:
            found = "both are given; null takes one away" if given else "none is given"
            raise ConfigError(
                f"allocation=budget: needs one of allocation.bits_per_weight and allocation.size_gb, and {found}"
            )
        self.of(quantizer)

    @property
    def budget(self) -> str:
        """As in the recipe: "bits_per_weight=3.15"."""
        if self.bits_per_weight is not None:
            return f"bits_per_weight={self.bits_per_weight:g}"
        return f"size_gb={self.size_gb:g}"

    def describe(self) -> str:
        tied = ", layers of one kernel alike" if self.tie == "kernel" else ""
        fisher = ", by the Fisher information" if self.sensitivity == "fisher" else ""
        return f"{self.budget} of {', '.join(map(in_words, self.candidates))}{tied}{fisher}"


def in_words(settings: Mapping[str, Any]) -> str:
    """As yaml has it: {bits: 3}."""
    return f"{{{', '.join(f'{name}: {shown(value)}' for name, value in settings.items())}}}"


NO_ALLOCATION = NoAllocation()
