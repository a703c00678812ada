"""Limits of figures, set by a recipe or by `jointq check`: what can have one, and which figures are beyond theirs."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jointq_cli.errors import JointqError
from jointq_cli.records import Comparison, EvaluationReport, RunReport
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

    def as_list(self) -> list["Limit"]:
        values = dataclasses.asdict(self).items()
        return [Limit(name, value, name in AT_LEAST) for name, value in values if value is not None]


@dataclass(frozen=True)
class Limit:
    """Of one figure. at_least: whether the figure may not be below it; otherwise it may not be above."""

    figure: str
    value: float
    at_least: bool

    def admits(self, figure: float) -> bool:
        """NaN is beyond every limit."""
        return figure >= self.value if self.at_least else figure <= self.value

    def line(self, figure: float) -> str:
        """ "kl 0.0512: above its limit of 0.02"."""
        word = "within" if self.admits(figure) else "below" if self.at_least else "above"
        return f"{self.figure} {_shown(self.figure, figure)}: {word} its limit of {_shown(self.figure, self.value)}"


def figures(report: RunReport | EvaluationReport) -> dict[str, float]:
    """The figures of a report that can have limits, by the names of `Limits`."""
    if isinstance(report, EvaluationReport):
        compared = _compared(report.comparison) if report.comparison else {}
        return {"perplexity": report.perplexity.value, **compared}
    return {
        "perplexity": report.quantized.value,
        **_compared(report.comparison),
        "bits_per_weight": report.bits_per_weight,
        "packed_bytes": report.audit.packed_bytes,
        "checkpoint_bytes": report.audit.checkpoint_bytes,
        **({"coverage": report.coverage.share} if report.coverage else {}),
    }


def beyond(found: Mapping[str, float], limits: Iterable[Limit]) -> list[str]:
    """A line for each figure that is beyond its limit. Raises JointqError for a limit of a figure that is not there."""
    limits = list(limits)
    for limit in limits:
        if limit.figure not in found:
            raise JointqError(f"{limit.figure}: no figure of this report; it has {', '.join(found)}")
    return [limit.line(found[limit.figure]) for limit in limits if not limit.admits(found[limit.figure])]


def _compared(comparison: Comparison) -> dict[str, float]:
    return {
        "perplexity_increase": math.expm1(min(comparison.nll_increase, 700.0)),  # of more it overflows
        "nll_increase": comparison.nll_increase,
        "kl": comparison.kl_divergence,
        "top1_agreement": comparison.top1_agreement,
    }


def _shown(name: str, value: float) -> str:
    if name.endswith("_bytes"):
        return f"{value:.0f}"
    return f"{100 * value:.4g} %" if name in SHARES else f"{value:.4g}"
