"""A sweep as rows: one job to a row while it runs, all of them as a sheet, which of them is best.

Knows the records of jobs and of runs. Knows no markup and no terminal; what runs have in common is `sheet`'s.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from jointq_cli.errors import JointqError
from jointq_cli.records import RunReport
from jointq_cli.report import summary, units
from jointq_cli.report.json_form import load_report
from jointq_cli.report.runs import REPORT
from jointq_cli.report.sheet import BEST, GAP, MISSING, Cell, Grid, Sheet, tails
from jointq_cli.sweep_directory import DONE, JobRecord, SweepDirectory

FIGURES = (("perplexity", 14), ("increase", 16), ("KL divergence", 19), ("time", 11))  # widths of a live row


@dataclass(frozen=True)
class SweepJob:
    """A job, and what it measured once it is done."""

    number: int
    settings: dict[str, str]
    record: JobRecord
    report: RunReport | None

    @property
    def figure(self) -> float:
        """Perplexity; what cannot be compared is infinite."""
        value = self.report.quantized.value if self.report else math.inf
        return value if math.isfinite(value) else math.inf


def load_jobs(directory: SweepDirectory, numbers: Iterable[int] | None = None) -> list[SweepJob]:
    """All jobs of a sweep, or some. A report that cannot be read counts as none."""
    settings = directory.plan().settings
    chosen = range(len(settings)) if numbers is None else numbers
    return [_load_job(directory, number, settings[number]) for number in chosen]


def best(jobs: Sequence[SweepJob]) -> SweepJob | None:
    """The finished job of the least perplexity among those measured alike with most others; the first where two tie."""
    finished = [job for job in jobs if job.figure < math.inf]
    alike = [(job.report.protocol, job.report.model_hash) for job in finished if job.report]
    if not alike:
        return None
    [(common, _)] = Counter(alike).most_common(1)
    compared = [job for job, identity in zip(finished, alike, strict=True) if identity == common]
    return min(compared, key=lambda job: job.figure)


class Rows:
    """The table that grows while a sweep runs: its columns are as wide as the settings of all jobs need."""

    def __init__(self, settings: Sequence[dict[str, str]]) -> None:
        keys = _keys(settings)
        heads = tails(keys)
        self._keys = keys
        self._widths = [
            max(len(head), *(len(job.get(key, MISSING)) for job in settings))
            for head, key in zip(heads, keys, strict=True)
        ]
        self.heading = self._line("job", heads, [name for name, _ in FIGURES])

    def row(self, job: SweepJob) -> str:
        """One line, and a second one where something went wrong."""
        values = [job.settings.get(key, MISSING) for key in self._keys]
        line = self._line(str(job.number), values, _figures(job))
        error = f"\n     {job.record.state}: {job.record.error}" if job.record.error else ""
        state = "" if job.record.state == DONE or error else f"  {job.record.state}"
        return line + state + error

    def _line(self, number: str, settings: Sequence[str], figures: Sequence[str]) -> str:
        left = [f"{text:<{width}}" for text, width in zip(settings, self._widths, strict=True)]
        right = [f"{text:>{width}}" for text, (_, width) in zip(figures, FIGURES, strict=True)]
        return (" " * GAP).join([f"{number:>3}", *left, *right]).rstrip()


def make_sweep_sheet(name: str, jobs: Sequence[SweepJob]) -> Sheet:
    """name: the recipe's."""
    chosen = best(jobs)
    ended = [job for job in jobs if job.record.state == DONE]
    failed = [job for job in jobs if job.record.error]
    return Sheet(
        title=f"{name}: sweep of {units.plural(len(jobs), 'job')}",
        headline=_headline(chosen, jobs, len(ended)),
        warnings=[f"job {job.number} {job.record.state}: {job.record.error}" for job in failed],
        notes=_notes(jobs, chosen),
        grids=[_grid(jobs, chosen)],
    )


def _headline(chosen: SweepJob | None, jobs: Sequence[SweepJob], done: int) -> str:
    so_far = "" if done == len(jobs) else f"{done} of {units.plural(len(jobs), 'job')} done. "
    if chosen is None or chosen.report is None:
        return f"{so_far}No perplexity to compare."
    at = ", ".join(f"{head}={value}" for head, value in _told(chosen))
    perplexity, increase = _figures(chosen)[:2]
    return f"{so_far}Least perplexity in job {chosen.number}{f' ({at})' if at else ''}: {perplexity}, {increase}."


def _told(job: SweepJob) -> Iterable[tuple[str, str]]:
    return zip(tails(list(job.settings)), job.settings.values(), strict=True)


def _notes(jobs: Sequence[SweepJob], chosen: SweepJob | None) -> list[str]:
    protocols = {job.report.protocol.line() for job in jobs if job.report}
    models = {job.report.model_hash for job in jobs if job.report}
    notes = [f"protocol: {line}" for line in sorted(protocols)]
    if len(protocols) > 1 or len(models) > 1:
        notes.append("these jobs were not all measured alike: only figures of one model and protocol compare")
    if chosen is not None:
        notes.append(f"{BEST.strip()} the least perplexity; chosen on this text, it is a little too good for any other")
        notes.append("increase: against the original, ± the standard error of the paired difference")
    return notes


def _grid(jobs: Sequence[SweepJob], chosen: SweepJob | None) -> Grid:
    keys = _keys([job.settings for job in jobs])
    heading = ["job", *tails(keys), "perplexity", "increase", "KL divergence", "top-1", "bits/weight", "time", "state"]
    rows = [
        [
            Cell(str(job.number)),
            *(Cell(job.settings.get(key, MISSING)) for key in keys),
            *_cells(job, job is chosen),
        ]
        for job in jobs
    ]
    return Grid("Jobs", 1 + len(keys), heading, rows)


def _cells(job: SweepJob, is_best: bool) -> list[Cell]:
    perplexity, increase, divergence, time = _figures(job)
    top1 = units.percent(job.report.comparison.top1_agreement) if job.report else MISSING
    bits = units.significant(job.report.bits_per_weight, 3) if job.report else MISSING
    mark = BEST if is_best else " " * len(BEST)
    texts = [increase, divergence, top1, bits, time, job.record.state]
    return [Cell(perplexity + mark, is_best), *map(Cell, texts)]


def _figures(job: SweepJob) -> list[str]:
    """The texts of FIGURES."""
    if job.report is None:
        return [MISSING, MISSING, MISSING, units.duration(job.record.seconds) if job.record.seconds else MISSING]
    quantized, comparison = job.report.quantized, job.report.comparison
    return [
        units.plus_minus(quantized.value, quantized.standard_error),
        units.change(summary.perplexity_increase(job.report), summary.perplexity_increase_error(job.report)),
        units.plus_minus(comparison.kl_divergence, comparison.kl_divergence_standard_error),
        units.duration(job.record.seconds or summary.total_seconds(job.report)),
    ]


def _keys(settings: Sequence[dict[str, str]]) -> list[str]:
    return list(dict.fromkeys(key for job in settings for key in job))


def _load_job(directory: SweepDirectory, number: int, settings: dict[str, str]) -> SweepJob:
    record = directory.record(number)
    report = None
    if record.state == DONE:  # any other report is that of an earlier attempt
        with suppress(JointqError):
            report = load_report(directory.run(number) / REPORT)
    return SweepJob(number, settings, record, report)
