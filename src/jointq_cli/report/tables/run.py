"""The report of one run as a document that Markdown and HTML render: what is said first, and which tables follow."""

import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from jointq_cli.records import LayerRecord, RotationRecord, RunReport, TaskRecord
from jointq_cli.report import rotation_summary, summary
from jointq_cli.report.grouping import grouped
from jointq_cli.report.number_format import MISSING, byte_size, damping_text, duration, plural, scientific, significant
from jointq_cli.report.tables.allocation import allocation_table
from jointq_cli.report.tables.experts import experts_table
from jointq_cli.report.tables.glossary import meanings, said_once
from jointq_cli.report.tables.table import TableDocument, TextTable


def run_document(report: RunReport, worst: int | None = None) -> TableDocument:
    """worst: of how many layers a row is shown, those of the largest output error, for a short document in Markdown;
    None for all, in the model's order."""
    layers = report.layers
    words = meanings(re.findall(r"(\w+)=", report.quantizer))
    first = said_once(
        [_generations(report, quoted=worst is not None), errors_by_block(report), experts_table(layers)], words
    )
    tables = [
        *([_basis(report, report.rotation)] if report.rotation else []),
        allocation_table(report),
        tasks_table(report.tasks),
        kinds_table(layers),
        _layers("Layers that are not ok", [layer for layer in layers if layer.verdict != "ok"]),
        _layers("Layers", layers) if worst is None else _worst(layers, worst),
        _stages(report),
    ]
    return TableDocument(
        title=summary.title(report),
        headline=summary.headline(report),
        problems=summary.problems(report),
        warnings=report.warnings,
        sound=summary.sound(report),
        explanation=[summary.explanation(report), words],
        metrics=summary.key_metrics(report),
        first_tables=first,
        tables=said_once(tables, words, *(table.note for table in first)),
        notes=[summary.stored_and_simulated(report)] if summary.basis(report) else [],
        origin=summary.provenance(report),
    )


def kinds_table(layers: Sequence[LayerRecord]) -> TextTable:
    """A row per kind of layer, such as q_proj, in the order of the model."""
    columns = {
        "kind": lambda members: members[0].kind,
        "layers": lambda members: str(len(members)),
        "median E_y": lambda members: scientific(statistics.median(layer.output_error for layer in members)),
        "largest E_y": lambda members: scientific(max(layer.output_error for layer in members)),
        "median E_w": lambda members: scientific(statistics.median(layer.weight_error for layer in members)),
        "time": lambda members: duration(sum(layer.seconds for layer in members)),
    }
    return TextTable.of("Layers by kind", summary.layers_by_kind(layers).values(), columns, note=meanings(["E_w"]))


def errors_by_block(report: RunReport) -> TextTable:
    """E_y over depth and kind, the median where a block has several layers of a kind; with bits where these differ."""
    kinds = list(summary.layers_by_kind(report.layers))
    blocks = grouped(report.layers, lambda layer: layer.block)
    accumulated = {block.block: scientific(block.output_error, 1) for block in report.blocks}
    differ = len({layer.bits_per_weight for layer in report.layers}) > 1

    def cell(layers: Sequence[LayerRecord]) -> str:
        if not layers:
            return MISSING
        bits = statistics.mean(layer.bits_per_weight for layer in layers)
        error = scientific(statistics.median(layer.output_error for layer in layers), 1)
        return f"{error} / {significant(bits, 2)}" if differ else error

    rows = [
        [
            str(block),
            *(cell([layer for layer in blocks[block] if layer.kind == kind]) for kind in kinds),
            accumulated.get(block, MISSING),
        ]
        for block in sorted(blocks)
    ]
    note = meanings(["E_y", "accumulated"]) + ("\nAfter the stroke: bits per weight." if differ else "")
    heading = ["block", *kinds, "accumulated"]
    return TextTable("Where the error is: E_y by block and kind", heading, rows, note=note, shaded=len(kinds))


