"""Limits of figures, set by a recipe or by `jointq check`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from jointq_cli.errors import JointqError
from jointq_cli.report.measured import Figure
from jointq_cli.setting_rules import check_settings, setting

AT_LEAST = ("top1_agreement", "coverage")  # of these more is better; limits of all others are the most allowed
SHARES = ("perplexity_increase", *AT_LEAST)  # shown in percent


@dataclass(frozen=True)
class Limits:
    """The limits of a recipe. None: no limit. Shares are fractions of one."""

    perplexity: float | None = setting(None, above=0, null="for none", decides=False)
    perplexity_increase: float | None = setting(None, null="for none", decides=False)  # share
    nll_increase: float | None = setting(None, null="for none", decides=False)  # nats per token
    kl: float | None = setting(None, least=0, null="for none", decides=False)  # nats per token
    top1_agreement: float | None = setting(None, least=0, most=1, null="for none", decides=False)  # at least this
    bits_per_weight: float | None = setting(None, above=0, null="for none", decides=False)
    packed_bytes: float | None = setting(None, above=0, null="for none", decides=False)
    checkpoint_bytes: float | None = setting(None, above=0, null="for none", decides=False)
    coverage: float | None = setting(None, least=0, most=1, null="for none", decides=False)  # at least this

    def __post_init__(self) -> None:
        check_settings(self, "limits")

    @property
    def given(self) -> dict[str, float]:
        """By the name of the figure."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def checked(found: Mapping[str, Figure], limits: Mapping[str, float]) -> dict[str, bool]:
    """A line such as "kl 0.0512: above its limit of 0.02" for each limit, and whether it holds, which NaN never does.

    Raises JointqError for a limit of a figure that is not there.
    """
    lines = {}
    for name, limit in limits.items():
        if name not in found:
            raise JointqError(f"{name}: no figure of this report; it has {', '.join(found)}")
        value, at_least = found[name].value, name in AT_LEAST
        holds = value >= limit if at_least else value <= limit
        word = "within" if holds else "below" if at_least else "above"
        lines[f"{name} {_shown(name, value)}: {word} its limit of {_shown(name, limit)}"] = holds
    return lines


def beyond(found: Mapping[str, Figure], limits: Mapping[str, float]) -> list[str]:
    """The lines of `checked` of limits that do not hold."""
    return [line for line, holds in checked(found, limits).items() if not holds]


def _shown(name: str, value: float) -> str:
    if name.endswith("_bytes"):
        return f"{value:.0f}"
    return f"{100 * value:.4g} %" if name in SHARES else f"{value:.4g}"
