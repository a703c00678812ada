"""Compares what two runs have measured: counts and words exactly, floats to nine digits. NaN equals NaN here, as a run
that measures it again is the same run. Knows no tolerance."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from jointq_cli.records import MEASURED, ComparedStep, ReplayedMetric, RunReport
from jointq_cli.report.number_format import before_after, plural, relative_change, significant
from jointq_cli.report.reproduction.finished_run import FinishedRun, block_name

ROUNDING = 1e-9  # relative: of float64 sums whose order depends on the threads; one changed code has a larger effect
NOT_COMPARED = {"seconds", "label"}  # older reports lack labels
METRICS: dict[str, Callable[[RunReport], float]] = {
    "original perplexity": lambda report: report.original.value,
    "quantised perplexity": lambda report: report.quantized.value,
    "KL divergence": lambda report: report.comparison.kl_divergence,
}
# By the name of the step; without METRICS, which are steps of their own.
RECORDS: dict[str, Callable[[RunReport], dict[str, Any]]] = {
    "layers": lambda report: {layer.name: asdict(layer) for layer in report.layers},
    "blocks": lambda report: {block_name(block.block): asdict(block) for block in report.blocks},
    "audit": lambda report: {"audit": asdict(report.audit)},
    "simulation": lambda report: {"simulation": asdict(report.simulation)} if report.simulation else {},
    "tasks": lambda report: {task.name: asdict(task) for task in report.tasks},
    "likelihoods": lambda report: {
        "original": asdict(report.original) | {"value": None},
        "quantised": asdict(report.quantized) | {"value": None},
        "comparison": asdict(report.comparison) | {"kl_divergence": None},
    },
}


def compare_records(name: str, original: FinishedRun, replay: FinishedRun) -> ComparedStep:
    """name: of RECORDS."""
    ours, theirs = (
        {key: dict(_leaves(value)) for key, value in RECORDS[name](run.report).items()} for run in (original, replay)
    )
    keys, largest = dict.fromkeys([*ours, *theirs]), 0.0
    differing = {}
    for key in keys:
        a, b = ours.get(key, {}), theirs.get(key, {})
        gaps = {leaf: _gap(a.get(leaf), b.get(leaf)) for leaf in dict.fromkeys([*a, *b])}
        largest = max(largest, *gaps.values())
        if wrong := [leaf for leaf, gap in gaps.items() if gap > ROUNDING]:
            differing[key] = f"{wrong[0]} {_values(a.get(wrong[0]), b.get(wrong[0]))}"
    if differing:
        first = next(iter(differing))
        where = f"{len(differing)} of {len(keys)}, {first} first" if len(keys) > 1 else first
        position = original.position(first) if name in ("layers", "blocks") else None
        return ComparedStep(name, MEASURED, False, f"{where}: {differing[first]}", position)
    return ComparedStep(name, MEASURED, True, f"{plural(len(keys), 'record')}{_rounding(largest)}" if keys else "none")


def reload_check(original: FinishedRun, replay: FinishedRun) -> ComparedStep:
    ours, theirs = original.report.reload_check, replay.report.reload_check
    return ComparedStep(
        "reload check", MEASURED, ours == theirs, ours if ours == theirs else before_after(ours, theirs)
    )


def replayed_metrics(original: FinishedRun, replay: FinishedRun) -> list[ReplayedMetric]:
    """The measurements to which a tolerance applies."""
    pairs = {name: (value(original.report), value(replay.report)) for name, value in METRICS.items()}
    return [ReplayedMetric(name, ours, theirs, _change(ours, theirs)) for name, (ours, theirs) in pairs.items()]


def metric_step(metric: ReplayedMetric) -> ComparedStep:
    same = abs(metric.change) <= ROUNDING
    detail = f"{significant(metric.original)}{_rounding(abs(metric.change))}"
    return ComparedStep(metric.name, MEASURED, same, detail if same else _values(metric.original, metric.replay))


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of nested dictionaries by dotted path."""
    if not isinstance(value, dict):
        yield path, value
        return
    for key, item in value.items():
        if key not in NOT_COMPARED:
            yield from _leaves(item, f"{path}.{key}" if path else key)


def _values(ours: Any, theirs: Any) -> str:
    if isinstance(ours, float) and isinstance(theirs, float):
        change = _change(ours, theirs)
        # In enough digits that it does not look like zero.
        text = relative_change(change) if abs(change) >= 1e-4 else f"{change:+.1e}"
        return f"{before_after(significant(ours), significant(theirs))} ({text})"
    return before_after(*(value if value is None else str(value) for value in (ours, theirs)))


def _gap(ours: Any, theirs: Any) -> float:
    """0 for equal values, the relative difference of floats, infinity for anything else that differs."""
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return max(map(_gap, ours, theirs), default=0.0)
    if isinstance(ours, float) and isinstance(theirs, float):
        return abs(_change(ours, theirs))
    return 0.0 if ours == theirs else math.inf


def _change(ours: float, theirs: float) -> float:
    """Relative to `ours`; infinite if that is undefined."""
    if ours == theirs or (math.isnan(ours) and math.isnan(theirs)):
        return 0.0
    change = (theirs - ours) / abs(ours) if ours else math.inf
    return math.inf if math.isnan(change) else change


def _rounding(gap: float) -> str:
    return f", but for sums' last digits: {gap:.0e} at most" if gap else ""
