"""The figures of a report: measured values with names, which tables, limits, summaries of sweeps, trackers and model
cards share."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from jointq_cli.records import EvaluationReport, RunReport
from jointq_cli.report.number_format import byte_size, duration, percent, plus_minus, relative_change, significant

Report = RunReport | EvaluationReport


class Figure(NamedTuple):
    """A value and its standard error, NaN where it has none."""

    value: float
    error: float = math.nan


@dataclass(frozen=True)
class FigureKind:
    """How figures of one name are shown."""

    label: str
    detail: str  # what it is
    text: Callable[[Figure], str]


def _plain(figure: Figure) -> str:
    return plus_minus(*figure)


def _bits(figure: Figure) -> str:
    return significant(figure.value, 3)


def _size(figure: Figure) -> str:
    return byte_size(int(figure.value))


INCREASE = "of the perplexity, ± standard error of the paired difference"
STORED = "of the quantised layers: packed codes and all that they need"
KINDS = {
    "perplexity": FigureKind("perplexity", "", _plain),
    "perplexity_increase": FigureKind("increase", INCREASE, lambda figure: relative_change(*figure)),
    "kl": FigureKind("KL divergence", "nats per token, original || quantised", _plain),
    "top1_agreement": FigureKind("top-1", "both put the same token first", lambda figure: percent(figure.value)),
    "bits_per_weight": FigureKind("bits/weight", STORED, _bits),
    "bits_per_block_weight": FigureKind("bits/block", "per weight of the blocks, quantised or not", _bits),
    "bits_per_parameter": FigureKind("bits/model", "per parameter of the complete checkpoint", _bits),
    "packed_bytes": FigureKind("packed size", "of the checkpoint", _size),
    "seconds": FigureKind("time", "without stages that were reused", lambda figure: duration(figure.value)),
    "peak_memory": FigureKind("peak memory", "resident set of the process", _size),
}  # in the order in which they are shown
FILES_ALONE = FigureKind("", "", _plain)
FURTHER = dict.fromkeys(["nll_increase", "original_perplexity", "checkpoint_bytes", "coverage"], FILES_ALONE)


def kind_of(name: str) -> FigureKind:
    """Of figures that are only in files, it has no label; those of tasks are shown under their names."""
    return (KINDS | FURTHER).get(name) or FigureKind(name, "", _plain)


def figures(report: Report) -> dict[str, Figure]:
    """What is known of the quality and size of a model, by name; those of tasks are called TASK METRIC."""
    run, comparison = report if isinstance(report, RunReport) else None, report.comparison
    perplexity = report.quantized if isinstance(report, RunReport) else report.perplexity
    found = {"perplexity": Figure(perplexity.value, perplexity.standard_error)}
    if comparison is not None:
        ratio = math.exp(min(comparison.nll_increase, 700.0))  # of more it overflows
        found |= {
            "perplexity_increase": Figure(ratio - 1, ratio * comparison.nll_increase_standard_error),
            "nll_increase": Figure(comparison.nll_increase, comparison.nll_increase_standard_error),
        }
        if run is not None or not math.isnan(comparison.kl_divergence):  # else of an engine that gives no logits
            found["kl"] = Figure(comparison.kl_divergence, comparison.kl_divergence_standard_error)
            found["top1_agreement"] = Figure(comparison.top1_agreement)
    if run is not None:
        found |= {
            "original_perplexity": Figure(run.original.value, run.original.standard_error),
            "bits_per_weight": Figure(run.bits_per_weight),
            "packed_bytes": Figure(run.audit.packed_bytes),
            "checkpoint_bytes": Figure(run.audit.checkpoint_bytes),
        }
        if run.coverage is not None:
            found["coverage"] = Figure(run.coverage.share)
            found["bits_per_parameter"] = Figure(run.coverage.checkpoint_bits)
            if run.coverage.block_bits != run.bits_per_weight:
                found["bits_per_block_weight"] = Figure(run.coverage.block_bits)
    for task in report.tasks:
        found[task.name] = Figure(task.score.value, task.score.standard_error or math.nan)
        if task.original is not None:
            change = task.score.value - task.original.value
            found[f"change of {task.name}"] = Figure(change, task.change_standard_error or math.nan)
    return found


def costs(report: Report) -> dict[str, Figure]:
    """Time, without the stages whose results were reused, and memory."""
    seconds = sum(stage.seconds for stage in report.stages if not stage.reused)
    found = {"seconds": Figure(seconds)}
    return found | ({"peak_memory": Figure(report.peak_memory)} if isinstance(report, RunReport) else {})
