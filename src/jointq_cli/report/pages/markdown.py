"""A report as Markdown: key figures, kinds of layers, the worst layers, where everything came from. And a sheet."""

from collections.abc import Iterable, Sequence

from jointq_cli.records import LayerRecord, RunReport
from jointq_cli.report import number_format as units
from jointq_cli.report.compare import rotation_summary, summary
from jointq_cli.report.console import lines
from jointq_cli.report.tables.table import Sheet, TextTable

WORST = 10  # layers; layers.csv has them all
BLOCKS = 8


def render_markdown(report: RunReport) -> str:
    parts = [
        f"# {summary.title(report)}",
        f"**{summary.headline(report)}**",
        summary.explanation(report),
        *(f"> **Problem:** {_inline(problem)}" for problem in summary.problems(report)),
        _table(
            ("figure", "value", "remark"),
            ((figure.label, figure.value, figure.detail) for figure in summary.key_figures(report)),
        ),
        f"Protocol: `{report.protocol.line()}`",
        *_basis(report),
        "## Layers by kind",
        _kinds(report),
        *_helped(report),
        *_blocks(report),
        f"## The {min(WORST, len(report.layers))} layers of largest output error",
        _layers(summary.worst_layers(report, WORST)),
        "All layers are in `layers.csv`. E_y is the relative error of a layer's output on the calibration "
        "tokens, E_w that of its weight; both against what the layer was solved for, with QEP the corrected weight.",
        "## Where the time went",
        _stages(report),
        "## Where it came from",
        _table(("what", "value"), summary.provenance(report)),
        *_warnings(report),
    ]
    return "\n\n".join(parts) + "\n"


def render_sheet(sheet: Sheet) -> str:
    """Several runs side by side."""
    parts = [
        f"# {_inline(sheet.title)}",
        f"**{_inline(sheet.headline)}**",
        *(f"> **Warning:** {_inline(warning)}" for warning in sheet.warnings),
        *(part for grid in sheet.grids for part in _grid(grid)),
        "## Notes",
        "\n".join(f"- {_inline(note)}" for note in sheet.notes).replace("*", "\\*"),
    ]
    return "\n\n".join(parts) + "\n"


def _grid(grid: TextTable) -> list[str]:
    rows = ([cell.text for cell in row] for row in grid.rows)
    heading = [_inline(text) for text in grid.heading]
    return [f"## {_inline(grid.title)}", _table(heading, rows, numbers_from=grid.stub), *filter(None, [grid.remark])]


def _basis(report: RunReport) -> list[str]:
    """What is stored and what is simulated, where that is not all there is."""
    if not summary.basis(report):
        return []
    parts = ["## Stored and simulated", _inline(summary.stored_and_simulated(report))]
    if report.rotation is None:
        return parts
    figures = [(figure.label, figure.value, figure.detail) for figure in rotation_summary.figures(report.rotation)]
    found = [(what, value, "") for what, value in rotation_summary.provenance(report.rotation)]
    return [*parts, _table(("new basis", "value", "remark"), [*figures, *found])]


def _kinds(report: RunReport) -> str:
    rows = (
        (
            kind.kind,
            str(kind.layers),
            units.relative_error(kind.median_output_error),
            units.relative_error(kind.largest_output_error),
            units.relative_error(kind.median_weight_error),
            units.duration(kind.seconds),
        )
        for kind in summary.kind_summaries(report.layers)
    )
    return _table(("kind", "layers", "median E_y", "largest E_y", "median E_w", "time"), rows, numbers_from=1)


def _helped(report: RunReport) -> list[str]:
    helped = [layer for layer in report.layers if layer.verdict != "ok"]
    return ["## Layers that needed help", _layers(helped)] if helped else []


def _blocks(report: RunReport) -> list[str]:
    """Some of the blocks: the picture in the HTML has them all."""
    step = max(1, -(-len(report.blocks) // BLOCKS))
    shown = report.blocks[::-1][::step][::-1]  # the last one among them
    rows = ((str(block.block), units.relative_error(block.output_error)) for block in shown)
    text = (
        "|quantised - original|^2 / |original|^2 of what leaves a block, all blocks up to it quantised, on the first "
        "batch of calibration windows."
    )
    table = _table(("block", "error"), rows, numbers_from=0)
    return ["## Accumulated error over depth", _inline(text), table] if shown else []


def _layers(layers: Sequence[LayerRecord]) -> str:
    rows = (
        (
            f"`{layer.name}`",
            layer.verdict,
            f"{layer.out_features} x {layer.in_features}",
            units.relative_error(layer.output_error),
            units.relative_error(layer.weight_error),
            units.damping(layer.damping),
            units.duration(layer.seconds),
            lines.layer_notes(layer),
        )
        for layer in layers
    )
    return _table(("layer", "verdict", "out x in", "E_y", "E_w", "damping", "time", "notes"), rows)


def _stages(report: RunReport) -> str:
    rows = ((stage.name, lines.stage_cost(stage), units.size(stage.peak_memory)) for stage in report.stages)
    return _table(("stage", "time", "peak memory so far"), rows, numbers_from=1)


def _warnings(report: RunReport) -> list[str]:
    if not report.warnings:
        return []
    return ["## Warnings", "\n".join(f"- {_inline(warning)}" for warning in report.warnings)]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int | None = None) -> str:
    """numbers_from: the column from which on cells are right-aligned."""
    right = len(header) if numbers_from is None else numbers_from
    rule = ["---:" if index >= right else "---" for index in range(len(header))]
    cells = [header, rule, *([_inline(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _inline(text: str) -> str:
    """On one line, and without accidental HTML."""
    return " ".join(text.split()).replace("<", "&lt;")
