"""The tables of `jointq compare`: several runs, one per row, and the layers in which they differ."""

from collections.abc import Callable, Sequence

from jointq_cli.records import RunReport
from jointq_cli.report import number_format, summary
from jointq_cli.report.compare.runs import LayerErrors, RunComparison, RunDifference, accumulated_error
from jointq_cli.report.grouping import grouped
from jointq_cli.report.number_format import MISSING, plural, scientific, shortest_suffixes, significant, text_or_missing
from jointq_cli.report.tables.glossary import meanings
from jointq_cli.report.tables.table import BEST_MARK, TableDocument, TextTable

QUANTIZE = "quantize"  # the stage that quantises the layers
CHANGED_LAYERS = 10
RANKED: dict[str, tuple[Callable[[RunReport], float], Callable[[RunReport], float], Callable[[RunReport], str]]] = {
    "KL divergence": (
        lambda report: report.comparison.kl_divergence,
        lambda report: report.comparison.kl_divergence_standard_error,
        lambda report: summary.kl_text(report.comparison),
    ),
    "perplexity": (
        lambda report: report.quantized.value,
        lambda report: report.quantized.value * report.comparison.nll_increase_standard_error,
        lambda report: summary.perplexity_text(report.quantized),
    ),
}  # value, its standard error (of a perplexity that of the difference to the original) and text; the least is best
RATIO_WIDTH = 9  # with the gap before it


def comparison_document(
    comparison: RunComparison, unfinished: Sequence[str], unreadable: Sequence[str] = ()
) -> TableDocument:
    """unfinished: paths of runs that were left out. unreadable: why others were, a line each."""
    runs, incomparable = comparison.runs, comparison.protocol_differences()
    return TableDocument(
        title=f"{plural(len(runs), 'run')} of {' and '.join(dict.fromkeys(run.report.model for run in runs))}",
        headline="These runs do not compare: they were not measured alike." if incomparable else _headline(comparison),
        warnings=[
            *(f"left out: {reason}" for reason in unreadable),
            *(_in_words(difference, comparison) for difference in incomparable),
        ],
        notes=_notes(comparison, unfinished),
        first_tables=[_metrics(comparison)],
        tables=[_tasks(comparison), _errors(comparison), _changed(comparison)],
    )


def _headline(comparison: RunComparison) -> str:
    labels = comparison.labels()
    sentences = [
        f"Least {name} in {' and '.join(f'run {labels[index]}' for index in sorted(best))}: "
        f"{text(comparison.runs[min(best)].report)}.{_near(comparison, name, min(best))}"
        for name, (metric, _, text) in RANKED.items()
        if (best := comparison.best(metric))
    ]
    return " ".join(sentences) or f"{plural(len(labels), 'run')}, of which none is best."


def _near(comparison: RunComparison, name: str, best: int) -> str:
    """The runs whose value is within the sum of both standard errors of the best one's."""
    metric, error, _ = RANKED[name]
    least, labels = comparison.runs[best].report, comparison.labels()
    alike = (least.protocol, least.model_hash)
    found = [
        labels[index]
        for index, report in enumerate(run.report for run in comparison.runs)
        if index != best
        and (report.protocol, report.model_hash) == alike
        and metric(report) - metric(least) <= error(report) + error(least)
    ]
    return f" Not distinguishable from it: run{'s' * (len(found) > 1)} {', '.join(found)}." if found else ""


def _notes(comparison: RunComparison, unfinished: Sequence[str]) -> list[str]:
    keys = ", ".join(difference.key for difference in comparison.setting_differences())
    reports = [run.report for run in comparison.runs]
    last_blocks = [str(report.blocks[-1].block) if report.blocks else None for report in reports]
    notes = [f"settings that differ: {keys or 'none'}"]
    originals = sorted({summary.perplexity_text(report.original) for report in reports})
    notes.append(f"perplexity of the original: {', '.join(originals)}")
    if any(comparison.best(metric) for metric, _, _ in RANKED.values()):
        notes.append("* the least of the runs that were measured alike")
    if unfinished:
        notes.append(f"not finished and left out: {', '.join(unfinished)}")
    if len({report.calibration for report in reports}) > 1:
        notes.append("calibration differs: the errors of layers and blocks were measured on different inputs")
    if len(set(last_blocks)) > 1:
        notes.append(_in_words(RunDifference("last block", last_blocks), comparison))
    return notes + [
        f"only {_names(comparison, indices)}: {plural(len(layers), 'layer')}, {number_format.listed(layers)}"
        for indices, layers in comparison.partial_layers().items()
    ]


