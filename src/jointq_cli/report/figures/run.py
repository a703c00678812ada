"""The figures of the report of one run: errors, a rotation, a budget of bits, a refinement."""

import math
import statistics
from collections.abc import Callable
from operator import attrgetter

from jointq_cli.records import RefinementRecord, RotationRecord, RunReport
from jointq_cli.records.allocation import AllocationRecord
from jointq_cli.report import rotation_summary, summary
from jointq_cli.report.figures.plots import Series, SvgFigure, heat_map, point_plot
from jointq_cli.report.grouping import grouped

BLOCK = "decoder block"
ACCUMULATED = (
    "|quantised - original|² / |original|² of what leaves each block, all blocks up to it quantised, "
    "on the first batch of calibration windows"
)


def run_figures(report: RunReport) -> list[SvgFigure]:
    """All figures for which the report has data."""
    accumulated = [Series(None, [(block.block, block.output_error) for block in report.blocks])]
    return [
        *_errors(report, "Output error over depth", "Relative error of each layer's output", "E_y", "output_error"),
        *_errors(report, "Weight error over depth", "Relative error of each weight matrix", "E_w", "weight_error"),
        *point_plot("Accumulated error over depth", ACCUMULATED, accumulated, x=BLOCK, y="error", log_y=True),
        *(rotation_figures(report.rotation) if report.rotation else []),
        *(allocation_figures(report, report.allocation) if report.allocation else []),
        *(refinement_figures(report.refinement) if report.refinement else []),
    ]


def _errors(report: RunReport, title: str, caption: str, symbol: str, field: str) -> list[SvgFigure]:
    error: Callable[[object], float] = attrgetter(field)
    layers = sorted(report.layers, key=lambda layer: layer.block)
    kinds = summary.layers_by_kind(layers).items()
    fallen = [(layer.block, error(layer)) for layer in layers if layer.verdict == summary.FALLBACK]
    series = [Series(kind, [(layer.block, error(layer)) for layer in members]) for kind, members in kinds]
    series += [Series("fell back to RTN", fallen, line="rings")]
    return point_plot(title, caption, series, x=BLOCK, y=symbol, log_y=True)


def rotation_figures(record: RotationRecord) -> list[SvgFigure]:
    """Its effect on the activations over depth, and how R1 was learned."""
    sites = grouped(record.sites, lambda site: site.name).items()
    before, after = rotation_summary.mean_sqnr(record.sites)
    points = [Series(name, [(site.block, site.sqnr_after) for site in each]) for name, each in sites]
    lines = [Series(None, [(site.block, site.sqnr_before) for site in each], line="dotted") for _, each in sites]
    caption = (
        f"Signal to quantisation noise of layer inputs at 4 bits per token: dotted before ({before:.1f} dB on "
        f"average), points after ({after:.1f} dB). Tokens that nothing was learned from"
    )
    title = "Activations before and after the rotation"
    figures = point_plot(title, caption, [*points, *lines], x=BLOCK, y="SQNR, dB", colours=len(points))
    for training in [training for training in record.courses if training.name == "R1"]:
        series = [Series(None, [(point.step, point.error) for point in training.errors])]
        caption = (
            "Relative error of rotated activations at few bits, on tokens that were not learned from. The line marks "
            f"the step whose rotation was kept, {training.best_step} of {training.steps}"
        )
        kept = [training.best_step]
        figures += point_plot("How R1 was learned", caption, series, x="step", y="error", references=kept)
    return figures


def allocation_figures(report: RunReport, record: AllocationRecord) -> list[SvgFigure]:
    """Which layer has how many bits, and the loss over the size."""
    kinds = summary.layers_by_kind(report.layers)
    blocks = range(1 + max(layer.block for layer in report.layers))
    bits = grouped(report.layers, lambda layer: (layer.kind, layer.block))
    means = {place: statistics.mean(layer.bits_per_weight for layer in layers) for place, layers in bits.items()}
    values = [[means.get((kind, block), math.nan) for block in blocks] for kind in kinds]
    counted = "Bits per weight, all that a layer needs counted"
    size, measured = record.chosen.bits_per_weight, report.comparison.kl_divergence
    series = [
        Series("least predicted", [(each.bits_per_weight, each.loss) for each in record.curve]),
        Series("one form in all layers", [(each.bits_per_weight, each.loss) for each in record.uniform], line="none"),
        Series("measured", [(size, measured)], line="none"),
        Series("chosen", [(size, record.chosen.loss)], line="rings"),
    ]
    caption = (
        "The least loss that is predicted for each size, what was chosen, and what was measured: on the evaluation "
        "text, with error propagation, which predictions leave out"
    )
    return [
        *heat_map("Bits over depth", counted, values, list(kinds), x=BLOCK),
        *point_plot("Loss over size", caption, series, x="bits per weight", y="KL divergence, nats", log_y=True),
    ]


def refinement_figures(record: RefinementRecord) -> list[SvgFigure]:
    """The loss over the steps of the model's training, or over depth for blocks."""
    first, *others = record.courses
    if others:
        before = [course.points[0].heldout_loss for course in record.courses]
        after = [min(point.heldout_loss for point in course.points) for course in record.courses]
        series = [Series("before", list(enumerate(before))), Series("after", list(enumerate(after)))]
        caption = "Relative error of each block's output on windows that it was not trained on"
        return point_plot("What the refinement of blocks has gained", caption, series, x=BLOCK, y="error", log_y=True)
    series = [
        Series("held out", [(point.step, point.heldout_loss) for point in first.points]),
        Series("trained on", [(point.step, point.loss) for point in first.points if point.loss]),
    ]
    caption = (
        "KL(original || refined) of the next token, on windows trained on and held out. "
        f"The line marks the step that was kept, {first.best_step} of {first.steps}"
    )
    kept = [first.best_step]
    return point_plot("How the model was refined", caption, series, x="step", y="KL, nats per token", references=kept)
