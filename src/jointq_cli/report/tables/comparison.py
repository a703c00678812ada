"""Several runs side by side: those of `jointq compare`, or the jobs of a sweep."""

import math
from collections.abc import Sequence

from jointq_cli.records import TaskRecord
from jointq_cli.report.comparison import MOST_DETAILED, ComparedRun, RunComparison
from jointq_cli.report.grouping import grouped
from jointq_cli.report.measured import KINDS, TASK
from jointq_cli.report.number_format import MISSING, listed, plural, scientific, shortest_suffixes, significant
from jointq_cli.report.summary import task_change
from jointq_cli.report.tables.glossary import explained
from jointq_cli.report.tables.table import BEST_MARK, TableDocument, TextTable
from jointq_cli.system.sweep_directory import DONE

NEAR_MARK = " ~"
MOST_NAMED = 8  # runs in one sentence
CHANGED_LAYERS = 10
LIVE = ("perplexity", "perplexity_increase", "kl", "seconds")  # in the line of a job, while a sweep runs


def comparison_document(comparison: RunComparison, title: str = "") -> TableDocument:
    """title: by default how many runs of which models."""
    models = dict.fromkeys(run.report.model for run in comparison.finished if run.report)
    detailed = len(comparison.finished) <= MOST_DETAILED and comparison.common_layers
    document = TableDocument(
        title=title or f"{plural(len(comparison.runs), comparison.noun)} of {' and '.join(models)}",
        headline=_headline(comparison),
        warnings=_warnings(comparison),
        notes=_notes(comparison),
        first_tables=[_runs(comparison)],
        tables=[_errors(comparison), _changed(comparison)] if detailed else [],
    )
    return explained(document)


def job_line(job: ComparedRun, settings: str, width: int) -> str:
    """What a sweep prints when a job ends. settings: as text, in a column of this width."""
    shown = [f"{KINDS[name].label} {_text(job, name)}" for name in LIVE if name in job.figures]
    state = [] if job.record.state == DONE else [job.state]
    return "  ".join([f"{job.name:>3}", f"{settings:<{width}}", *shown, *state])


def _named(comparison: RunComparison, chosen: Sequence[ComparedRun]) -> str:
    """ "job 3", "jobs 1, 2", "both jobs", "all 8 jobs"."""
    noun = comparison.noun if len(chosen) == 1 else f"{comparison.noun}s"
    if len(chosen) == len(comparison.runs) > 1:
        return f"both {noun}" if len(chosen) == 2 else f"all {len(chosen)} {noun}"
    return f"{noun} {listed([run.name for run in chosen], MOST_NAMED)}"


def _headline(comparison: RunComparison) -> str:
    noun, done, ranked = comparison.noun, len(comparison.finished), comparison.ranking
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
    return f"{so_far}Least {label} in {noun} {comparison.label(best)}: {result}.{near if ranked.near else ''}"


def _reason(near: Sequence[ComparedRun]) -> str:
    """Why runs are not distinguishable from the best one."""
    if any(run.report is not None and run.report.protocol.windows == 1 for run in near):
        return "a single window gives no standard error"
    return "within the sum of both standard errors, an upper bound of the paired one"


def _warnings(comparison: RunComparison) -> list[str]:
    """What was not measured alike; then errors and warnings, each text once with the runs that have it."""
    warnings = []
    for key, values in comparison.unlike.items():
        members = grouped(zip(values, comparison.finished, strict=True), lambda pair: pair[0] or "none")
        parts = [f"{value} in {_named(comparison, [run for _, run in pairs])}" for value, pairs in members.items()]
        warnings.append(f"{key}: {'; '.join(parts)}")
    said = [(f" {run.state}", run) for run in comparison.runs if run.record.error]
    for run in comparison.finished:
        said += [(f": {text}", run) for text in dict.fromkeys(run.report.warnings if run.report else [])]
    by_text = grouped(said, lambda each: each[0])
    return warnings + [f"{_named(comparison, [run for _, run in each])}{text}" for text, each in by_text.items()]


