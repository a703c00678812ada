"""The report of one run as a document that Markdown and HTML render: what is said first, and which tables follow."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from jointq_cli.records import LayerRecord, RotationRecord, RunReport
from jointq_cli.report import rotation_summary, summary
from jointq_cli.report.grouping import grouped
from jointq_cli.report.number_format import MISSING, byte_size, damping_text, listed, plural, scientific, significant
from jointq_cli.report.tables.glossary import explained
from jointq_cli.report.tables.table import TableDocument, TextTable

FEWEST = 3  # experts of a block that are named


def run_document(report: RunReport, worst: int | None = None) -> TableDocument:
    """worst: of how many layers a row is shown, those of the largest output error, for a short document in Markdown;
    None for all, in the model's order."""
    layers, odd = report.layers, [layer for layer in report.layers if layer.verdict != "ok"]
    earlier = any(stage.name == "quantize" and stage.reused for stage in report.stages)
    return explained(
        TableDocument(
            title=summary.title(report),
            headline=summary.headline(report),
            problems=summary.problems(report),
            warnings=report.warnings,
            sound=summary.sound(report),
            metrics=summary.key_metrics(report),
            first_tables=[_texts(report, quoted=worst is not None), errors_by_block(report), experts_table(layers)],
            tables=[
                *([_basis(report.rotation)] if report.rotation else []),
                allocation_table(report),
                _layers("Layers that are not ok", odd, earlier),
                _layers("Layers", layers, earlier) if worst is None else _worst(layers, worst, earlier),
                _stages(report),
            ],
            origin=summary.provenance(report),
        )
    )


