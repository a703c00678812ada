"""What differs between runs, be they jobs of a sweep or not: settings, protocols, figures, errors of layers."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

from jointq_cli.records import BlockRecord, EvaluationReport, LayerRecord, Protocol, RunReport
from jointq_cli.report.grouping import grouped
from jointq_cli.report.measured import Figure, Report, costs, figures
from jointq_cli.report.number_format import listed, shortest_suffixes
from jointq_cli.setting_rules import UNSET
from jointq_cli.system.sweep_directory import DONE, JobRecord

HOUSEKEEPING = ("name", "description", "output_dir", "store")  # the name of a run and where its files are
MOST_SETTINGS = 4  # in the label of a run
MOST_DETAILED = 16  # runs whose layers are shown


@dataclass(frozen=True)
class ComparedRun:
    """A run of `jointq quantize` or `jointq evaluate`, or a job of a sweep."""

    name: str  # unique among the compared runs
    settings: dict[str, str]  # values as text by dotted key, and the option of a group: "quantizer": "gptq"
    report: Report | None  # None where it has none, or none yet
    record: JobRecord = JobRecord(DONE)  # noqa: RUF009 (frozen)

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """Quality, size and costs, by name."""
        if self.report is None:
            return {}
        found = figures(self.report) | costs(self.report)
        return found | ({"seconds": Figure(self.record.seconds)} if self.record.seconds else {})

    @property
    def state(self) -> str:
        """Of a job, with its error."""
        return f"{self.record.state}: {self.record.error}" if self.record.error else self.record.state

    @property
    def layers(self) -> list[LayerRecord]:
        return self.report.layers if isinstance(self.report, RunReport) else []

    @property
    def blocks(self) -> list[BlockRecord]:
        return self.report.blocks if isinstance(self.report, RunReport) else []

    @property
    def original(self) -> str:
        """The model that it is compared with, "" for none. An evaluation may compare several models with one."""
        if self.report is None or isinstance(self.report, RunReport):
            return self.report.model_hash if self.report else ""
        return self.report.reference or ""

    @property
    def is_reference(self) -> bool:
        """Whether the model is the reference itself, whose KL divergence is no result."""
        report = self.report
        if not isinstance(report, EvaluationReport) or report.engine or report.comparison is None:
            return False
        return report.model == report.reference or report.comparison.kl_divergence == 0


@dataclass(frozen=True)
class Ranking:
    """The best run and those that the measurements do not distinguish from it.

    Two runs are distinguishable where they differ by more than the sum of their standard errors, an upper bound of the
    standard error of their paired difference, which takes the scores of every window. Perplexities have the standard
    error of their difference from the original's, where there is one.
    """

    figure: str  # kl where all runs have one, else perplexity; the least is best
    best: ComparedRun | None = None  # the first of equals; None where no run has a result, or runs were measured unlike
    near: tuple[ComparedRun, ...] = ()  # not distinguishable from the best


@dataclass(frozen=True)
class RunComparison:
    """Several runs, of which the first is the reference. noun: what they are called."""

    runs: Sequence[ComparedRun]
    noun: str = "run"

    @property
    def finished(self) -> list[ComparedRun]:
        return [run for run in self.runs if run.report is not None]

    @cached_property
    def keys(self) -> list[str]:
        """The settings that differ; names and directories of the runs only if nothing else does."""
        keys = dict.fromkeys(key for run in self.runs for key in run.settings)
        found = [key for key in keys if len(self.runs) == 1 or self._differs(key)]
        return [key for key in found if key not in HOUSEKEEPING] or found

    @cached_property
    def unlike(self) -> dict[str, list[str]]:
        """Why figures of these runs do not compare: the values, one per finished run, of what was not alike: the model,
        each part of the protocol, the samples of a task."""
        reports = [run.report for run in self.finished if run.report is not None]
        hashes = [{task.task: task.task_hash for task in report.tasks} for report in reports]
        values = {"model": [run.original for run in self.finished]}
        values |= {part.name: [str(getattr(each.protocol, part.name)) for each in reports] for part in fields(Protocol)}
        values |= {f"task {name}": [each.get(name, "") for each in hashes] for each in hashes for name in each}
        return {key: each for key, each in values.items() if len(set(each) - {""}) > 1}

    @cached_property
    def ranking(self) -> Ranking:
        """The reference itself is not ranked."""
        measured = [run for run in self.finished if math.isfinite(run.figures["perplexity"].value)]
        has_divergence = [math.isfinite(run.figures.get("kl", Figure(math.nan)).value) for run in measured]
        name = "kl" if measured and all(has_divergence) else "perplexity"
        ranked = [run for run in measured if not run.is_reference]
        if self.unlike or not ranked:
            return Ranking(name)
        best = min(ranked, key=lambda run: run.figures[name].value)
        least, error = best.figures[name].value, ranked_error(best, name)
        near = [run for run in ranked if not run.figures[name].value - least > ranked_error(run, name) + error]
        return Ranking(name, best, tuple(run for run in near if run is not best))

    def setting_texts(self, run: ComparedRun) -> list[str]:
        """ "bits=3" for each setting that differs; those that all runs have come first. What older runs lack and others
        do not use is left out."""
        lacking = {key for key in self.keys if any(key not in other.settings for other in self.runs)}
        keys = sorted(self.keys, key=lambda key: key in lacking)
        names = dict(zip(keys, shortest_suffixes(keys), strict=True))
        return [
            f"{names[key]}={run.settings.get(key)}"
            for key in keys
            if not (key in lacking and run.settings.get(key) in UNSET)
        ]

    def label(self, run: ComparedRun) -> str:
        """Its name and the settings that set it apart, at most a few: "2 (quantizer=rtn, bits=3)"."""
        settings = self.setting_texts(run)
        return f"{run.name} ({listed(settings, MOST_SETTINGS)})" if settings else run.name

    def closest(self, count: int) -> "RunComparison":
        """The reference and the runs of least KL divergence, in the order of the runs."""
        first, *others = self.finished
        chosen = sorted(others, key=lambda run: run.figures.get("kl", Figure(math.inf)).value)[: count - 1]
        return RunComparison([run for run in self.finished if run is first or run in chosen], self.noun)

    @cached_property
    def common_layers(self) -> list[str]:
        """The layers that every finished run has, in the order of the reference."""
        names = [{layer.name for layer in run.layers} for run in self.finished]
        return [
            layer.name for run in self.finished[:1] for layer in run.layers if all(layer.name in each for each in names)
        ]

    def kind_errors(self) -> dict[str, list[float]]:
        """By kind of layer, the median output error in each finished run, over the layers that all have: others would
        make it incomparable."""
        common = set(self.common_layers)
        runs = [grouped((each for each in run.layers if each.name in common), _kind) for run in self.finished]
        return {
            kind: [statistics.median(layer.output_error for layer in run[kind]) for run in runs] for kind in runs[0]
        }

    def changed_layers(self, count: int) -> dict[str, list[float]]:
        """The errors, one per finished run, of the layers in which they changed most against the reference; an error of
        a tenth counts as much as one of ten times."""
        errors = [{layer.name: layer.output_error for layer in run.layers} for run in self.finished]
        rows = {name: [each[name] for each in errors] for name in self.common_layers}
        changed = {name: row for name, row in rows.items() if len(set(row)) > 1}
        return dict(sorted(changed.items(), key=lambda entry: -_largest_change(*entry[1]))[:count])

    def _differs(self, key: str) -> bool:
        """A key that some runs lack differs, unless they chose another option of its group: RTN has no damping."""
        if len({run.settings[key] for run in self.runs if key in run.settings}) > 1:
            return True
        group = key.partition(".")[0]
        another_option = group != key and len({run.settings.get(group) for run in self.runs}) > 1
        return any(key not in run.settings for run in self.runs) and not another_option


def ranked_error(run: ComparedRun, name: str) -> float:
    """The standard error that runs are ranked by. A single window leaves it unknown: infinite."""
    assert run.report is not None
    figure = run.figures[name]
    if run.report.protocol.windows == 1:
        return math.inf
    if name == "perplexity" and "nll_increase" in run.figures:
        return figure.value * run.figures["nll_increase"].error
    return figure.error


def _largest_change(reference: float, *others: float) -> float:
    """|log ratio|."""
    changed = [other for other in others if other != reference]
    return max(abs(math.log(other / reference)) if other > 0 < reference else math.inf for other in changed)


def _kind(layer: LayerRecord) -> str:
    return layer.kind
