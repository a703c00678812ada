"""A sweep as rows: one job to a row while it runs, and all of them as a sheet.

Knows jobs and what they measured. Knows no markup and no terminal; what runs have in common is `sheet`'s.
"""

from collections.abc import Iterable, Sequence

from jointq_cli.report import number_format as units
from jointq_cli.report.compare.sweep import SweepJob, best
from jointq_cli.report.tables.table import BEST, GAP, MISSING, Cell, Sheet, TextTable, tails
from jointq_cli.system.sweep_directory import DONE

FIGURES = (("perplexity", 14), ("increase", 16), ("KL divergence", 19), ("time", 11))  # widths of a live row


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
    if chosen is None or chosen.measured is None:
        return f"{so_far}No perplexity to compare."
    at = ", ".join(f"{head}={value}" for head, value in _told(chosen))
    perplexity, increase = _figures(chosen)[:2]
    against = f", {increase}" if chosen.measured.comparison else ""
    return f"{so_far}Least perplexity in job {chosen.number}{f' ({at})' if at else ''}: {perplexity}{against}."


def _told(job: SweepJob) -> Iterable[tuple[str, str]]:
    return zip(tails(list(job.settings)), job.settings.values(), strict=True)


def _notes(jobs: Sequence[SweepJob], chosen: SweepJob | None) -> list[str]:
    protocols = {job.measured.protocol.line() for job in jobs if job.measured}
    originals = {job.measured.original for job in jobs if job.measured}
    notes = [f"protocol: {line}" for line in sorted(protocols)]
    if len(protocols) > 1 or len(originals) > 1:
        notes.append("these jobs were not all measured alike: only figures of one model and protocol compare")
    if chosen is not None:
        notes.append(f"{BEST.strip()} the least perplexity; chosen on this text, it is a little too good for any other")
    if any(job.measured and job.measured.comparison for job in jobs):
        notes.append("increase: against the original, ± the standard error of the paired difference")
    return notes


def _grid(jobs: Sequence[SweepJob], chosen: SweepJob | None) -> TextTable:
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
    return TextTable("Jobs", 1 + len(keys), heading, rows)


def _cells(job: SweepJob, is_best: bool) -> list[Cell]:
    perplexity, increase, divergence, time = _figures(job)
    measured = job.measured
    top1 = units.percent(measured.comparison.top1_agreement) if measured and measured.comparison else MISSING
    bits = units.significant(measured.bits_per_weight, 3) if measured and measured.bits_per_weight else MISSING
    mark = BEST if is_best else " " * len(BEST)
    texts = [increase, divergence, top1, bits, time, job.record.state]
    return [Cell(perplexity + mark, is_best), *map(Cell, texts)]


def _figures(job: SweepJob) -> list[str]:
    """The texts of FIGURES."""
    measured = job.measured
    seconds = job.record.seconds or (measured.seconds if measured else 0)
    time = units.duration(seconds) if seconds else MISSING
    if measured is None:
        return [MISSING, MISSING, MISSING, time]
    perplexity = units.plus_minus(measured.perplexity.value, measured.perplexity.standard_error)
    if (comparison := measured.comparison) is None:
        return [perplexity, MISSING, MISSING, time]
    divergence = units.plus_minus(comparison.kl_divergence, comparison.kl_divergence_standard_error)
    return [perplexity, units.change(*measured.increase), divergence, time]


def _keys(settings: Sequence[dict[str, str]]) -> list[str]:
    return list(dict.fromkeys(key for job in settings for key in job))
