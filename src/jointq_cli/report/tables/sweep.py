"""The tables of a sweep: one line per job while it runs, and a document with all jobs."""

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
from jointq_cli.report.tables.table import BEST_MARK, GAP, TableDocument, TextTable
from jointq_cli.system.sweep_directory import DONE

METRICS = {"perplexity": 14, "increase": 16, "KL divergence": 19, "time": 11}  # with their column widths
NEAR_MARK = " ~"
MOST_NUMBERS = 8  # of jobs in one sentence


class SweepRows:
    """The table that grows while a sweep runs. Its columns are wide enough for the settings of all jobs."""

    def __init__(self, settings: Sequence[dict[str, str]]) -> None:
        self._keys = _keys(settings)
        names = shortest_suffixes(self._keys)
        self._widths = [
            max(len(name), *(len(job.get(key, MISSING)) for job in settings))
            for name, key in zip(names, self._keys, strict=True)
        ]
        self.heading = self._line("job", names, list(METRICS))

    def row(self, job: SweepJob) -> str:
        """One line, and a second one with the error of a job that failed."""
        line = self._line(str(job.number), [job.settings.get(key, MISSING) for key in self._keys], _metrics(job))
        if job.record.error:
            return f"{line}\n     {job.record.state}: {job.record.error}"
        return line if job.record.state == DONE else f"{line}  {job.record.state}"

    def _line(self, number: str, settings: Sequence[str], metrics: Sequence[str]) -> str:
        left = [f"{text:<{width}}" for text, width in zip(settings, self._widths, strict=True)]
        right = [f"{text:>{width}}" for text, width in zip(metrics, METRICS.values(), strict=True)]
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
    best = ranked.best
    if best is None or best.measured is None:
        return f"{so_far}No {ranked.measure} to compare."
    keys = shortest_suffixes(list(best.settings))
    settings = ", ".join(f"{key}={value}" for key, value in zip(keys, best.settings.values(), strict=True))
    perplexity, increase, divergence, _ = _metrics(best)
    result = perplexity if ranked.measure == "perplexity" else f"{divergence}, perplexity {perplexity}"
    against = f" ({increase})" if best.measured.comparison else ""
    near = f" Not distinguishable from it: {_named(ranked.near, jobs)} ({_reason(ranked)})." if ranked.near else ""
    job = f"job {best.number}{f' ({settings})' if settings else ''}"
    return f"{so_far}Least {ranked.measure} in {job}: {result}{against}.{near}"


def _reason(ranked: Ranking) -> str:
    """Why jobs are not distinguishable from the best one."""
    if any(job.measured and job.measured.protocol.windows == 1 for job in ranked.near):
        return "a single window gives no standard error"
    return "within the sum of both standard errors, an upper bound of the paired one"


def _warnings(jobs: Sequence[SweepJob]) -> list[str]:
    """Errors and warnings, each text once with the jobs that have it."""
    errors = [(f" {job.record.state}: {job.record.error}", job) for job in jobs if job.record.error]
    warned = [(f": {text}", job) for job in jobs if job.measured for text in dict.fromkeys(job.measured.warnings)]
    by_text = grouped([*errors, *warned], lambda each: each[0])
    return [f"{_named([job for _, job in members], jobs)}{text}" for text, members in by_text.items()]


def _named(chosen: Sequence[SweepJob], jobs: Sequence[SweepJob]) -> str:
    """ "job 3", "jobs 1, 2", "both jobs", "all 8 jobs"."""
    if len(chosen) == len(jobs) > 1:
        return "both jobs" if len(jobs) == 2 else f"all {len(jobs)} jobs"
    return f"{'job' if len(chosen) == 1 else 'jobs'} {listed([str(job.number) for job in chosen], MOST_NUMBERS)}"


def _notes(jobs: Sequence[SweepJob], ranked: Ranking) -> list[str]:
    notes = [f"protocol: {line}" for line in sorted({job.measured.protocol.line() for job in jobs if job.measured})]
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
        [str(job.number), *(job.settings.get(key, MISSING) for key in keys), *_cells(job, ranked), *_scores(job, tasks)]
        for job in jobs
    ]
    return TextTable("Jobs", ["job", *shortest_suffixes(keys), *metrics, *tasks], rows, 1 + len(keys)).filled()


def _cells(job: SweepJob, ranked: Ranking) -> list[str]:
    perplexity, increase, divergence, time = _metrics(job)
    measured = job.measured
    found = measured.comparison if measured and measured.has_divergence else None
    top1 = percent(found.top1_agreement) if found else MISSING
    bits = significant(measured.bits_per_weight, 3) if measured and measured.bits_per_weight else MISSING
    model = significant(measured.coverage.checkpoint_bits, 3) if measured and measured.coverage else MISSING
    cells = [perplexity, increase, divergence, top1, bits, model, time, job.record.state]
    mark = BEST_MARK if job is ranked.best else NEAR_MARK if job in ranked.near else " " * len(BEST_MARK)
    cells[0 if ranked.measure == "perplexity" else 2] += mark
    return cells


def _scores(job: SweepJob, tasks: Sequence[str]) -> list[str]:
    scores = {task.name: task.score for task in job.measured.tasks} if job.measured else {}
    return [summary.task_score_text(scores.get(name)) for name in tasks]


def _metrics(job: SweepJob) -> list[str]:
    """The values of METRICS as text."""
    measured = job.measured
    seconds = job.record.seconds or (measured.seconds if measured else 0)
    perplexity = summary.perplexity_text(measured.perplexity) if measured else MISSING
    found = measured.comparison if measured else None
    increase = relative_change(*measured.increase) if measured and found else MISSING
    divergence = summary.kl_text(found) if measured and found and measured.has_divergence else MISSING
    return [perplexity, increase, divergence, duration(seconds) if seconds else MISSING]


def _keys(settings: Sequence[dict[str, str]]) -> list[str]:
    return list(dict.fromkeys(key for job in settings for key in job))
