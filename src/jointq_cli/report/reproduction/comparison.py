"""Two runs compared in the order of the road, until it is known where they part; and the verdict on it.

What was made is compared by the byte. What was measured is compared to nine digits, since the last ones depend on the
order in which threads add. Knows when a tolerance applies. The steps themselves are in `asked`, `made` and `measured`.
"""

import math
from collections.abc import Sequence

from jointq_cli.records import (
    ASKED,
    DIFFERENT,
    IDENTICAL,
    WITHIN_TOLERANCE,
    ComparedStep,
    ReplayedFigure,
    Reproduction,
)
from jointq_cli.report.compare.summary import problems
from jointq_cli.report.reproduction import artifacts as made
from jointq_cli.report.reproduction import environment as surroundings
from jointq_cli.report.reproduction import inputs as asked
from jointq_cli.report.reproduction import metrics as measured
from jointq_cli.report.reproduction.finished_run import Evidence
from jointq_cli.setting_rules import SettingRoles


def compare(original: Evidence, replay: Evidence, roles: SettingRoles, tolerance: float | None = None) -> Reproduction:
    """tolerance: relative, on both perplexities and on KL divergence, for runs that were asked for the same on the
    same tokens and whose hardware or libraries can round otherwise; None for runs that must be identical."""
    runs = (original, replay)
    figures = measured.figures(*runs)
    behind_the_config = [
        *asked.hashes(*runs),
        made.rotation(*runs),
        made.codes(*runs),
        measured.layers(*runs),
        measured.blocks(*runs),
        made.checkpoint(*runs),
        measured.audit(*runs),
        measured.reload_check(*runs),
        measured.simulation(*runs),
        measured.likelihoods(*runs),
        *map(measured.figure_step, figures),
    ]
    steps = [asked.config(*runs, roles, proven=all(step.same for step in behind_the_config)), *behind_the_config]
    rounding = surroundings.that_can_round_otherwise(*runs)
    return Reproduction(
        original=str(original.directory),
        replay=str(replay.directory),
        verdict=_verdict(steps, figures, bool(rounding), tolerance),
        steps=steps,
        surroundings=surroundings.differences(*runs),
        figures=figures,
        tolerance=tolerance,
        rounding=rounding,
        unknown=surroundings.not_known(*runs),
        problems=problems(replay.report),
    )


def _verdict(
    steps: Sequence[ComparedStep], figures: Sequence[ReplayedFigure], may_round_otherwise: bool, tolerance: float | None
) -> str:
    if all(step.same for step in steps):
        return IDENTICAL
    asked_the_same = all(step.same for step in steps if step.part == ASKED)
    if tolerance is None or not asked_the_same or not may_round_otherwise:
        return DIFFERENT
    return WITHIN_TOLERANCE if all(_is_within(figure, tolerance) for figure in figures) else DIFFERENT


def _is_within(figure: ReplayedFigure, tolerance: float) -> bool:
    return math.isfinite(figure.original) and math.isfinite(figure.replay) and abs(figure.change) <= tolerance