def _notes(comparison: RunComparison) -> list[str]:
    finished, ranked = comparison.finished, comparison.ranking
    reports = [run.report for run in finished if run.report is not None]
    notes = [f"protocol: {line}" for line in sorted({report.protocol.line() for report in reports})]
    originals = sorted({_text(run, "original_perplexity") for run in finished if "original_perplexity" in run.figures})
    notes += [f"perplexity of the original: {', '.join(originals)}"] if originals else []
    if ranked.best is not None:
        label = KINDS[ranked.figure].label
        notes.append(f"* the least {label}; chosen on this text, it is a little too good for any other")
    if ranked.near:
        notes.append(f"~ not distinguishable from it: {_reason(ranked.near)}")
    if references := [run for run in finished if run.is_reference]:
        notes.append(f"not ranked: {_named(comparison, references)}, the reference itself")
    if any("perplexity_increase" in run.figures for run in finished):
        notes.append("increase: of the perplexity, ± the standard error of the paired difference to the original")
    if unfinished := [run for run in comparison.runs if run.report is None and not run.record.error]:
        notes.append(f"without a result: {_named(comparison, unfinished)}")
    if len({report.calibration for report in reports if hasattr(report, "calibration")}) > 1:
        notes.append("calibration differs: the errors of layers and blocks were measured on different inputs")
    return notes


def _runs(comparison: RunComparison) -> TextTable:
    """A row per run: its settings, figures, scores of tasks with their changes, and its state."""
    ranked = comparison.ranking
    reports = [run.report for run in comparison.finished if run.report is not None]
    tasks = {f"{task.task}/{task.metric}": task.name for report in reports for task in report.tasks}

    def cell(run: ComparedRun, name: str) -> str:
        mark = BEST_MARK if run is ranked.best else NEAR_MARK if run in ranked.near else " " * len(BEST_MARK)
        return _text(run, name) + (mark if name == ranked.figure and ranked.best else "")

    columns = {KINDS[name].label: [cell(run, name) for run in comparison.runs] for name in KINDS}
    for name, heading in tasks.items():
        columns[heading] = [_text(run, name) for run in comparison.runs]
        columns[f"change of {heading}"] = [_change_of(run, heading) for run in comparison.runs]
    columns["state"] = [run.record.state for run in comparison.runs]
    if all(run.record.state == DONE for run in comparison.runs):
        del columns["state"]
    return _table_of_runs(f"{comparison.noun}s".capitalize(), comparison, comparison.runs, columns)


def _errors(comparison: RunComparison) -> TextTable:
    columns = {kind: list(map(scientific, errors)) for kind, errors in comparison.kind_errors().items()}
    last = [run.blocks[-1:] for run in comparison.finished]
    columns["accumulated"] = [scientific(block[0].output_error) if block else MISSING for block in last]
    common = plural(len(comparison.common_layers), "layer")
    title = f"E_y by kind: medians over {common} that all {comparison.noun}s have"
    return _table_of_runs(title, comparison, comparison.finished, columns)


def _changed(comparison: RunComparison) -> TextTable:
    reference, *others = [run.name for run in comparison.finished]
    rows = [
        [name, scientific(first), *(f"{significant(error / first if first else math.inf, 3)} x" for error in errors)]
        for name, (first, *errors) in comparison.changed_layers(CHANGED_LAYERS).items()
    ]
    title = f"Layers whose E_y changed most: how many times that of {comparison.noun} {reference}"
    return TextTable(title, ["layer", f"E_y of {reference}", *others], rows)


def _table_of_runs(
    title: str, comparison: RunComparison, runs: Sequence[ComparedRun], columns: dict[str, list[str]]
) -> TextTable:
    """A row per run: its name, the settings in which it differs, and `columns`, the cells by heading."""
    settings = [[run.settings.get(key, MISSING) for key in comparison.keys] for run in runs]
    cells = [[column[at] for column in columns.values()] for at in range(len(runs))]
    rows = [[run.name, *left, *right] for run, left, right in zip(runs, settings, cells, strict=True)]
    heading = [comparison.noun, *shortest_suffixes(comparison.keys), *columns]
    return TextTable(title, heading, rows, 1 + len(comparison.keys)).filled()


def _text(run: ComparedRun, name: str) -> str:
    figure = run.figures.get(name)
    return MISSING if figure is None else KINDS.get(name, TASK).text(figure)


def _change_of(run: ComparedRun, heading: str) -> str:
    """Of a task, against the original, with the standard error of the paired difference."""
    tasks: dict[str, TaskRecord] = {task.name: task for task in run.report.tasks} if run.report else {}
    return task_change(tasks[heading]) if heading in tasks else ""
