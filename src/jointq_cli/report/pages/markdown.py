"""The report of a run and documents of tables as Markdown."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple

from jointq_cli.records import LayerRecord, RunReport
from jointq_cli.report import rotation_summary, summary
from jointq_cli.report.number_format import KeyMetric, byte_size, damping_text, duration, scientific
from jointq_cli.report.tables.allocation import allocation_tables
from jointq_cli.report.tables.experts import experts_table
from jointq_cli.report.tables.run import kinds_table, tasks_table
from jointq_cli.report.tables.table import TableDocument, TextTable

WORST = 10  # layers; layers.csv has all
BLOCKS = 8


def run_markdown(report: RunReport) -> str:
    parts = [
        f"# {summary.title(report)}",
        f"**{summary.headline(report)}**",
        summary.explanation(report),
        *(f"> **Problem:** {inline(problem)}" for problem in summary.problems(report)),
        markdown_table(("metric", "value", "note"), _metric_rows(summary.key_metrics(report))),
        f"Protocol: `{report.protocol.line()}`",
        *_basis(report),
        *(part for table in tasks_table(report.tasks) for part in _text_table(table)),
        *(part for table in allocation_tables(report) for part in _text_table(table)),
        *_text_table(kinds_table(report.layers)),
        *(part for table in experts_table(report.layers) for part in _text_table(table)),
        *_generations(report),
        *_not_ok(report),
        *_blocks(report),
        f"## The {min(WORST, len(report.layers))} layers of largest output error",
        _layers(summary.worst_layers(report, WORST)),
        "All layers are in `layers.csv`. E_y is the relative error of a layer's output on the calibration "
        "tokens, E_w that of its weight; both against what the layer was solved for, with QEP the corrected weight.",
        "## Where the time went",
        _stages(report),
        "## Provenance",
        markdown_table(("what", "value"), summary.provenance(report)),
        *_warnings(report),
    ]
    return "\n\n".join(parts) + "\n"


def document_markdown(document: TableDocument) -> str:
    parts = [
        f"# {inline(document.title)}",
        f"**{inline(document.headline)}**",
        *(f"> **Warning:** {inline(warning)}" for warning in document.warnings),
        *(part for table in document.tables for part in _text_table(table)),
        "## Notes",
        "\n".join(f"- {inline(note)}" for note in document.notes).replace("*", "\\*"),
    ]
    return "\n\n".join(parts) + "\n"


def _text_table(table: TextTable) -> list[str]:
    rows = ([cell.text for cell in row] for row in table.rows)
    heading = [inline(text) for text in table.heading]
    return [
        f"## {inline(table.title)}",
        markdown_table(heading, rows, numbers_from=table.stub),
        *filter(None, [table.note]),
    ]


def _basis(report: RunReport) -> list[str]:
    """What is stored and what is simulated, for a run with a rotation or simulated activations."""
    if not summary.basis(report):
        return []
    parts = ["## Stored and simulated", inline(summary.stored_and_simulated(report))]
    if report.rotation is None:
        return parts
    metrics = _metric_rows(rotation_summary.metrics(report.rotation))
    provenance = [(label, value, "") for label, value in rotation_summary.provenance(report.rotation)]
    return [*parts, markdown_table(("new basis", "value", "note"), [*metrics, *provenance])]


def _metric_rows(metrics: Sequence[KeyMetric]) -> list[tuple[str, str, str]]:
    return [(metric.label, metric.value, metric.detail) for metric in metrics]


def _generations(report: RunReport) -> list[str]:
    if not report.generations:
        return []
    rows = [[json.dumps(text, ensure_ascii=False) for text in astuple(one)] for one in report.generations]
    table = markdown_table(("prompt", "original", "quantised"), rows)
    return ["## Generated text", summary.generation_note(report), table]


def _not_ok(report: RunReport) -> list[str]:
    layers = [layer for layer in report.layers if layer.verdict != "ok"]
    return ["## Layers that needed damping, a fallback or other tokens", _layers(layers)] if layers else []


def _blocks(report: RunReport) -> list[str]:
    """Some of the blocks; the figure in the HTML page has all."""
    step = max(1, -(-len(report.blocks) // BLOCKS))
    shown = report.blocks[::-1][::step][::-1]  # counted from the last, which is always shown
    rows = ((str(block.block), scientific(block.output_error)) for block in shown)
    text = (
        "|quantised - original|^2 / |original|^2 of what leaves a block, all blocks up to it quantised, on the first "
        "batch of calibration windows."
    )
    table = markdown_table(("block", "error"), rows, numbers_from=0)
    return ["## Accumulated error over depth", inline(text), table] if shown else []


def _layers(layers: Sequence[LayerRecord]) -> str:
    rows = (
        (
            f"`{layer.name}`",
            layer.verdict,
            f"{layer.out_features} x {layer.in_features}",
            scientific(layer.output_error),
            scientific(layer.weight_error),
            damping_text(layer.damping),
            duration(layer.seconds),
            summary.layer_notes(layer),
        )
        for layer in layers
    )
    return markdown_table(("layer", "verdict", "out x in", "E_y", "E_w", "damping", "time", "notes"), rows)


def _stages(report: RunReport) -> str:
    rows = ((stage.name, summary.stage_cost(stage), byte_size(stage.peak_memory)) for stage in report.stages)
    return markdown_table(("stage", "time", "peak memory so far"), rows, numbers_from=1)


def _warnings(report: RunReport) -> list[str]:
    if not report.warnings:
        return []
    return ["## Warnings", "\n".join(f"- {inline(warning)}" for warning in report.warnings)]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int | None = None) -> str:
    """numbers_from: the first right-aligned column; None for none."""
    right = len(header) if numbers_from is None else numbers_from
    rule = ["---:" if index >= right else "---" for index in range(len(header))]
    cells = [header, rule, *([inline(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def inline(text: str) -> str:
    """On one line, and with < escaped, so that no text becomes HTML."""
    return " ".join(text.split()).replace("<", "&lt;")