def errors_by_block(report: RunReport) -> TextTable:
    """E_y over depth and kind, the median where a block has several layers of a kind; with bits where these differ."""
    kinds = summary.layers_by_kind(report.layers)
    cells = grouped(report.layers, lambda layer: (layer.block, layer.kind))
    accumulated = {block.block: scientific(block.output_error, 1) for block in report.blocks}

    def bits(layers: Sequence[LayerRecord]) -> str:
        return significant(statistics.mean(layer.bits_per_weight for layer in layers), 2)

    differ = len({bits([layer]) for layer in report.layers}) > 1

    def text(layers: Sequence[LayerRecord]) -> str:
        return scientific(_median(layers), 1) + (f" / {bits(layers)}" if differ else "")

    blocks = sorted({block for block, _ in cells})
    rows = []
    for block in blocks:
        of_kinds = (text(cells[block, kind]) if (block, kind) in cells else MISSING for kind in kinds)
        rows.append([str(block), *of_kinds, accumulated.get(block, MISSING)])
    errors = {place: _median(layers) for place, layers in cells.items()}
    order = sorted(errors.values(), key=lambda error: (math.isnan(error), error))
    shades = {place: 60 * order.index(error) // len(order) for place, error in errors.items()}
    return TextTable(
        "Where the error is: E_y by block and kind",
        ["block", *kinds, "accumulated"],
        [*rows, ["median", *map(text, kinds.values()), ""]],
        note="After the stroke: bits per weight." if differ else "",
        shades=[*([0, *(shades.get((block, kind), 0) for kind in kinds)] for block in blocks), []],
    )


def _median(layers: Sequence[LayerRecord]) -> float:
    return statistics.median(layer.output_error for layer in layers)


def allocation_table(report: RunReport) -> TextTable:
    """A row for what was chosen and for each candidate in all layers; no row without a budget."""
    record = report.allocation
    if record is None:
        return TextTable("", [], [])
    points = [("as chosen", record.chosen)]
    points += [(f"{words} in all", point) for words, point in zip(record.candidates, record.uniform, strict=True)]
    points += [("chosen with the other allocation.tie", record.other_tie)] if record.other_tie else []
    rows = [[name, significant(point.bits_per_weight), significant(point.loss), ""] for name, point in points]
    rows[0][-1] = significant(report.comparison.kl_divergence)
    note = (
        "Predicted: what each layer alone does to the loss, added up, on the calibration tokens and without error "
        "propagation; measured: on the evaluation text. Compare predictions with each other."
    )
    heading = ["bits", "bits per weight", "predicted KL", "measured KL"]
    return TextTable(f"Budget: {record.allocation}", heading, rows, note=note)


def _worst(layers: Sequence[LayerRecord], count: int, earlier: bool) -> TextTable:
    """Those whose error is not a number come first."""
    chosen = sorted(layers, key=lambda layer: (layer.output_error < math.inf, -layer.output_error))[:count]
    return _layers(f"The {plural(len(chosen), 'layer')} of largest output error; layers.csv has all", chosen, earlier)


def _layers(title: str, layers: Sequence[LayerRecord], earlier: bool) -> TextTable:
    """Columns without values are left out; notes of one value are listed below. earlier: whether another run has solved
    the layers, whose times are no part of this one's."""
    notes = dict.fromkeys(name for layer in layers for name in layer.notes)
    values = {name: [text for layer in layers if (text := summary.note_text(layer, name))] for name in notes}
    alike = {name: texts[0] for name, texts in values.items() if len(texts) > 1 and len(set(texts)) == 1}
    columns: dict[str, Callable[[LayerRecord], str]] = {
        "layer": lambda layer: layer.name,
        "verdict": lambda layer: layer.verdict,
        "form": lambda layer: layer.label or (f"W{layer.bits} g{layer.group_size}" if layer.bits else ""),  # older
        "out x in": lambda layer: f"{layer.out_features} x {layer.in_features}",
        "bits/weight": lambda layer: significant(layer.bits_per_weight, 3),
        "E_y": lambda layer: scientific(layer.output_error),
        "E_w": lambda layer: scientific(layer.weight_error),
        "damping": lambda layer: damping_text(layer.damping),
        "tokens": lambda layer: MISSING if layer.tokens is None else str(layer.tokens),
        "seconds": lambda layer: f"{layer.seconds:.2f}",
        **{name: partial(summary.note_text, name=name) for name in notes if name not in alike},
    }
    same = ", ".join(f"{name}={text}" for name, text in alike.items())
    notes_below = [f"The same in all that have it: {same}."] if same else []
    notes_below += ["seconds: of the earlier run that solved the layers; here they were reused."] if earlier else []
    table = TextTable.of(title, layers, columns, stub=3).filled()
    return replace(table, note="\n".join(notes_below))


def _stages(report: RunReport) -> TextTable:
    columns = {
        "stage": lambda stage: stage.name,
        "time": summary.stage_cost,
        "peak memory so far": lambda stage: byte_size(stage.peak_memory),
    }
    return TextTable.of("Where the time went", report.stages, columns)


def _basis(record: RotationRecord) -> TextTable:
    rows = [[metric.label, metric.value, metric.detail] for metric in rotation_summary.metrics(record)]
    rows += [[label, value, ""] for label, value in rotation_summary.provenance(record)]
    return TextTable("New basis", ["figure", "value", "note"], rows, stub=3)


def _texts(report: RunReport, *, quoted: bool) -> TextTable:
    """quoted: each text as a JSON string, in which nothing is markup."""
    texts = [[one.prompt, one.original, one.quantized] for one in report.generations]
    rows = [[json.dumps(text, ensure_ascii=False) if quoted else text for text in row] for row in texts]
    simulated = "; activations are not quantised" if report.simulation else ""
    note = f"What each model writes after a prompt, by the most likely token each time{simulated}."
    return TextTable("Generated text", ["prompt", "original", "quantised"], rows, stub=3, note=note)


def expert_counts(layers: Sequence[LayerRecord]) -> dict[str, dict[str, int]]:
    """The tokens of each expert, by its number, of each module with experts, in the order of the model."""
    found: dict[str, dict[str, int]] = {}
    for layer in layers:
        if layer.tokens is not None:
            module, number, *_ = layer.name.rsplit(".", 2)
            found.setdefault(module, {})[number] = layer.tokens
    return found


def few_tokens(layers: Sequence[LayerRecord], least: int) -> list[str]:
    """A warning where experts have received fewer tokens than `least`."""
    counts = expert_counts(layers)
    few = [f"{module}.{number}" for module in counts for number, tokens in counts[module].items() if tokens < least]
    experts = plural(sum(map(len, counts.values())), "expert")
    warning = (
        f"experts.warn_below={least}: {len(few)} of {experts} {'has' if len(few) == 1 else 'have'} received fewer "
        f"calibration tokens ({listed(few)}); raise calibration.num_samples"
    )
    return [warning] if few else []


def experts_table(layers: Sequence[LayerRecord]) -> TextTable:
    """A row per module with experts."""
    rows = []
    for module, tokens in expert_counts(layers).items():
        counts = sorted(tokens.values())
        named = sorted(tokens, key=lambda number: tokens[number])[:FEWEST]
        numbers = (len(counts), counts[0], f"{statistics.median(counts):g}", counts[-1], counts.count(0))
        rows.append([module, *map(str, numbers), ", ".join(f"{number} ({tokens[number]})" for number in named)])
    heading = ["experts of", "experts", "least", "median", "most", "without any", "fewest"]
    return TextTable("Calibration tokens per expert", heading, rows)
