"""The result of a replay as lines of text and as Markdown: step by step, then the verdict and its explanation.

Knows the record of the comparison. Compares nothing.
"""

import math
from collections.abc import Iterable

from jointq_cli.records import (
    COMPUTED,
    IDENTICAL,
    MEASURED,
    REQUESTED,
    WITHIN_TOLERANCE,
    ComparedStep,
    ReplayedMetric,
    Reproduction,
)
from jointq_cli.report.number_format import percent, relative_change
from jointq_cli.report.tables.table import aligned

PARTS = {REQUESTED: "What was requested", COMPUTED: "What was computed", MEASURED: "What was measured"}


def render_text(reproduction: Reproduction) -> str:
    steps = [(step.name, _outcome(step)) for step in reproduction.steps]
    return "\n".join([*aligned(steps), "", *conclusion(reproduction)])


def render_markdown(reproduction: Reproduction) -> str:
    sections = [
        part
        for name, title in PARTS.items()
        for part in (f"## {title}", _list(step for step in reproduction.steps if step.part == name))
    ]
    verdict, *reasons = conclusion(reproduction)
    directories = f"Original: `{reproduction.original}`, replay: `{reproduction.replay}`."
    return "\n\n".join([f"# {verdict}", *reasons, directories, *sections]) + "\n"


def conclusion(reproduction: Reproduction) -> list[str]:
    """The verdict, then where the runs first differ, the probable reason, and problems of the replay itself."""
    problems = [f"the replay itself: {problem}" for problem in reproduction.problems]
    return [_verdict(reproduction), *_first_difference(reproduction), *_reasons(reproduction), *problems]


def _verdict(reproduction: Reproduction) -> str:
    if reproduction.verdict == IDENTICAL:
        return "identical: the same bits were computed, and the same was measured"
    if reproduction.tolerance is None:
        return "different"
    tolerance = percent(reproduction.tolerance)
    if not all(step.same for step in reproduction.steps if step.part == REQUESTED):
        return f"different: a tolerance of {tolerance} is for runs with the same config on the same tokens"
    if not reproduction.rounding:
        return f"different: a tolerance of {tolerance} is for other hardware or libraries, and none are recorded"
    not_finite = [metric for metric in reproduction.figures if not _is_finite(metric)]
    if not_finite:
        return f"different: {not_finite[0].name} is not a finite number, which no tolerance admits"
    worst = max(reproduction.figures, key=lambda metric: abs(metric.change))
    moved = f"{worst.name} moved most, by {relative_change(worst.change)}"
    if reproduction.verdict == WITHIN_TOLERANCE:
        return f"not identical, but within {tolerance}: {moved}"
    return f"different by more than {tolerance}: {moved}"


def _is_finite(metric: ReplayedMetric) -> bool:
    return math.isfinite(metric.original) and math.isfinite(metric.replay)


def _first_difference(reproduction: Reproduction) -> list[str]:
    first = reproduction.first_difference
    if first is None:
        return []
    before = "" if first is reproduction.steps[0] else "; everything before it is identical"
    return [f"it begins with: {first.name}: {first.detail}{before}"]


def _reasons(reproduction: Reproduction) -> list[str]:
    first, environment = reproduction.first_difference, ", ".join(reproduction.surroundings)
    if first is None:
        return [f"although these differ: {environment}"] if environment else []
    if first.part == REQUESTED:
        return [f"these differ besides: {environment}"] if environment else []
    unknown = [f"not known to be the same: {', '.join(reproduction.unknown)}"] if reproduction.unknown else []
    if environment:
        reason = "these differ" if reproduction.verdict == WITHIN_TOLERANCE else "probable reason"
        return [f"{reason}: {environment}", *unknown]
    if unknown:
        return ["no difference of machine, libraries or code is recorded", *unknown]
    return ["no difference of machine, libraries or code is recorded: something is not deterministic"]


def _outcome(step: ComparedStep) -> str:
    word = "identical" if step.same else "differs"
    return f"{word:<9}  {step.detail}".rstrip()


def _list(steps: Iterable[ComparedStep]) -> str:
    return "\n".join(f"- {step.name}: {_outcome(step)}" for step in steps)
