"""What came of a replay, as lines for a person and as Markdown: step by step, then the verdict and why.

Knows the record of the comparison. Compares nothing.
"""

import math
from collections.abc import Iterable

from jointq_cli.records import (
    ASKED,
    IDENTICAL,
    MADE,
    MEASURED,
    WITHIN_TOLERANCE,
    ComparedStep,
    ReplayedFigure,
    Reproduction,
)
from jointq_cli.report import number_format as units
from jointq_cli.report.console.lines import aligned

PARTS = {ASKED: "What was asked", MADE: "What was made", MEASURED: "What was measured"}


def render_lines(reproduction: Reproduction) -> str:
    steps = [(step.name, _outcome(step)) for step in reproduction.steps]
    return "\n".join([*aligned(steps), "", *conclusion(reproduction)])


def render_reproduction(reproduction: Reproduction) -> str:
    """As Markdown."""
    sections = [
        part
        for name, title in PARTS.items()
        for part in (f"## {title}", _list(step for step in reproduction.steps if step.part == name))
    ]
    verdict, *reasons = conclusion(reproduction)
    ran = f"Original: `{reproduction.original}`, replay: `{reproduction.replay}`."
    return "\n\n".join([f"# {verdict}", *reasons, ran, *sections]) + "\n"


def conclusion(reproduction: Reproduction) -> list[str]:
    """The verdict, then what explains it."""
    return [_verdict(reproduction), *_where(reproduction), *_why(reproduction), *_problems(reproduction)]


def _verdict(reproduction: Reproduction) -> str:
    if reproduction.verdict == IDENTICAL:
        return "identical: the same bits were made, and the same was measured"
    if reproduction.tolerance is None:
        return "different"
    share = units.percent(reproduction.tolerance)
    if not all(step.same for step in reproduction.steps if step.part == ASKED):
        return f"different: a tolerance of {share} is for runs that were asked for the same, on the same tokens"
    if not reproduction.rounding:
        return f"different: a tolerance of {share} is for other hardware or libraries, and none are recorded"
    broken = [figure for figure in reproduction.figures if not _is_finite(figure)]
    if broken:
        return f"different: {broken[0].name} is no number, which no tolerance admits"
    worst = max(reproduction.figures, key=lambda figure: abs(figure.change))
    moved = f"{worst.name} moved most, by {units.change(worst.change)}"
    if reproduction.verdict == WITHIN_TOLERANCE:
        return f"not identical, but within {share}: {moved}"
    return f"different by more than {share}: {moved}"


def _is_finite(figure: ReplayedFigure) -> bool:
    return math.isfinite(figure.original) and math.isfinite(figure.replay)


def _where(reproduction: Reproduction) -> list[str]:
    first = reproduction.first_difference
    if first is None:
        return []
    before = "" if first is reproduction.steps[0] else "; everything before it is identical"
    return [f"it begins with: {first.name}: {first.detail}{before}"]


def _why(reproduction: Reproduction) -> list[str]:
    first, differ = reproduction.first_difference, ", ".join(reproduction.surroundings)
    if first is None:
        return [f"although these differ: {differ}"] if differ else []
    if first.part == ASKED:
        return [f"these differ besides: {differ}"] if differ else []
    unknown = [f"not known to be the same: {', '.join(reproduction.unknown)}"] if reproduction.unknown else []
    if differ:
        reason = "these differ" if reproduction.verdict == WITHIN_TOLERANCE else "probable reason"
        return [f"{reason}: {differ}", *unknown]
    if unknown:
        return ["no difference of machine, libraries or code is recorded", *unknown]
    return ["no difference of machine, libraries or code is recorded: something is not deterministic"]


def _problems(reproduction: Reproduction) -> list[str]:
    return [f"the replay itself: {problem}" for problem in reproduction.problems]


def _outcome(step: ComparedStep) -> str:
    word = "identical" if step.same else "differs"
    return f"{word:<9}  {step.detail}".rstrip()


def _list(steps: Iterable[ComparedStep]) -> str:
    return "\n".join(f"- {step.name}: {_outcome(step)}" for step in steps)