def _metrics(comparison: RunComparison) -> TextTable:
    def column(text: Callable[[RunReport], str]) -> list[str]:
        return [text(run.report) for run in comparison.runs]

    columns = {
        "perplexity": _marked(comparison, "perplexity"),
        "increase": column(lambda report: number_format.relative_change(*summary.perplexity_increase(report))),
        "KL divergence": _marked(comparison, "KL divergence"),
        "top-1": column(lambda report: number_format.percent(report.comparison.top1_agreement)),
        "bits/weight": column(lambda report: significant(report.bits_per_weight, 3)),
        "bits/block": column(_block_bits),
        "bits/model": column(
            lambda report: significant(report.coverage.checkpoint_bits, 3) if report.coverage else MISSING
        ),
        QUANTIZE: column(_quantize_cost),
        "total time": column(lambda report: number_format.duration(summary.total_seconds(report))),
        "peak memory": column(lambda report: number_format.byte_size(report.peak_memory)),
    }
    return _table_of_runs("Perplexity, KL divergence and costs", comparison, columns)


def _tasks(comparison: RunComparison) -> TextTable:
    """Two columns per figure of lm-eval's tasks."""
    figures = [{task.name: task for task in run.report.tasks} for run in comparison.runs]
    names = list(dict.fromkeys(name for run in figures for name in run))
    scores = {
        name: [summary.task_score_text(run[name].score if name in run else None) for run in figures] for name in names
    }
    changes = {f"change of {name}": [summary.task_change_text(run.get(name)) for run in figures] for name in names}
    table = _table_of_runs("Tasks, and the change against the original model", comparison, scores | changes)
    return table if names else TextTable("", [], [])


def _errors(comparison: RunComparison) -> TextTable:
    accumulated = LayerErrors("last block", [accumulated_error(run.report) for run in comparison.runs])
    columns = {
        row.name: [
            f"{scientific(error)}{ratio:>{RATIO_WIDTH}}"
            for error, ratio in zip(row.errors, ["", *map(number_format.multiple, row.ratios)], strict=True)
        ]
        for row in [*comparison.kind_errors(), accumulated]
    }
    title = (
        "E_y by kind of layer and accumulated error of the last block, and how many times that of run "
        f"{comparison.runs[0].name}"
    )
    medians = f"Medians over {plural(len(comparison.common_layers()), 'layer')} that all runs have. "
    return _table_of_runs(title, comparison, columns, medians + meanings(["E_y", "accumulated"]))


def _changed(comparison: RunComparison) -> TextTable:
    reference, *others = [run.name for run in comparison.runs]
    title = f"Layers whose E_y changed most against run {reference}, and how many times as large it is elsewhere"
    rows = [
        [row.name, scientific(row.errors[0]), *map(number_format.multiple, row.ratios)]
        for row in comparison.changed_layers(CHANGED_LAYERS)
    ]
    return TextTable(title, ["layer", f"E_y of {reference}", *others], rows)


def _table_of_runs(title: str, comparison: RunComparison, columns: dict[str, list[str]], note: str = "") -> TextTable:
    """A row per run: its name, the settings in which it differs, and `columns`, the cells by heading."""
    differences = comparison.setting_differences()
    keys = shortest_suffixes([difference.key for difference in differences])
    settings = [[text_or_missing(value) for value in difference.values] for difference in differences]
    names = [run.name for run in comparison.runs]
    rows = [list(row) for row in zip(names, *settings, *columns.values(), strict=True)]
    return TextTable(title, ["run", *keys, *columns], rows, 1 + len(keys), note).filled()


def _marked(comparison: RunComparison, name: str) -> list[str]:
    """name: of RANKED."""
    metric, _, text = RANKED[name]
    best = comparison.best(metric)
    blank = " " * len(BEST_MARK) if best else ""  # keeps the digits aligned
    return [text(run.report) + (BEST_MARK if at in best else blank) for at, run in enumerate(comparison.runs)]


def _block_bits(report: RunReport) -> str:
    """Of all weights of the blocks, where these are not all quantised."""
    found = report.coverage
    return MISSING if found is None or found.block_bits == report.bits_per_weight else significant(found.block_bits, 3)


def _quantize_cost(report: RunReport) -> str:
    return next((summary.stage_cost(stage) for stage in report.stages if stage.name == QUANTIZE), MISSING)


def _in_words(difference: RunDifference, comparison: RunComparison) -> str:
    """ "protocol.window: 256 in 2; 512 in the others": by value, the most frequent one last."""
    by_value = grouped(range(len(difference.values)), lambda index: text_or_missing(difference.values[index]))
    *rare, (common, indices) = sorted(by_value.items(), key=lambda entry: len(entry[1]))
    others = "the others" if len(indices) > 1 else _names(comparison, indices)
    parts = [*(f"{value} in {_names(comparison, few)}" for value, few in rare), f"{common} in {others}"]
    return f"{difference.key}: {'; '.join(parts)}"


def _names(comparison: RunComparison, indices: Sequence[int]) -> str:
    return ", ".join(comparison.runs[index].name for index in indices)