def tasks_table(tasks: Sequence[TaskRecord]) -> TextTable:
    """A row per figure of lm-eval's tasks."""
    columns = {
        "task": lambda task: task.task,
        "metric": lambda task: task.metric,
        "original": lambda task: summary.task_score_text(task.original),
        "quantised": lambda task: summary.task_score_text(task.score),
        "change": summary.task_change_text,
        "samples": lambda task: str(task.samples),
        "few-shot": lambda task: str(task.fewshot),
    }
    note = (
        f"Measured by {', '.join(sorted({task.harness for task in tasks}))} in plain transformers. Standard errors are "
        "those of a mean over samples, that of the change over the differences of the same samples."
    )
    return TextTable.of("Tasks", tasks, columns, stub=2, note=note)


def _worst(layers: Sequence[LayerRecord], count: int) -> TextTable:
    """Those whose error is not a number come first."""
    chosen = sorted(layers, key=lambda layer: (layer.output_error < float("inf"), -layer.output_error))[:count]
    return _layers(f"The {plural(len(chosen), 'layer')} of largest output error; layers.csv has all", chosen)


def _layers(title: str, layers: Sequence[LayerRecord]) -> TextTable:
    """Columns without values are left out; notes of one value are listed below."""
    notes = dict.fromkeys(name for layer in layers for name in layer.notes)
    values = {name: [text for layer in layers if (text := summary.note_text(layer, name))] for name in notes}
    alike = {name: texts[0] for name, texts in values.items() if len(texts) > 1 and len(set(texts)) == 1}
    columns: dict[str, Callable[[LayerRecord], str]] = {
        "layer": lambda layer: layer.name,
        "verdict": lambda layer: layer.verdict,
        "form": _form,
        "out x in": lambda layer: f"{layer.out_features} x {layer.in_features}",
        "bits/weight": lambda layer: significant(layer.bits_per_weight, 3),
        "E_y": lambda layer: scientific(layer.output_error),
        "E_w": lambda layer: scientific(layer.weight_error),
        "damping": lambda layer: damping_text(layer.damping),
        "tokens": lambda layer: MISSING if layer.tokens is None else str(layer.tokens),
        "seconds": lambda layer: f"{layer.seconds:.2f}",
        **{name: partial(summary.note_text, name=name) for name in notes if name not in alike},
    }
    table = TextTable.of(title, layers, columns, stub=3).filled()
    same = [f"The same in all that have it: {', '.join(map(' '.join, alike.items()))}."] if alike else []
    note = "\n".join([*same, meanings({*table.heading, *alike})])
    return replace(table, note=note)


def _form(layer: LayerRecord) -> str:
    """How the weight is stored; older reports have bits and groups alone."""
    return layer.label or ("" if layer.bits is None else f"W{layer.bits} g{layer.group_size}")


def _stages(report: RunReport) -> TextTable:
    columns = {
        "stage": lambda stage: stage.name,
        "time": summary.stage_cost,
        "peak memory so far": lambda stage: byte_size(stage.peak_memory),
    }
    return TextTable.of("Where the time went", report.stages, columns)


def _basis(report: RunReport, record: RotationRecord) -> TextTable:
    rows = [[metric.label, metric.value, metric.detail] for metric in rotation_summary.metrics(record)]
    rows += [[label, value, ""] for label, value in rotation_summary.provenance(record)]
    note = summary.stored_and_simulated(report)
    return TextTable("Stored and simulated", ["new basis", "value", "note"], rows, stub=3, note=note)


def _generations(report: RunReport, *, quoted: bool) -> TextTable:
    """quoted: each text as a JSON string, in which nothing is markup."""
    note = "What each model writes after a prompt, by the most likely token each time"
    simulated = "; activations are not quantised" if report.simulation else ""
    texts = [[one.prompt, one.original, one.quantized] for one in report.generations]
    rows = [[json.dumps(text, ensure_ascii=False) if quoted else text for text in row] for row in texts]
    return TextTable("Generated text", ["prompt", "original", "quantised"], rows, stub=3, note=f"{note}{simulated}.")
