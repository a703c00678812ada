"""Compares what two runs have measured: counts and words exactly, floats to nine digits.

NaN equals NaN here, as a run that measures it again is the same run. Knows no tolerance.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jointq_cli.records import MEASURED, ComparedStep, ReplayedMetric, RunReport
from jointq_cli.report.number_format import before_after, plural, relative_change, significant
from jointq_cli.report.reproduction.finished_run import FinishedRun
from jointq_cli.report.reproduction.order import block_name, position

ROUNDING = 1e-9  # relative: of float64 sums whose order depends on the threads; one changed code has a larger effect

Record = dict[str, Any]
METRICS: dict[str, Callable[[RunReport], float]] = {
    "original perplexity": lambda report: report.original.value,
    "quantised perplexity": lambda report: report.quantized.value,
    "KL divergence": lambda report: report.comparison.kl_divergence,
}


def layers(original: FinishedRun, replay: FinishedRun) -> ComparedStep:
    return _records("layers", _layers(original.report), _layers(replay.report), original.report)


def blocks(original: FinishedRun, replay: FinishedRun) -> ComparedStep:
    return _records("blocks", _blocks(original.report), _blocks(replay.report), original.report)


def audit(original: FinishedRun, replay: FinishedRun) -> ComparedStep:
    return _records("audit", _audit(original.report), _audit(replay.report))


def reload_check(original: FinishedRun, replay: FinishedRun) -> ComparedStep:
    ours, theirs = original.report.reload_check, replay.report.reload_check
    return ComparedStep(
        "reload check", MEASURED, ours == theirs, ours if ours == theirs else before_after(ours, theirs)
    )


def simulation(original: FinishedRun, replay: FinishedRun) -> ComparedStep:
    """Activations and their clip ratios."""
    if original.report.simulation is None and replay.report.simulation is None:
        return ComparedStep("simulation", MEASURED, True, "none")
    return _records("simulation", _simulation(original.report), _simulation(replay.report))


def likelihoods(original: FinishedRun, replay: FinishedRun) -> ComparedStep:
    """Log-likelihoods, top-1 agreement and standard errors."""
    return _records("likelihoods", _likelihoods(original.report), _likelihoods(replay.report))


def replayed_metrics(original: FinishedRun, replay: FinishedRun) -> list[ReplayedMetric]:
    """The measurements to which a tolerance applies."""
    pairs = {name: (value(original.report), value(replay.report)) for name, value in METRICS.items()}
    return [ReplayedMetric(name, ours, theirs, _change(ours, theirs)) for name, (ours, theirs) in pairs.items()]


def metric_step(metric: ReplayedMetric) -> ComparedStep:
    if abs(metric.change) <= ROUNDING:
        detail = f"{significant(metric.original)}{_rounding(abs(metric.change))}"
        return ComparedStep(metric.name, MEASURED, True, detail)
    return ComparedStep(metric.name, MEASURED, False, _values(metric.original, metric.replay))


def _layers(report: RunReport) -> dict[str, Record]:
    """Without their times, and their labels, which older reports lack."""
    records = {layer.name: _flat(dataclasses.asdict(layer), "notes") for layer in report.layers}
    return {
        name: {key: value for key, value in record.items() if key not in ("seconds", "label")}
        for name, record in records.items()
    }


def _blocks(report: RunReport) -> dict[str, Record]:
    return {block_name(block.block): dataclasses.asdict(block) for block in report.blocks}


def _audit(report: RunReport) -> dict[str, Record]:
    return {"audit": dataclasses.asdict(report.audit)}


def _simulation(report: RunReport) -> dict[str, Record]:
    if report.simulation is None:
        return {}
    return {"simulation": _flat(dataclasses.asdict(report.simulation), "clip_ratios")}


def _likelihoods(report: RunReport) -> dict[str, Record]:
    """Without METRICS, which are steps of their own."""
    records = {
        "original": dataclasses.asdict(report.original),
        "quantised": dataclasses.asdict(report.quantized),
        "comparison": dataclasses.asdict(report.comparison),
    }
    return {
        name: {key: value for key, value in record.items() if key not in ("value", "kl_divergence")}
        for name, record in records.items()
    }


def _flat(record: Record, field: str) -> Record:
    """The record with the entries of one dictionary field as fields of their own."""
    rest = {key: value for key, value in record.items() if key != field}
    return rest | {f"{field}.{name}": value for name, value in record[field].items()}


def _records(
    name: str, ours: dict[str, Record], theirs: dict[str, Record], order: RunReport | None = None
) -> ComparedStep:
    """order: a report with the order of the layers and blocks that the records are about, None for other records."""
    gaps = {key: _record_gaps(ours.get(key, {}), theirs.get(key, {})) for key in ours | theirs}
    differing = [key for key, found in gaps.items() if max(found.values(), default=0.0) > ROUNDING]
    if differing:
        first = differing[0]
        key = next(key for key, gap in gaps[first].items() if gap > ROUNDING)
        values = _values(*(side.get(first, {}).get(key) for side in (ours, theirs)))
        where = f"{len(differing)} of {len(gaps)}, {first} first" if len(gaps) > 1 else first
        return ComparedStep(
            name, MEASURED, False, f"{where}: {key} {values}", None if order is None else position(first, order)
        )
    largest = max((gap for found in gaps.values() for gap in found.values()), default=0.0)
    return ComparedStep(name, MEASURED, True, f"{plural(len(gaps), 'record')}{_rounding(largest)}")


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
