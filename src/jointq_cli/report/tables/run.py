"""The tables of one run's report that Markdown and HTML share."""

import statistics
from collections.abc import Sequence

from jointq_cli.records import LayerRecord, TaskRecord
from jointq_cli.report.number_format import duration, scientific
from jointq_cli.report.summary import layers_by_kind, task_change_text, task_score_text
from jointq_cli.report.tables.table import Cell, TextTable


def kinds_table(layers: Sequence[LayerRecord]) -> TextTable:
    """A row per kind of layer, such as q_proj, in the order of the model."""
    rows = []
    for kind, members in layers_by_kind(layers).items():
        output_errors = [layer.output_error for layer in members]
        texts = [
            kind,
            str(len(members)),
            scientific(statistics.median(output_errors)),
            scientific(max(output_errors)),
            scientific(statistics.median(layer.weight_error for layer in members)),
            duration(sum(layer.seconds for layer in members)),
        ]
        rows.append(list(map(Cell, texts)))
    heading = ["kind", "layers", "median E_y", "largest E_y", "median E_w", "time"]
    return TextTable("Layers by kind", 1, heading, rows)


def tasks_table(tasks: Sequence[TaskRecord]) -> list[TextTable]:
    """A row per figure of lm-eval's tasks; no table without any."""
    rows = [
        [
            task.task,
            task.metric,
            task_score_text(task.original),
            task_score_text(task.score),
            task_change_text(task),
            str(task.samples),
            str(task.fewshot),
        ]
        for task in tasks
    ]
    harnesses = ", ".join(sorted({task.harness for task in tasks}))
    note = (
        f"Measured by {harnesses} in plain transformers. Standard errors are those of a mean over samples, that of the "
        "change over the differences of the same samples."
    )
    heading = ["task", "metric", "original", "quantised", "change", "samples", "few-shot"]
    return [TextTable("Tasks", 2, heading, [list(map(Cell, row)) for row in rows], note)] if rows else []
