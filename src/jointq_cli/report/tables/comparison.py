"""The tables of `jointq compare`: several runs, one per row, and the layers in which they differ.

Knows which properties of the compared runs are shown and in which order. Knows no markup, no file and no terminal.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from jointq_cli.records import RunReport
from jointq_cli.report import summary
from jointq_cli.report.compare.runs import (
    ComparedRun,
    LayerErrors,
    RunDifference,
    accumulated_error,
    best,
    changed_layers,
    common_layers,
    kind_errors,
    partial_layers,
    protocol_differences,
    ratio,
    run_labels,
    setting_differences,
)
from jointq_cli.report.grouping import grouped
from jointq_cli.report.number_format import (
    MISSING,
    byte_size,
    duration,
    listed,
    multiple,
    percent,
    plural,
    relative_change,
    scientific,
    shortest_suffixes,
    significant,
    text_or_missing,
)
from jointq_cli.report.tables.table import BEST_MARK, Cell, TableDocument, TextTable

QUANTIZE = "quantize"  # the stage that quantises the layers
CHANGED_LAYERS = 10
RATIO_WIDTH = 9  # with the gap before it


def comparison_document(runs: Sequence[ComparedRun], unfinished: Sequence[str]) -> TableDocument:
    """unfinished: paths of runs that were left out."""
    differences = setting_differences(runs)
    incomparable = protocol_differences(runs)
    return TableDocument(
        title=f"{plural(len(runs), 'run')} of {' and '.join(dict.fromkeys(run.report.model for run in runs))}",
        headline="These runs do not compare: they were not measured alike." if incomparable else _headline(runs),
        warnings=[_in_words(difference, runs) for difference in incomparable],
        notes=_notes(runs, unfinished, differences),
        tables=[_metrics(runs, differences), _errors(runs, differences), *_changed(runs)],
    )


def _headline(runs: Sequence[ComparedRun]) -> str:
    labels = run_labels(runs)
    sentences = [
        f"Least {name} in {' and '.join(f'run {labels[index]}' for index in sorted(lowest))}: "
        f"{text(runs[min(lowest)].report)}."
        for name, metric, text in (("KL divergence", _kl, _kl_text), ("perplexity", _perplexity, _perplexity_text))
        if (lowest := best(runs, metric))
    ]
    return " ".join(sentences) or f"{plural(len(runs), 'run')}, of which none is best."


def _notes(runs: Sequence[ComparedRun], unfinished: Sequence[str], differences: Sequence[RunDifference]) -> list[str]:
    keys = ", ".join(difference.key for difference in differences)
    marked = best(runs, _kl) | best(runs, _perplexity)
    same_calibration = len({run.report.calibration for run in runs}) == 1
    last_blocks = [str(run.report.blocks[-1].block) if run.report.blocks else None for run in runs]
    return [
        f"settings that differ: {keys or 'none'}",
        *(["* the least of the runs that were measured alike"] if marked else []),
        *([f"not finished and left out: {', '.join(unfinished)}"] if unfinished else []),
        *(
            []
            if same_calibration
            else ["calibration differs: layer and block errors were measured on different inputs"]
        ),
        *([_in_words(RunDifference("last block", last_blocks), runs)] if len(set(last_blocks)) > 1 else []),
        *(
            f"only {_names(runs, indices)}: {plural(len(layers), 'layer')}, {listed(layers)}"
            for indices, layers in partial_layers(runs).items()
        ),
    ]


def _metrics(runs: Sequence[ComparedRun], differences: Sequence[RunDifference]) -> TextTable:
    columns: list[tuple[str, list[Cell]]] = [
        ("perplexity", _marked(runs, _perplexity, _perplexity_text)),
        ("increase", _column(runs, lambda report: relative_change(*summary.perplexity_increase(report)))),
        ("KL divergence", _marked(runs, _kl, _kl_text)),
        ("top-1", _column(runs, lambda report: percent(report.comparison.top1_agreement))),
        ("bits/weight", _column(runs, lambda report: significant(report.bits_per_weight, 3))),
        ("original", _column(runs, lambda report: summary.perplexity_text(report.original))),
        (QUANTIZE, _column(runs, _quantize_cost)),
        ("total time", _column(runs, lambda report: duration(summary.total_seconds(report)))),
        ("peak memory", _column(runs, lambda report: byte_size(report.peak_memory))),
    ]
    return _table_of_runs("Perplexity, KL divergence and costs", runs, differences, columns)


def _errors(runs: Sequence[ComparedRun], differences: Sequence[RunDifference]) -> TextTable:
    accumulated = LayerErrors("last block", [accumulated_error(run.report) for run in runs])
    columns = [(row.name, _error_cells(row)) for row in [*kind_errors(runs), accumulated]]
    title = (
        f"E_y by kind of layer and accumulated error of the last block, and how many times that of run {runs[0].name}"
    )
    note = f"medians over {plural(len(common_layers(runs)), 'layer')} that all runs have"
    return replace(_table_of_runs(title, runs, differences, columns), note=note, short_stub=True)


def _changed(runs: Sequence[ComparedRun]) -> list[TextTable]:
    changed = changed_layers(runs, CHANGED_LAYERS)
    reference, *others = [run.name for run in runs]
    title = f"Layers whose E_y changed most against run {reference}, and how many times as large it is elsewhere"
    rows = [[Cell(row.name), Cell(scientific(row.errors[0])), *map(Cell, _ratios(row))] for row in changed]
    return [TextTable(title, 1, ["layer", f"E_y of {reference}", *others], rows)] if changed else []


def _table_of_runs(
    title: str,
    runs: Sequence[ComparedRun],
    differences: Sequence[RunDifference],
    columns: Sequence[tuple[str, list[Cell]]],
) -> TextTable:
    """A row per run: its name, the settings in which it differs, and `columns`, as (heading, cells)."""
    keys = shortest_suffixes([difference.key for difference in differences])
    rows = [
        [
            Cell(run.name),
            *(Cell(text_or_missing(difference.values[index])) for difference in differences),
            *(cells[index] for _, cells in columns),
        ]
        for index, run in enumerate(runs)
    ]
    return TextTable(title, 1 + len(differences), ["run", *keys, *(heading for heading, _ in columns)], rows)


def _column(runs: Sequence[ComparedRun], text: Callable[[RunReport], str]) -> list[Cell]:
    return [Cell(text(run.report)) for run in runs]


def _marked(
    runs: Sequence[ComparedRun], metric: Callable[[RunReport], float], text: Callable[[RunReport], str]
) -> list[Cell]:
    lowest = best(runs, metric)
    # Blanks as wide as the mark keep the digits aligned.
    blank = " " * len(BEST_MARK) if lowest else ""
    return [
        Cell(f"{text(run.report)}{BEST_MARK if index in lowest else blank}", index in lowest)
        for index, run in enumerate(runs)
    ]


def _error_cells(row: LayerErrors) -> list[Cell]:
    """The error of each run and, after the reference, its ratio to the reference's."""
    ratios = ["", *_ratios(row)]
    return [Cell(f"{scientific(error)}{text:>{RATIO_WIDTH}}") for error, text in zip(row.errors, ratios, strict=True)]


