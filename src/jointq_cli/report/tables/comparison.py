"""Several runs side by side: those of `jointq compare`, or the jobs of a sweep."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter

from jointq_cli.records import RunReport
from jointq_cli.report import summary
from jointq_cli.report.comparison import MOST_DETAILED, ComparedRun, RunComparison
from jointq_cli.report.grouping import grouped
from jointq_cli.report.measured import KINDS, kind_of
from jointq_cli.report.number_format import MISSING, listed, plural, scientific, shortest_suffixes
from jointq_cli.report.tables.glossary import explained
from jointq_cli.report.tables.table import BEST_MARK, TableDocument, TextTable
from jointq_cli.system.sweep_directory import DONE

Cell = Callable[[ComparedRun], str]  # what it says of a run
NEAR_MARK = " ~"
SIZE = "bits_per_weight"
MOST_NAMED = 8  # runs in one sentence
LIVE = ("perplexity", "perplexity_increase", "kl", "seconds")  # in the line of a job, while a sweep runs


def comparison_document(comparison: RunComparison, title: str = "") -> TableDocument:
    """title: by default how many runs of which models."""
    models = dict.fromkeys(report.model for report in comparison.reports)
    detailed = len(comparison.solved) <= MOST_DETAILED and comparison.common_layers
    document = TableDocument(
        title=title or f"{plural(len(comparison.runs), comparison.noun)} of {' and '.join(models)}",
        headline=_headline(comparison),
        warnings=_warnings(comparison),
        notes=_notes(comparison),
        first_tables=[_runs(comparison)],
        tables=[_errors(comparison)] if detailed else [],
    )
    return explained(document)


def job_line(job: ComparedRun, settings: str, width: int) -> str:
    """What a sweep prints when a job ends. settings: as text, in a column of this width."""
    shown = [f"{KINDS[name].label} {_text(job, name)}" for name in LIVE if name in job.figures]
    state = [] if job.record.state == DONE else [f"{job.record.state}: {job.record.error or 'no result'}"]
    return "  ".join([f"{job.name:>3}", f"{settings:<{width}}", *shown, *state])


def _named(comparison: RunComparison, chosen: Sequence[ComparedRun]) -> str:
    """ "job 3", "jobs 1, 2", "both jobs", "all 8 jobs"."""
    noun = comparison.noun if len(chosen) == 1 else f"{comparison.noun}s"
    if len(chosen) == len(comparison.runs) > 1:
        return f"both {noun}" if len(chosen) == 2 else f"all {len(chosen)} {noun}"
    return f"{noun} {listed([run.name for run in chosen], MOST_NAMED)}"


def _headline(comparison: RunComparison) -> str:
    noun, ranked = comparison.noun, comparison.ranking
    done = sum(run.record.state == DONE for run in comparison.runs)  # rotations leave no report
    so_far = "" if done == len(comparison.runs) else f"{done} of {plural(len(comparison.runs), noun)} done. "
    label, best = KINDS[ranked.figure].label, ranked.best
    if comparison.unlike:
        return f"{so_far}These {noun}s do not compare: they differ in {', '.join(comparison.unlike)}."
    if best is None:
        return f"{so_far}No {label} to compare."
    result = _text(best, ranked.figure)
    if ranked.figure != "perplexity":
        result += f", perplexity {_text(best, 'perplexity')}"
    if "perplexity_increase" in best.figures:
        result += f" ({_text(best, 'perplexity_increase')})"
    near = f" Not distinguishable from it: {_named(comparison, ranked.near)} ({_reason(ranked.near)})."
    where = f"{noun} {comparison.label(best)}{_size_of_best(comparison, best)}"
    return f"{so_far}Least {label} in {where}: {result}.{near if ranked.near else ''}"


def _size_of_best(comparison: RunComparison, best: ComparedRun) -> str:
    """Where runs differ in it, since more bits err less: ", with 4.16 bits per weight (jobs have 2.16 to 4.16)"."""
    sized = sorted((run for run in comparison.finished if SIZE in run.figures), key=lambda run: run.figures[SIZE].value)
    texts = [_text(run, SIZE) for run in sized]
    if len(set(texts)) < 2 or best not in sized:
        return ""
    return f", with {_text(best, SIZE)} bits per weight ({comparison.noun}s have {texts[0]} to {texts[-1]})"


def _reason(near: Sequence[ComparedRun]) -> str:
    """Why runs are not distinguishable from the best one."""
    if any(run.error("kl") == math.inf for run in near):
        return "a single window gives no standard error"
    return "within the sum of both standard errors, an upper bound of the paired one"


def _warnings(comparison: RunComparison) -> list[str]:
    """What was not measured alike; then errors and warnings, each text once with the runs that have it."""
    warnings = []
    for key, values in comparison.unlike.items():
        members = grouped(zip(values, comparison.finished, strict=True), lambda pair: pair[0] or "none")
        parts = [f"{value} in {_named(comparison, [run for _, run in pairs])}" for value, pairs in members.items()]
        warnings.append(f"{key}: {'; '.join(parts)}")
    said = [(f" {run.record.state}: {run.record.error}", run) for run in comparison.runs if run.record.error]
    for run in comparison.finished:
        said += [(f": {text}", run) for text in dict.fromkeys(run.report.warnings if run.report else [])]
    by_text = grouped(said, lambda each: each[0])
    return warnings + [f"{_named(comparison, [run for _, run in each])}{text}" for text, each in by_text.items()]


def _notes(comparison: RunComparison) -> list[str]:
    finished, ranked = comparison.finished, comparison.ranking
    notes = [f"protocol: {line}" for line in sorted({report.protocol.line() for report in comparison.reports})]
    originals = sorted({_text(run, "original_perplexity") for run in finished if "original_perplexity" in run.figures})
    notes += [f"perplexity of the original: {', '.join(originals)}"] if originals else []
    if ranked.best is not None:
        label = KINDS[ranked.figure].label
        notes.append(f"* the least {label}; chosen on this text, it is a little too good for any other")
    if ranked.near:
        notes.append(f"~ not distinguishable from it: {_reason(ranked.near)}")
    if comparison.references:
        notes.append(f"not ranked: {_named(comparison, comparison.references)}, the reference itself")
    if unfinished := [run for run in comparison.runs if run.report is None and not run.record.error]:
        notes.append(f"without a result: {_named(comparison, unfinished)}")
    notes += _reused(comparison)
    if len({report.calibration for report in comparison.reports if isinstance(report, RunReport)}) > 1:
        notes.append("calibration differs: the errors of layers and blocks were measured on different inputs")
    return notes


def _reused(comparison: RunComparison) -> list[str]:
    """What times leave out."""
    counts = {run.name: summary.reused_stages(run.report.stages) for run in comparison.finished if run.report}
    members = grouped((run for run in comparison.finished if counts[run.name]), lambda run: counts[run.name])
    texts = [f"{count} in {_named(comparison, runs)}" for count, runs in members.items()]
    return [f"times leave out stages whose results were reused: {'; '.join(texts)}"] if texts else []


def _runs(comparison: RunComparison) -> TextTable:
    """A row per run: its settings, figures and state."""
    ranked = comparison.ranking

    def cell(run: ComparedRun, name: str) -> str:
        if name != ranked.figure or ranked.best is None:
            return _text(run, name)
        return _text(run, name) + (BEST_MARK if run is ranked.best else NEAR_MARK if run in ranked.near else "  ")

    names = [name for run in comparison.finished for name in run.figures if kind_of(name).label]
    columns: dict[str, Cell] = {kind_of(name).label: partial(cell, name=name) for name in [*KINDS, *names]}
    if any(run.record.state != DONE for run in comparison.runs):
        columns["state"] = attrgetter("record.state")
    return _table(f"{comparison.noun}s".capitalize(), comparison, comparison.runs, columns)


def _errors(comparison: RunComparison) -> TextTable:
    def error(run: ComparedRun, kind: str) -> str:
        return scientific(errors[kind][comparison.solved.index(run)])

    def accumulated(run: ComparedRun) -> str:
        return scientific(run.blocks[-1].output_error) if run.blocks else MISSING

    errors = comparison.kind_errors()
    columns: dict[str, Cell] = {kind: partial(error, kind=kind) for kind in errors}
    common = plural(len(comparison.common_layers), "layer")
    which = "all" if comparison.solved == comparison.finished else "these"
    title = f"E_y by kind: medians over {common} that {which} {comparison.noun}s have"
    return _table(title, comparison, comparison.solved, columns | {"accumulated": accumulated})


def _table(
    title: str, comparison: RunComparison, runs: Sequence[ComparedRun], columns: Mapping[str, Cell]
) -> TextTable:
    """A row per run: its name, the settings in which runs differ and that one of these has, and `columns` by
    heading."""

    def setting(run: ComparedRun, key: str) -> str:
        return run.settings.get(key, MISSING)

    names = dict(zip(shortest_suffixes(comparison.keys), comparison.keys, strict=True))
    has = {key for run in runs for key in run.settings}
    settings = {name: partial(setting, key=key) for name, key in names.items() if key in has}
    all_columns: dict[str, Cell] = {comparison.noun: attrgetter("name"), **settings, **columns}
    return TextTable.of(title, runs, all_columns, stub=1 + len(settings)).filled()


def _text(run: ComparedRun, name: str) -> str:
    return kind_of(name).text(run.figures[name]) if name in run.figures else MISSING
