"""The tables of a sweep: one line per job while it runs, and a document with all jobs.

Knows jobs and what they measured. Knows no markup and no terminal.
"""

from collections.abc import Sequence

from jointq_cli.report import summary
from jointq_cli.report.compare.sweep import Ranking, SweepJob, ranking
from jointq_cli.report.grouping import grouped
from jointq_cli.report.number_format import (
    MISSING,
    duration,
    listed,
    percent,
    plural,
    relative_change,
    shortest_suffixes,
    significant,
)
from jointq_cli.report.tables.table import BEST_MARK, GAP, Cell, TableDocument, TextTable
from jointq_cli.system.sweep_directory import DONE

METRICS = (("perplexity", 14), ("increase", 16), ("KL divergence", 19), ("time", 11))  # with their column widths
NEAR_MARK = " ~"
MOST_NUMBERS = 8  # of jobs in one sentence


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
    ranked = ranking(jobs)
    return TableDocument(
        title=f"{name}: sweep of {plural(len(jobs), 'job')}",
        headline=_headline(ranked, jobs),
        warnings=_warnings(jobs),
        notes=_notes(jobs, ranked),
        tables=[_jobs(jobs, ranked)],
    )


def _headline(ranked: Ranking, jobs: Sequence[SweepJob]) -> str:
    done = sum(job.record.state == DONE for job in jobs)
    so_far = "" if done == len(jobs) else f"{done} of {plural(len(jobs), 'job')} done. "
    if ranked.unlike:
        return f"{so_far}No best job: results do not compare, since the jobs differ in {', '.join(ranked.unlike)}."
    chosen = ranked.best
    if chosen is None or chosen.measured is None:
        return f"{so_far}No {ranked.measure} to compare."
    keys = shortest_suffixes(list(chosen.settings))
    settings = ", ".join(f"{key}={value}" for key, value in zip(keys, chosen.settings.values(), strict=True))
    perplexity, increase, divergence, _ = _metrics(chosen)
    by_perplexity = ranked.measure == "perplexity"
    against = f" ({increase})" if chosen.measured.comparison else ""
    result = f"{perplexity}{against}" if by_perplexity else f"{divergence}, perplexity {perplexity}{against}"
    near = f" Not distinguishable from it: {_named(ranked.near, jobs)} ({_reason(ranked)})." if ranked.near else ""
    job = f"job {chosen.number}{f' ({settings})' if settings else ''}"
    return f"{so_far}Least {ranked.measure} in {job}: {result}.{near}"


def _reason(ranked: Ranking) -> str:
    """Why jobs are not distinguishable from the best one."""
    if any(job.measured and job.measured.protocol.windows == 1 for job in ranked.near):
        return "a single window gives no standard error"
    return "within the sum of both standard errors, an upper bound of the paired one"


def _warnings(jobs: Sequence[SweepJob]) -> list[str]:
    """Errors and warnings, each text once with the jobs that have it."""
    failed = [job for job in jobs if job.record.error]
    errors = grouped(failed, lambda job: f"{job.record.state}: {job.record.error}")
    warned = [(text, job) for job in jobs if job.measured for text in dict.fromkeys(job.measured.warnings)]
    return [
        *(f"{_named(members, jobs)} {text}" for text, members in errors.items()),
        *(
            f"{_named([job for _, job in members], jobs)}: {text}"
            for text, members in grouped(warned, lambda each: each[0]).items()
        ),
    ]


def _named(chosen: Sequence[SweepJob], jobs: Sequence[SweepJob]) -> str:
    """ "job 3", "jobs 1, 2", "all 8 jobs"."""
    if len(chosen) == len(jobs) > 1:
        return f"all {len(jobs)} jobs"
    return f"{'job' if len(chosen) == 1 else 'jobs'} {listed([str(job.number) for job in chosen], MOST_NUMBERS)}"


def _notes(jobs: Sequence[SweepJob], ranked: Ranking) -> list[str]:
    protocols = {job.measured.protocol.line() for job in jobs if job.measured}
    notes = [f"protocol: {line}" for line in sorted(protocols)]
    if ranked.best is not None:
        mark = BEST_MARK.strip()
        notes.append(f"{mark} the least {ranked.measure}; chosen on this text, it is a little too good for any other")
    if ranked.near:
        notes.append(f"{NEAR_MARK.strip()} not distinguishable from it: {_reason(ranked)}")
    if references := [job for job in jobs if job.measured and job.measured.is_reference]:
        notes.append(f"not ranked: {_named(references, jobs)}, the reference itself")
    if any(job.measured and job.measured.comparison for job in jobs):
        notes.append("increase: against the original, ± the standard error of the paired difference")
    return notes


def _jobs(jobs: Sequence[SweepJob], ranked: Ranking) -> TextTable:
    keys = _keys([job.settings for job in jobs])
    metrics = ["perplexity", "increase", "KL divergence", "top-1", "bits/weight", "bits/model", "time", "state"]
    tasks = list(dict.fromkeys(task.name for job in jobs if job.measured for task in job.measured.tasks))
    rows = [
        [
            Cell(str(job.number)),
            *(Cell(job.settings.get(key, MISSING)) for key in keys),
            *_cells(job, ranked),
            *_task_cells(job, tasks),
        ]
        for job in jobs
    ]
    return TextTable("Jobs", 1 + len(keys), ["job", *shortest_suffixes(keys), *metrics, *tasks], rows)


def _cells(job: SweepJob, ranked: Ranking) -> list[Cell]:
    perplexity, increase, divergence, time = _metrics(job)
    measured = job.measured
    found = measured.comparison if measured and measured.has_divergence else None
    top1 = percent(found.top1_agreement) if found else MISSING
    bits = significant(measured.bits_per_weight, 3) if measured and measured.bits_per_weight else MISSING
    model = significant(measured.coverage.checkpoint_bits, 3) if measured and measured.coverage else MISSING
    mark = BEST_MARK if job is ranked.best else NEAR_MARK if job in ranked.near else " " * len(BEST_MARK)
    texts = [perplexity, increase, divergence, top1, bits, model, time, job.record.state]
    cells = list(map(Cell, texts))
    column = 0 if ranked.measure == "perplexity" else 2
    cells[column] = Cell(texts[column] + mark, job is ranked.best)
    return cells


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
    divergence = summary.kl_text(measured.comparison) if measured.has_divergence else MISSING
    return [perplexity, relative_change(*measured.increase), divergence, time]


def _keys(settings: Sequence[dict[str, str]]) -> list[str]:
    return list(dict.fromkeys(key for job in settings for key in job))
