"""What differs between runs: settings, protocols, the errors of their layers.

Knows the records of several runs. Knows no number format, no markup, no file and no terminal.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

from jointq_cli.records import Protocol, RunReport
from jointq_cli.report.grouping import grouped
from jointq_cli.report.number_format import listed, shortest_suffixes
from jointq_cli.report.summary import layers_by_kind
from jointq_cli.setting_rules import UNSET

HOUSEKEEPING = ("name", "description", "output_dir", "store")  # the name of a run and where its files are
MOST_SETTINGS = 4  # in the label of a run


@dataclass(frozen=True)
class ComparedRun:
    """A finished run."""

    name: str  # unique among the compared runs
    report: RunReport
    settings: dict[str, str]  # values as text by dotted key, and the option of a group: "quantizer": "gptq"

    @cached_property
    def output_errors(self) -> dict[str, float]:
        return {layer.name: layer.output_error for layer in self.report.layers}


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

    @property
    def ratios(self) -> list[float]:
        """Of each other run to the reference; 1 if both are equal, also if both are zero."""
        reference, *others = self.errors
        return [1.0 if error == reference else error / reference if reference else math.inf for error in others]

    @property
    def change(self) -> float:
        """The largest |log ratio|: an error of a tenth counts as much as one of ten times."""
        return max((abs(math.log(ratio)) if 0 < ratio < math.inf else math.inf for ratio in self.ratios), default=0.0)


@dataclass(frozen=True)
class RunComparison:
    """Several runs, of which the first is the reference."""

    runs: Sequence[ComparedRun]

    def setting_differences(self) -> list[RunDifference]:
        """The settings that differ; names and directories of the runs only if nothing else does."""
        keys = dict.fromkeys(key for run in self.runs for key in run.settings)
        found = [RunDifference(key, [run.settings.get(key) for run in self.runs]) for key in keys if self._differs(key)]
        return [difference for difference in found if difference.key not in HOUSEKEEPING] or found

    def protocol_differences(self) -> list[RunDifference]:
        """Why metrics of these runs cannot be compared: different models, each part of the protocols that differs, and
        tasks of one name with different samples."""
        reports = [run.report for run in self.runs]
        values: dict[str, list[str | None]] = {
            f"protocol.{part.name}": [str(getattr(report.protocol, part.name)) for report in reports]
            for part in fields(Protocol)
        }
        tasks = dict.fromkeys(task.task for report in reports for task in report.tasks)
        values |= {f"task {name}": [_task_hash(report, name) for report in reports] for name in tasks}
        if len({report.model_hash for report in reports}) > 1:
            values = {"model": [f"{report.model} {report.model_hash}" for report in reports], **values}
        return [RunDifference(key, each) for key, each in values.items() if len(set(each) - {None}) > 1]

    def labels(self) -> list[str]:
        """Each run by its name and the settings that set it apart, at most a few: "2 (quantizer=rtn, bits=3)". Settings
        that all runs have come first."""
        differences = sorted(self.setting_differences(), key=lambda difference: None in difference.values)
        keys = shortest_suffixes([difference.key for difference in differences])
        labels = []
        for index, run in enumerate(self.runs):
            settings = [
                f"{key}={difference.values[index]}"
                for key, difference in zip(keys, differences, strict=True)
                if not (None in difference.values and difference.values[index] in UNSET)
            ]
            labels.append(f"{run.name} ({listed(settings, MOST_SETTINGS)})" if settings else run.name)
        return labels

    def closest(self, count: int) -> "RunComparison":
        """The reference and the runs of least KL divergence, in the order of the runs."""
        others = sorted(self.runs[1:], key=lambda run: run.report.comparison.kl_divergence)[: count - 1]
        return RunComparison([run for run in self.runs if run is self.runs[0] or run in others])

    def best(self, metric: Callable[[RunReport], float]) -> set[int]:
        """The runs with the lowest metric, each among all runs of the same model and protocol. A run that is the only
        one with its model and protocol is not best."""
        reports = [run.report for run in self.runs]
        comparable = grouped(range(len(reports)), lambda index: (reports[index].protocol, reports[index].model_hash))
        found: set[int] = set()
        for members in comparable.values():
            values = {index: metric(reports[index]) for index in members}
            lowest = min(filter(math.isfinite, values.values()), default=None)
            found |= {index for index, value in values.items() if value == lowest and len(members) > 1}
        return found

    def common_layers(self) -> list[str]:
        """The layers that every run has, in the order of the reference."""
        return [name for name, indices in self._owners().items() if len(indices) == len(self.runs)]

    def partial_layers(self) -> dict[tuple[int, ...], list[str]]:
        """The layers that only some runs have, by the indices of these runs."""
        owners = {name: indices for name, indices in self._owners().items() if len(indices) < len(self.runs)}
        return grouped(owners, lambda name: owners[name])

    def kind_errors(self) -> list[LayerErrors]:
        """The median output error by kind, over the layers that every run has: others would make it incomparable."""
        common = set(self.common_layers())
        medians = [
            {
                kind: statistics.median(layer.output_error for layer in members)
                for kind, members in layers_by_kind(
                    layer for layer in run.report.layers if layer.name in common
                ).items()
            }
            for run in self.runs
        ]
        return [LayerErrors(kind, [by_kind.get(kind, math.nan) for by_kind in medians]) for kind in medians[0]]

    def changed_layers(self, count: int) -> list[LayerErrors]:
        """The common layers whose error changed most against the reference in any run; none that did not change."""
        rows = [LayerErrors(name, [run.output_errors[name] for run in self.runs]) for name in self.common_layers()]
        return sorted((row for row in rows if row.change), key=lambda row: row.change, reverse=True)[:count]

    def _differs(self, key: str) -> bool:
        """A key that some runs lack differs, unless they chose another option of its group: RTN has no damping."""
        if len({run.settings[key] for run in self.runs if key in run.settings}) > 1:
            return True
        group = key.partition(".")[0]
        another_option = group != key and len({run.settings.get(group) for run in self.runs}) > 1
        return any(key not in run.settings for run in self.runs) and not another_option

    def _owners(self) -> dict[str, tuple[int, ...]]:
        """By layer, the indices of the runs that have it."""
        names = dict.fromkeys(name for run in self.runs for name in run.output_errors)
        return {name: tuple(i for i, run in enumerate(self.runs) if name in run.output_errors) for name in names}


def _task_hash(report: RunReport, name: str) -> str | None:
    """None where a run has not measured the task."""
    return next((task.task_hash for task in report.tasks if task.task == name), None)


def accumulated_error(report: RunReport) -> float:
    """The relative error of the last block's output; NaN for a run that did not measure it."""
    return report.blocks[-1].output_error if report.blocks else math.nan
