"""What differs between runs: settings, protocols, the errors of their layers. The first run is the reference.

Knows the records of several runs. Knows no number format, no markup, no file and no terminal.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from jointq_cli.records import Protocol, RunReport
from jointq_cli.report import summary
from jointq_cli.report.grouping import grouped
from jointq_cli.report.number_format import shortest_suffixes, text_or_missing

HOUSEKEEPING = ("name", "description", "output_dir", "store")  # the name of a run and where its files are
MOST_LABEL_WIDTH = 48  # characters


@dataclass(frozen=True)
class ComparedRun:
    """A finished run."""

    name: str  # unique among the compared runs
    report: RunReport
    settings: dict[str, str]  # values as text by dotted key, and the option of a group: "quantizer": "gptq"


@dataclass(frozen=True)
class RunDifference:
    """A setting or another property that is not the same in all runs."""

    key: str
    values: list[str | None]  # one per run, None where a run does not have it


@dataclass(frozen=True)
class LayerErrors:
    """The output error of a layer, or the median over a kind of layers, in each run."""

    name: str
    errors: list[float]


def setting_differences(runs: Sequence[ComparedRun]) -> list[RunDifference]:
    """The settings that differ; names and directories of the runs only if nothing else does."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    found = [RunDifference(key, [run.settings.get(key) for run in runs]) for key in keys if _differs(key, runs)]
    return [difference for difference in found if difference.key not in HOUSEKEEPING] or found


def _differs(key: str, runs: Sequence[ComparedRun]) -> bool:
    """A key that some runs lack differs too, unless they chose another option of its group: RTN has no damping."""
    if len({run.settings[key] for run in runs if key in run.settings}) > 1:
        return True
    group = key.partition(".")[0]
    another_option = group != key and len({run.settings.get(group) for run in runs}) > 1
    return any(key not in run.settings for run in runs) and not another_option


def protocol_differences(runs: Sequence[ComparedRun]) -> list[RunDifference]:
    """Why metrics of these runs cannot be compared: different models, and each part of the protocols that differs."""
    models = [f"{run.report.model} {run.report.model_hash}" for run in runs]
    parts = {
        f"protocol.{part.name}": [str(getattr(run.report.protocol, part.name)) for run in runs]
        for part in fields(Protocol)
    }
    same_model = len({run.report.model_hash for run in runs}) == 1
    values_by_key = parts if same_model else {"model": models, **parts}
    return [RunDifference(key, list(values)) for key, values in values_by_key.items() if len(set(values)) > 1]


def run_labels(runs: Sequence[ComparedRun]) -> list[str]:
    """Each run by its name and the settings that set it apart: "2 (quantizer=rtn, bits=3)", cut if too long."""
    differences = setting_differences(runs)
    keys = shortest_suffixes([difference.key for difference in differences])
    labels = []
    for index, run in enumerate(runs):
        values = [difference.values[index] for difference in differences]
        settings = ", ".join(f"{key}={text_or_missing(value)}" for key, value in zip(keys, values, strict=True))
        label = f"{run.name} ({settings})" if settings else run.name
        labels.append(label if len(label) <= MOST_LABEL_WIDTH else f"{label[: MOST_LABEL_WIDTH - 1]}…")
    return labels


def best(runs: Sequence[ComparedRun], metric: Callable[[RunReport], float]) -> set[int]:
    """The runs with the lowest metric, each among all runs of the same model and protocol; a run that is the only one
    of its kind is not best."""
    comparable = grouped(range(len(runs)), lambda index: (runs[index].report.protocol, runs[index].report.model_hash))
    return {index for members in comparable.values() if len(members) > 1 for index in _lowest(members, runs, metric)}


def _lowest(members: Sequence[int], runs: Sequence[ComparedRun], metric: Callable[[RunReport], float]) -> list[int]:
    values = {index: metric(runs[index].report) for index in members}
    lowest = min((value for value in values.values() if math.isfinite(value)), default=None)
    return [index for index, value in values.items() if value == lowest]


def common_layers(runs: Sequence[ComparedRun]) -> list[str]:
    """The layers that every run has, in the order of the reference."""
    others = [_output_errors(run) for run in runs[1:]]
    return [layer.name for layer in runs[0].report.layers if all(layer.name in errors for errors in others)]


def partial_layers(runs: Sequence[ComparedRun]) -> dict[tuple[int, ...], list[str]]:
    """The layers that only some runs have, by the runs that have them."""
    owners = [_output_errors(run) for run in runs]
    names = dict.fromkeys(name for errors in owners for name in errors)
    having = grouped(names, lambda name: tuple(index for index, errors in enumerate(owners) if name in errors))
    return {indices: members for indices, members in having.items() if len(indices) < len(runs)}


def kind_errors(runs: Sequence[ComparedRun]) -> list[LayerErrors]:
    """The median output error by kind, over the layers that every run has: others would make medians incomparable."""
    common = set(common_layers(runs))
    kinds = [
        {kind.kind: kind.median_output_error for kind in summary.kind_summaries(layers)}
        for layers in ([layer for layer in run.report.layers if layer.name in common] for run in runs)
    ]
    return [LayerErrors(kind, [medians.get(kind, math.nan) for medians in kinds]) for kind in kinds[0]]


def changed_layers(runs: Sequence[ComparedRun], count: int) -> list[LayerErrors]:
    """The common layers whose error changed most against the reference in any run; unchanged layers are left out."""
    errors = [_output_errors(run) for run in runs]
    rows = [LayerErrors(name, [by_name[name] for by_name in errors]) for name in common_layers(runs)]
    return sorted((row for row in rows if _change(row)), key=_change, reverse=True)[:count]


def ratio(error: float, reference: float) -> float:
    """error / reference; 1 if both are equal, also if both are zero."""
    if error == reference:
        return 1.0
    return error / reference if reference else math.inf


def accumulated_error(report: RunReport) -> float:
    """The relative error of the last block's output; NaN for a run that did not measure it."""
    return report.blocks[-1].output_error if report.blocks else math.nan


def _change(row: LayerErrors) -> float:
    """The largest |log ratio| between the reference and any other run: a tenth counts as much as tenfold."""
    return max((_log_distance(ratio(error, row.errors[0])) for error in row.errors[1:]), default=0.0)


def _log_distance(ratio: float) -> float:
    return abs(math.log(ratio)) if math.isfinite(ratio) and ratio > 0 else math.inf


def _output_errors(run: ComparedRun) -> dict[str, float]:
    return {layer.name: layer.output_error for layer in run.report.layers}
