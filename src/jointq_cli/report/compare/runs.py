"""What differs between runs: their settings, their protocols, the errors of their layers. The first is the reference.

Knows the records of several runs and compares. Knows no text form of a number, no markup, no file and no terminal.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

from jointq_cli.records import Protocol, RunReport
from jointq_cli.report.compare import summary

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)
HOUSEKEEPING = ("name", "description", "output_dir", "store")  # what a run is called and where it lies


@dataclass(frozen=True)
class Run:
    """A finished run."""

    name: str  # no other run's
    report: RunReport
    settings: dict[str, str]  # values as text by dotted key, and the option by group, such as "quantizer": "gptq"


@dataclass(frozen=True)
class Difference:
    """Something that is not the same in all runs."""

    key: str
    values: list[str | None]  # one per run, None where a run does not have it


@dataclass(frozen=True)
class ErrorRow:
    """The output errors of a layer, or the median of a kind of layers, one per run."""

    name: str
    errors: list[float]


def setting_differences(runs: Sequence[Run]) -> list[Difference]:
    """The settings that differ; what runs are called and where they lie only if nothing else does."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    found = [Difference(key, [run.settings.get(key) for run in runs]) for key in keys if _differs(key, runs)]
    return [difference for difference in found if difference.key not in HOUSEKEEPING] or found


def _differs(key: str, runs: Sequence[Run]) -> bool:
    """A key that some runs lack differs too, unless its whole group does: RTN has no damping because it is RTN."""
    if len({run.settings[key] for run in runs if key in run.settings}) > 1:
        return True
    group = key.partition(".")[0]
    another_option = group != key and len({run.settings.get(group) for run in runs}) > 1
    return any(key not in run.settings for run in runs) and not another_option


def obstacles(runs: Sequence[Run]) -> list[Difference]:
    """What keeps the runs from comparing: their models and every part of their protocols that differs."""
    models = [f"{run.report.model} {run.report.model_hash}" for run in runs]
    parts = {
        f"protocol.{part.name}": [str(getattr(run.report.protocol, part.name)) for run in runs]
        for part in fields(Protocol)
    }
    same_model = len({run.report.model_hash for run in runs}) == 1
    facts = parts if same_model else {"model": models, **parts}
    return [Difference(key, list(values)) for key, values in facts.items() if len(set(values)) > 1]


def best(runs: Sequence[Run], figure: Callable[[RunReport], float]) -> set[int]:
    """The runs of the least figure, each among all that were measured alike; a run that is alone there is not best."""
    alike = _grouped(range(len(runs)), lambda index: (runs[index].report.protocol, runs[index].report.model_hash))
    return {index for members in alike.values() if len(members) > 1 for index in _least(members, runs, figure)}


def _least(members: Sequence[int], runs: Sequence[Run], figure: Callable[[RunReport], float]) -> list[int]:
    figures = {index: figure(runs[index].report) for index in members}
    least = min((value for value in figures.values() if math.isfinite(value)), default=None)
    return [index for index, value in figures.items() if value == least]


def common_layers(runs: Sequence[Run]) -> list[str]:
    """The layers that every run has, as the reference orders them."""
    others = [_output_errors(run) for run in runs[1:]]
    return [layer.name for layer in runs[0].report.layers if all(layer.name in errors for errors in others)]


def partial_layers(runs: Sequence[Run]) -> dict[tuple[int, ...], list[str]]:
    """The layers that only some runs have, by the runs that have them."""
    owners = [_output_errors(run) for run in runs]
    names = dict.fromkeys(name for errors in owners for name in errors)
    having = _grouped(names, lambda name: tuple(index for index, errors in enumerate(owners) if name in errors))
    return {indices: members for indices, members in having.items() if len(indices) < len(runs)}


def kind_errors(runs: Sequence[Run]) -> list[ErrorRow]:
    """The median error by kind, over the layers that every run has: medians of other layers would not compare."""
    common = set(common_layers(runs))
    kinds = [
        {kind.kind: kind.median_output_error for kind in summary.kind_summaries(layers)}
        for layers in ([layer for layer in run.report.layers if layer.name in common] for run in runs)
    ]
    return [ErrorRow(kind, [medians.get(kind, math.nan) for medians in kinds]) for kind in kinds[0]]


def changed_layers(runs: Sequence[Run], count: int) -> list[ErrorRow]:
    """The common layers whose error changed most against the reference in any run; none that did not change."""
    errors = [_output_errors(run) for run in runs]
    rows = [ErrorRow(name, [by_name[name] for by_name in errors]) for name in common_layers(runs)]
    return sorted((row for row in rows if _change(row)), key=_change, reverse=True)[:count]


def ratio(error: float, reference: float) -> float:
    """1 where both are the same, also where both are zero."""
    if error == reference:
        return 1.0
    return error / reference if reference else math.inf


def accumulated_error(report: RunReport) -> float:
    """The error of the last block's output, NaN for a run that did not measure it."""
    return report.blocks[-1].output_error if report.blocks else math.nan


def _change(row: ErrorRow) -> float:
    """The largest factor between the reference and any other run, as a logarithm: a tenth counts as much as tenfold."""
    return max((_distance(ratio(error, row.errors[0])) for error in row.errors[1:]), default=0.0)


def _distance(factor: float) -> float:
    return abs(math.log(factor)) if math.isfinite(factor) and factor > 0 else math.inf


def _output_errors(run: Run) -> dict[str, float]:
    return {layer.name: layer.output_error for layer in run.report.layers}


def _grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
