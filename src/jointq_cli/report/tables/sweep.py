"""The tables of a sweep: one line per job while it runs, and a document with all jobs.

Knows jobs and what they measured. Knows no markup and no terminal.
"""

from collections.abc import Sequence

from jointq_cli.report import summary
from jointq_cli.report.compare.sweep import SweepJob, best, unlike
from jointq_cli.report.number_format import (
    MISSING,
    duration,
    percent,
    plural,
    relative_change,
    shortest_suffixes,
    significant,
)
from jointq_cli.report.tables.table import BEST_MARK, GAP, Cell, TableDocument, TextTable
from jointq_cli.system.sweep_directory import DONE

METRICS = (("perplexity", 14), ("increase", 16), ("KL divergence", 19), ("time", 11))  # with their column widths


class SweepRows:
    """The table that grows while a sweep runs. Its columns are wide enough for the settings of all jobs."""

    def __init__(self, settings: Sequence[dict[str, str]]) -> None:
        keys = _keys(settings)
        headings = shortest_suffixes(keys)
        self._keys = keys
        self._widths = [
            max(len(heading), *(len(job.get(key, MISSING)) for job in settings))
            for heading, key in zip(headings, keys, strict=True)
        ]
        self.heading = self._line("job", headings, [name for name, _ in METRICS])

    def row(self, job: SweepJob) -> str:
        """One line, and a second one with the error of a job that failed."""
        values = [job.settings.get(key, MISSING) for key in self._keys]
        line = self._line(str(job.number), values, _metrics(job))
        error = f"\n     {job.record.state}: {job.record.error}" if job.record.error else ""
        state = "" if job.record.state == DONE or error else f"  {job.record.state}"
        return line + state + error

    def _line(self, number: str, settings: Sequence[str], metrics: Sequence[str]) -> str:
        left = [f"{text:<{width}}" for text, width in zip(settings, self._widths, strict=True)]
        right = [f"{text:>{width}}" for text, (_, width) in zip(metrics, METRICS, strict=True)]
        return (" " * GAP).join([f"{number:>3}", *left, *right]).rstrip()


def sweep_document(name: str, jobs: Sequence[SweepJob]) -> TableDocument:
    """name: the recipe's."""
    chosen = best(jobs)
    return TableDocument(
        title=f"{name}: sweep of {plural(len(jobs), 'job')}",
        headline=_headline(chosen, jobs),
        warnings=[
            *(f"job {job.number} {job.record.state}: {job.record.error}" for job in jobs if job.record.error),
            *(f"job {job.number}: {text}" for job in jobs if job.measured for text in job.measured.warnings),
        ],
        notes=_notes(jobs, chosen),
        tables=[_jobs(jobs, chosen)],
    )


def _headline(chosen: SweepJob | None, jobs: Sequence[SweepJob]) -> str:
    done = sum(job.record.state == DONE for job in jobs)
    so_far = "" if done == len(jobs) else f"{done} of {plural(len(jobs), 'job')} done. "
    if different := unlike(jobs):
        return f"{so_far}No best job: results do not compare, since the jobs differ in {', '.join(different)}."
    if chosen is None or chosen.measured is None:
        return f"{so_far}No perplexity to compare."
    keys = shortest_suffixes(list(chosen.settings))
    settings = ", ".join(f"{key}={value}" for key, value in zip(keys, chosen.settings.values(), strict=True))
    perplexity, increase = _metrics(chosen)[:2]
    against = f", {increase}" if chosen.measured.comparison else ""
    return (
        f"{so_far}Least perplexity in job {chosen.number}{f' ({settings})' if settings else ''}: {perplexity}{against}."
    )


def _notes(jobs: Sequence[SweepJob], chosen: SweepJob | None) -> list[str]:
    protocols = {job.measured.protocol.line() for job in jobs if job.measured}
    notes = [f"protocol: {line}" for line in sorted(protocols)]
    if chosen is not None:
        mark = BEST_MARK.strip()
        notes.append(f"{mark} the least perplexity; chosen on this text, it is a little too good for any other")
    if any(job.measured and job.measured.comparison for job in jobs):
        notes.append("increase: against the original, ± the standard error of the paired difference")
    return notes


def _jobs(jobs: Sequence[SweepJob], chosen: SweepJob | None) -> TextTable:
    keys = _keys([job.settings for job in jobs])
    metrics = ["perplexity", "increase", "KL divergence", "top-1", "bits/weight", "bits/model", "time", "state"]
    tasks = list(dict.fromkeys(task.name for job in jobs if job.measured for task in job.measured.tasks))
    rows = [
        [
            Cell(str(job.number)),
            *(Cell(job.settings.get(key, MISSING)) for key in keys),
            *_cells(job, job is chosen),
            *_task_cells(job, tasks),
        ]
        for job in jobs
    ]
    return TextTable("Jobs", 1 + len(keys), ["job", *shortest_suffixes(keys), *metrics, *tasks], rows)


def _cells(job: SweepJob, is_best: bool) -> list[Cell]:
    perplexity, increase, divergence, time = _metrics(job)
    measured = job.measured
    top1 = percent(measured.comparison.top1_agreement) if measured and measured.comparison else MISSING
    bits = significant(measured.bits_per_weight, 3) if measured and measured.bits_per_weight else MISSING
    model = significant(measured.coverage.checkpoint_bits, 3) if measured and measured.coverage else MISSING
    mark = BEST_MARK if is_best else " " * len(BEST_MARK)
    texts = [increase, divergence, top1, bits, model, time, job.record.state]
    return [Cell(perplexity + mark, is_best), *map(Cell, texts)]


def _task_cells(job: SweepJob, names: Sequence[str]) -> list[Cell]:
    scores = {task.name: task.score for task in job.measured.tasks} if job.measured else {}
    return [Cell(summary.task_score_text(scores.get(name))) for name in names]


def _metrics(job: SweepJob) -> list[str]:
    """The values of METRICS as text."""
    measured = job.measured
    seconds = job.record.seconds or (measured.seconds if measured else 0)
    time = duration(seconds) if seconds else MISSING
    if measured is None:
        return [MISSING, MISSING, MISSING, time]
    perplexity = summary.perplexity_text(measured.perplexity)
    if measured.comparison is None:
        return [perplexity, MISSING, MISSING, time]
    return [perplexity, relative_change(*measured.increase), summary.kl_text(measured.comparison), time]


def _keys(settings: Sequence[dict[str, str]]) -> list[str]:
    return list(dict.fromkeys(key for job in settings for key in job))