def _ratios(row: LayerErrors) -> list[str]:
    return [multiple(ratio(error, row.errors[0])) for error in row.errors[1:]]


def _perplexity(report: RunReport) -> float:
    return report.quantized.value


def _perplexity_text(report: RunReport) -> str:
    return summary.perplexity_text(report.quantized)


def _kl(report: RunReport) -> float:
    return report.comparison.kl_divergence


def _kl_text(report: RunReport) -> str:
    return summary.kl_text(report.comparison)


def _quantize_cost(report: RunReport) -> str:
    return next((summary.stage_cost(stage) for stage in report.stages if stage.name == QUANTIZE), MISSING)


def _in_words(difference: RunDifference, runs: Sequence[ComparedRun]) -> str:
    """ "protocol.window: 256 in 2; 512 in the others": by value, the most frequent one last."""
    by_value = grouped(range(len(runs)), lambda index: text_or_missing(difference.values[index]))
    *rare, (common, having_it) = sorted(by_value.items(), key=lambda entry: len(entry[1]))
    others = "the others" if len(having_it) > 1 else _names(runs, having_it)
    parts = [*(f"{value} in {_names(runs, indices)}" for value, indices in rare), f"{common} in {others}"]
    return f"{difference.key}: {'; '.join(parts)}"


def _names(runs: Sequence[ComparedRun], indices: Sequence[int]) -> str:
    return ", ".join(runs[index].name for index in indices)
