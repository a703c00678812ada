"""Compares two runs in the order of the pipeline, to find where they first differ, and gives the verdict.

Computed artifacts are compared by the byte. Measurements are compared to nine digits, since their last digits depend on
the order in which threads add. Knows when a tolerance applies; the steps are in `inputs`, `artifacts` and `metrics`.
"""

import math
from collections.abc import Sequence

from jointq_cli.records import (
    DIFFERENT,
    IDENTICAL,
    REQUESTED,
    WITHIN_TOLERANCE,
    ComparedStep,
    ReplayedMetric,
    Reproduction,
)
from jointq_cli.report.reproduction import artifacts, environment, inputs, metrics
from jointq_cli.report.reproduction.finished_run import FinishedRun
from jointq_cli.report.summary import problems
from jointq_cli.setting_rules import SettingRoles


def compare(
    original: FinishedRun, replay: FinishedRun, roles: SettingRoles, tolerance: float | None = None
) -> Reproduction:
    """tolerance: relative, for both perplexities and KL divergence. It applies to runs with the same config on the same
    tokens whose hardware or libraries can round differently. None: the runs must be identical."""
    runs = (original, replay)
    replayed = metrics.replayed_metrics(*runs)
    steps_after_config = [
        *inputs.hashes(*runs),
        artifacts.rotation(*runs),
        artifacts.codes(*runs),
        metrics.compare_records("layers", *runs),
        metrics.compare_records("blocks", *runs),
        artifacts.checkpoint(*runs),
        artifacts.exports(*runs),
        metrics.compare_records("audit", *runs),
        metrics.reload_check(*runs),
        metrics.compare_records("simulation", *runs),
        metrics.compare_records("likelihoods", *runs),
        metrics.compare_records("tasks", *runs),
        *map(metrics.metric_step, replayed),
    ]
    results_are_identical = all(step.same for step in steps_after_config)
    steps = [inputs.config(*runs, roles, results_are_identical), *steps_after_config]
    rounding = environment.rounding_differences(*runs)
    return Reproduction(
        original=str(original.directory),
        replay=str(replay.directory),
        verdict=_verdict(steps, replayed, tolerance if rounding else None),
        steps=steps,
        surroundings=environment.differences(*runs),
        figures=replayed,
        tolerance=tolerance,
        rounding=rounding,
        unknown=environment.unknown(*runs),
        problems=problems(replay.report),
    )


def _verdict(steps: Sequence[ComparedStep], replayed: Sequence[ReplayedMetric], tolerance: float | None) -> str:
    """tolerance: None where none applies."""
    if all(step.same for step in steps):
        return IDENTICAL
    if tolerance is None or not all(step.same for step in steps if step.part == REQUESTED):
        return DIFFERENT
    finite = all(math.isfinite(metric.original) and math.isfinite(metric.replay) for metric in replayed)
    close = all(abs(metric.change) <= tolerance for metric in replayed)
    return WITHIN_TOLERANCE if finite and close else DIFFERENT
