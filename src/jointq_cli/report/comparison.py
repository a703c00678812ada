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
        return {} if self.report is None else figures(self.report) | costs(self.report)

    def figure(self, name: str) -> Figure:
        """NaN where it was not measured."""
        return self.figures.get(name, Figure(math.nan))

    def error(self, name: str) -> float:
        """The standard error of a figure, which a single window leaves unknown: infinite."""
        if self.report is None or self.report.protocol.windows == 1:
            return math.inf
        if name == "perplexity" and "nll_increase" in self.figures:
            return self.figure(name).value * self.figure("nll_increase").error
        return self.figure(name).error

    @property
    def layers(self) -> list[LayerRecord]:
        return self.report.layers if isinstance(self.report, RunReport) else []

    @property
    def blocks(self) -> list[BlockRecord]:
        return self.report.blocks if isinstance(self.report, RunReport) else []

    @property
    def original(self) -> str:
        """The model that it is compared with, "" for none. An evaluation may compare several models with one."""
        if isinstance(self.report, EvaluationReport):
            return self.report.reference or ""
        return self.report.model_hash if self.report else ""

    @property
    def evaluated(self) -> str:
        """The hash of the model that jointq itself has evaluated; "" for other runs."""
        report = self.report
        return report.model_hash if isinstance(report, EvaluationReport) and not report.engine else ""

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
    """Several runs. noun: what they are called."""

    runs: Sequence[ComparedRun]
    noun: str = "run"

    @cached_property
    def finished(self) -> list[ComparedRun]:
        return [run for run in self.runs if run.report is not None]

    @property
    def reports(self) -> list[Report]:
        return [run.report for run in self.runs if run.report is not None]

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
        reports = self.reports
        hashes = [{task.task: task.task_hash for task in report.tasks} for report in reports]
        hash_of = {each.model: each.model_hash for each in reports if isinstance(each, RunReport)}
        values = {"model": [hash_of.get(run.original, run.original) for run in self.finished]}
        values |= {part.name: [str(getattr(each.protocol, part.name)) for each in reports] for part in fields(Protocol)}
        values |= {f"task {name}": [each.get(name, "") for each in hashes] for each in hashes for name in each}
        return {key: each for key, each in values.items() if len(set(each) - {""}) > 1}

    @cached_property
    def references(self) -> list[ComparedRun]:
        """Evaluations of the reference itself, or of the model that other runs have quantised."""
        hashes = {each.model_hash for each in self.reports if isinstance(each, RunReport)}
        return [run for run in self.finished if run.is_reference or run.evaluated in hashes]

    @cached_property
    def ranking(self) -> Ranking:
        """The reference itself is not ranked."""
        measured = [run for run in self.finished if math.isfinite(run.figure("perplexity").value)]
        ranked = [run for run in measured if run not in self.references]
        judged = ranked or measured
        name = "kl" if judged and all(math.isfinite(run.figure("kl").value) for run in judged) else "perplexity"
        if self.unlike or not ranked:
            return Ranking(name)
        best = min(ranked, key=lambda run: run.figure(name).value)
        gaps = [run.figure(name).value - best.figure(name).value - run.error(name) - best.error(name) for run in ranked]
        near = [run for run, gap in zip(ranked, gaps, strict=True) if run is not best and not gap > 0]
        return Ranking(name, best, tuple(near))

    def label(self, run: ComparedRun) -> str:
        """Its name and the settings that set it apart, at most a few: "2 (quantizer=rtn, bits=3)"; those that all runs
        have come first, and what older runs lack and others do not use is left out."""
        lacking = {key for key in self.keys if any(key not in other.settings for other in self.runs)}
        keys = [key for key in self.keys if not (key in lacking and run.settings.get(key) in UNSET)]
        names = dict(zip(self.keys, shortest_suffixes(self.keys), strict=True))
        texts = [f"{names[key]}={run.settings.get(key)}" for key in sorted(keys, key=lambda key: key in lacking)]
        return f"{run.name} ({listed(texts, MOST_SETTINGS)})" if texts else run.name

    @cached_property
    def solved(self) -> list[ComparedRun]:
        """The finished runs that have layers; evaluations have none."""
        return [run for run in self.finished if run.layers]

    @cached_property
    def common_layers(self) -> list[str]:
        """The layers that all of these have, in the order of the first."""
        names = [{layer.name for layer in run.layers} for run in self.solved]
        return [
            layer.name for run in self.solved[:1] for layer in run.layers if all(layer.name in each for each in names)
        ]

    def kind_errors(self) -> dict[str, list[float]]:
        """By kind of layer, the median output error in each run that has layers, over those that all have: others would
        make it incomparable."""
        common = set(self.common_layers)
        runs = [grouped((each for each in run.layers if each.name in common), _kind) for run in self.solved]
        kinds = runs[0] if runs else {}
        return {kind: [statistics.median(each.output_error for each in run[kind]) for run in runs] for kind in kinds}

    def _differs(self, key: str) -> bool:
        """A key that some runs lack differs, unless they chose another option of its group, as RTN has no damping, are
        of a command without it, or those that have it ask for nothing by it, as older runs did."""
        if len({run.settings[key] for run in self.runs if key in run.settings}) > 1:
            return True
        group = key.partition(".")[0]
        another_option = group != key and len({run.settings.get(group) for run in self.runs}) > 1
        asks = any(run.settings.get(key, "null") not in UNSET for run in self.runs)
        commands = {type(run.report) for run in self.runs if key in run.settings}
        lacking = any(key not in run.settings and type(run.report) in commands for run in self.runs)
        return asks and lacking and not another_option


def _kind(layer: LayerRecord) -> str:
    return layer.kind
