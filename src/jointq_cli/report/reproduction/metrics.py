"""Compares what two runs have measured: counts and words exactly, floats to nine digits.

NaN equals NaN here, as a run that measures it again is the same run. Knows no tolerance.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from jointq_cli.records import MEASURED, ComparedStep, ReplayedMetric, RunReport
from jointq_cli.report.number_format import before_after, plural, relative_change, significant
from jointq_cli.report.reproduction.finished_run import FinishedRun, block_name

ROUNDING = 1e-9  # relative: of float64 sums whose order depends on the threads; one changed code has a larger effect

Record = dict[str, Any]
METRICS: dict[str, Callable[[RunReport], float]] = {
    "original perplexity": lambda report: report.original.value,
    "quantised perplexity": lambda report: report.quantized.value,
    "KL divergence": lambda report: report.comparison.kl_divergence,
}


def _without(record: Record, *names: str) -> Record:
    return {key: value for key, value in record.items() if key not in names}


def _flat(record: Record, field: str) -> Record:
    """The record with the entries of one dictionary field as fields of their own."""
    return _without(record, field) | {f"{field}.{name}": value for name, value in (record[field] or {}).items()}


# Without times, without labels, which older reports lack, and without METRICS, which are steps of their own.
RECORDS: dict[str, Callable[[RunReport], dict[str, Record]]] = {
    "layers": lambda report: {
        layer.name: _without(_flat(asdict(layer), "notes"), "seconds", "label") for layer in report.layers
    },
    "blocks": lambda report: {block_name(block.block): asdict(block) for block in report.blocks},
    "audit": lambda report: {"audit": asdict(report.audit)},
    "simulation": lambda report: (
        {"simulation": _flat(asdict(report.simulation), "clip_ratios")} if report.simulation else {}
    ),
    "tasks": lambda report: {task.name: _flat(_flat(asdict(task), "score"), "original") for task in report.tasks},
    "likelihoods": lambda report: {
        "original": _without(asdict(report.original), "value"),
        "quantised": _without(asdict(report.quantized), "value"),
        "comparison": _without(asdict(report.comparison), "kl_divergence"),
    },
}
IN_MODEL_ORDER = ("layers", "blocks")


def compare_records(name: str, original: FinishedRun, replay: FinishedRun) -> ComparedStep:
    """name: of RECORDS."""
    ours, theirs = (RECORDS[name](run.report) for run in (original, replay))
    gaps = {key: _record_gaps(ours.get(key, {}), theirs.get(key, {})) for key in ours | theirs}
    differing = [key for key, found in gaps.items() if max(found.values(), default=0.0) > ROUNDING]
    if differing:
        first = differing[0]
        key = next(key for key, gap in gaps[first].items() if gap > ROUNDING)
        values = _values(*(side.get(first, {}).get(key) for side in (ours, theirs)))
        where = f"{len(differing)} of {len(gaps)}, {first} first" if len(gaps) > 1 else first
        position = original.position(first) if name in IN_MODEL_ORDER else None
        return ComparedStep(name, MEASURED, False, f"{where}: {key} {values}", position)
    largest = max((gap for found in gaps.values() for gap in found.values()), default=0.0)
    return ComparedStep(name, MEASURED, True, f"{plural(len(gaps), 'record')}{_rounding(largest)}" if gaps else "none")


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
    if abs(metric.change) <= ROUNDING:
        detail = f"{significant(metric.original)}{_rounding(abs(metric.change))}"
        return ComparedStep(metric.name, MEASURED, True, detail)
    return ComparedStep(metric.name, MEASURED, False, _values(metric.original, metric.replay))


def _values(ours: Any, theirs: Any) -> str:
    if isinstance(ours, float) and isinstance(theirs, float):
        values = before_after(significant(ours), significant(theirs))
        return f"{values} ({_change_in_words(_change(ours, theirs))})"
    return before_after(*(value if value is None else str(value) for value in (ours, theirs)))


def _record_gaps(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
    return {key: _gap(ours.get(key), theirs.get(key)) for key in dict.fromkeys([*ours, *theirs])}


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


def _change_in_words(change: float) -> str:
    """In enough digits that it does not look like zero."""
    return relative_change(change) if abs(change) >= 1e-4 else f"{change:+.1e}"
