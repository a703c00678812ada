"""The jobs of a sweep with what each of them measured, by `jointq quantize` or by `jointq evaluate`, and the best one.

Knows where a job's report lies and what makes two figures comparable. Knows no rows and no markup.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jointq_cli.errors import JointqError
from jointq_cli.records import Comparison, EvaluationReport, Perplexity, Protocol, RunReport
from jointq_cli.report.compare import summary
from jointq_cli.report.compare.run_files import EVALUATION, REPORT
from jointq_cli.system.record_json import load_record, load_report
from jointq_cli.system.sweep_directory import DONE, JobRecord, SweepDirectory


@dataclass(frozen=True)
class SweepMeasurement:
    """What jobs are compared by. None: not measured by this command."""

    protocol: Protocol
    original: str  # what is measured against, "" for nothing: figures of two originals do not compare
    original_perplexity: float | None
    perplexity: Perplexity
    comparison: Comparison | None
    bits_per_weight: float | None
    peak_memory: int | None
    seconds: float

    @property
    def increase(self) -> tuple[float, float]:
        """Relative increase of perplexity, and its standard error; NaN without an original."""
        if self.comparison is None or not self.original_perplexity:
            return math.nan, math.nan
        ratio = self.perplexity.value / self.original_perplexity
        return ratio - 1, ratio * self.comparison.nll_increase_standard_error


@dataclass(frozen=True)
class SweepJob:
    """A job, and what it measured once it is done."""

    number: int
    settings: dict[str, str]
    record: JobRecord
    measured: SweepMeasurement | None

    @property
    def figure(self) -> float:
        """Perplexity; what cannot be compared is infinite."""
        value = self.measured.perplexity.value if self.measured else math.inf
        return value if math.isfinite(value) else math.inf


def load_jobs(directory: SweepDirectory, numbers: Iterable[int] | None = None) -> list[SweepJob]:
    """All jobs of a sweep, or some. A report that cannot be read counts as none."""
    settings = directory.plan().settings
    chosen = range(len(settings)) if numbers is None else numbers
    return [_load_job(directory, number, settings[number]) for number in chosen]


def best(jobs: Sequence[SweepJob]) -> SweepJob | None:
    """The finished job of the least perplexity among those measured alike with most others; the first where two tie."""
    finished = [job for job in jobs if job.figure < math.inf]
    alike = [(job.measured.protocol, job.measured.original) for job in finished if job.measured]
    if not alike:
        return None
    [(common, _)] = Counter(alike).most_common(1)
    compared = [job for job, identity in zip(finished, alike, strict=True) if identity == common]
    return min(compared, key=lambda job: job.figure)


def _load_job(directory: SweepDirectory, number: int, settings: dict[str, str]) -> SweepJob:
    record = directory.record(number)
    measured = _measured(directory.run(number)) if record.state == DONE else None  # others are of an earlier attempt
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
    )


def _of_evaluation(report: EvaluationReport) -> SweepMeasurement:
    """Of several models, since these are what such a sweep compares."""
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
    )
