"""The jobs of a sweep over `jointq quantize` or `jointq evaluate`, what each of them measured, and how they rank.

Knows the files of a job and which measurements are comparable. Knows no table and no markup.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from jointq_cli.errors import JointqError
from jointq_cli.records import Comparison, Coverage, EvaluationReport, Perplexity, Protocol, RunReport, TaskRecord
from jointq_cli.report import summary
from jointq_cli.report.compare.run_files import EVALUATION, REPORT
from jointq_cli.system.record_json import load_record, load_report
from jointq_cli.system.sweep_directory import DONE, JobRecord, SweepDirectory

Measure = Literal["KL divergence", "perplexity"]  # by which jobs are ranked; the least is best


@dataclass(frozen=True)
class SweepMeasurement:
    """What jobs are compared by. None: not measured by this command."""

    protocol: Protocol
    original: str  # the reference model, "" for none: results against different references are not comparable
    original_perplexity: float | None
    perplexity: Perplexity
    comparison: Comparison | None
    bits_per_weight: float | None
    peak_memory: int | None
    seconds: float
    coverage: Coverage | None = None
    warnings: list[str] = field(default_factory=list)
    tasks: list[TaskRecord] = field(default_factory=list)
    is_reference: bool = False  # the model is the reference itself, and its KL divergence no result

    def value(self, measure: Measure) -> tuple[float, float]:
        """A measurement and its standard error, which a single window leaves unknown: infinite. The KL divergence is
        NaN without an original, and from an engine that gives no logits."""
        value, error = self.perplexity.value, self.perplexity.standard_error
        if measure == "KL divergence":
            found = self.comparison
            value, error = (found.kl_divergence, found.kl_divergence_standard_error) if found else (math.nan, math.nan)
        return value, error if self.protocol.windows > 1 else math.inf

    @property
    def has_divergence(self) -> bool:
        return not math.isnan(self.value("KL divergence")[0])

    @property
    def increase(self) -> tuple[float, float]:
        """Relative increase of perplexity, and its standard error; NaN without an original."""
        if self.comparison is None or not self.original_perplexity:
            return math.nan, math.nan
        ratio = self.perplexity.value / self.original_perplexity
        return ratio - 1, ratio * self.comparison.nll_increase_standard_error


@dataclass(frozen=True)
class SweepJob:
    """A job, and what it measured if it is done."""

    number: int
    settings: dict[str, str]
    record: JobRecord
    measured: SweepMeasurement | None


@dataclass(frozen=True)
class Ranking:
    """The best job and those that the measurements do not distinguish from it.

    Two jobs are distinguishable where they differ by more than the sum of their standard errors. Both were measured on
    the same text; the sum is an upper bound of the standard error of their paired difference, which takes the scores
    of every window.
    """

    measure: Measure
    best: SweepJob | None  # the first of equals; None where no job has a result, or jobs were measured unlike
    near: list[SweepJob] = field(default_factory=list)  # not distinguishable from the best
    unlike: list[str] = field(default_factory=list)  # what differs between the measurements of jobs


def load_jobs(directory: SweepDirectory, numbers: Iterable[int] | None = None) -> list[SweepJob]:
    """All jobs of a sweep, or some. A report that cannot be read counts as none."""
    settings = directory.plan().settings
    chosen = range(len(settings)) if numbers is None else numbers
    return [_load_job(directory, number, settings[number]) for number in chosen]


def finite(jobs: Sequence[SweepJob]) -> list[SweepJob]:
    """The jobs with a finite perplexity."""
    return [job for job in jobs if job.measured and math.isfinite(job.measured.perplexity.value)]


def ranking(jobs: Sequence[SweepJob]) -> Ranking:
    """By KL divergence where all jobs have one, else by perplexity. The reference itself is not ranked."""
    measured = [(job, job.measured) for job in finite(jobs) if job.measured]
    with_divergence = [found.has_divergence for _, found in measured]
    measure: Measure = "KL divergence" if measured and all(with_divergence) else "perplexity"
    values = [(job, *found.value(measure)) for job, found in measured if not found.is_reference]
    if (different := _unlike(jobs)) or not values:
        return Ranking(measure, None, unlike=different)
    best, least, error = min(values, key=lambda each: each[1])
    near = [job for job, value, own in values if job is not best and value - least <= error + own]
    return Ranking(measure, best, near)


def _unlike(jobs: Sequence[SweepJob]) -> list[str]:
    """What differs between the measurements of jobs, so that they do not compare: parts of the protocol, or the model
    that each was measured against."""
    measured = [job.measured for job in jobs if job.measured]
    parts = [
        part.name for part in fields(Protocol) if len({getattr(each.protocol, part.name) for each in measured}) > 1
    ]
    return [*(["model"] if len({each.original for each in measured}) > 1 else []), *parts]


def _load_job(directory: SweepDirectory, number: int, settings: dict[str, str]) -> SweepJob:
    record = directory.record(number)
    measured = (
        _measured(directory.run(number)) if record.state == DONE else None
    )  # otherwise left by an earlier attempt
    return SweepJob(number, settings, record, measured)


def _measured(run: Path) -> SweepMeasurement | None:
    with suppress(JointqError):
        return _of_run(load_report(run / REPORT))
    with suppress(JointqError):
        return _of_evaluation(load_record(EvaluationReport, run / EVALUATION))
    return None


def _of_run(report: RunReport) -> SweepMeasurement:
    return SweepMeasurement(
        protocol=report.protocol,
        original=report.model_hash,
        original_perplexity=report.original.value,
        perplexity=report.quantized,
        comparison=report.comparison,
        bits_per_weight=report.bits_per_weight,
        peak_memory=report.peak_memory,
        seconds=summary.total_seconds(report),
        coverage=report.coverage,
        warnings=report.warnings,
        tasks=report.tasks,
    )


def _of_evaluation(report: EvaluationReport) -> SweepMeasurement:
    """`original` is the reference, not the model: such a sweep compares several models."""
    value, comparison = report.perplexity.value, report.comparison
    return SweepMeasurement(
        protocol=report.protocol,
        original=report.reference or "",
        original_perplexity=value / math.exp(comparison.nll_increase) if comparison else None,
        perplexity=report.perplexity,
        comparison=comparison,
        bits_per_weight=None,
        peak_memory=None,
        seconds=summary.total_seconds(report),
        warnings=report.warnings,
        tasks=report.tasks,
        is_reference=report.engine is None
        and comparison is not None
        and (report.model == report.reference or comparison.kl_divergence == 0),
    )
