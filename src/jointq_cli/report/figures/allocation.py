"""The figures of a budget of bits: which layer has how many, and the loss over the size."""

import math
from dataclasses import replace

from jointq_cli.records import RunReport
from jointq_cli.records.allocation import AllocationPoint, AllocationRecord
from jointq_cli.report import summary
from jointq_cli.report.figures.plots import Series, heat_map, point_plot
from jointq_cli.report.figures.style import SvgFigure

LOSSES = (
    "The least loss that is predicted for each size, and what was measured: on the evaluation text, with error "
    "propagation, which predictions leave out"
)


def allocation_figures(report: RunReport) -> list[SvgFigure]:
    """All figures for which the report has data; none without a budget."""
    return [*_over_depth(report), *_losses(report, report.allocation)] if report.allocation else []


def _over_depth(report: RunReport) -> list[SvgFigure]:
    kinds = summary.layers_by_kind(report.layers)
    blocks = range(max(layer.block for layer in report.layers) + 1)
    bits = [{layer.block: layer.bits_per_weight for layer in layers} for layers in kinds.values()]
    values = [[row.get(block, math.nan) for block in blocks] for row in bits]
    caption = "Bits per weight of each layer, with all that its codes need"
    return heat_map("Bits over depth", caption, values, list(kinds), x="decoder block", text="{:.2f}".format)


def _losses(report: RunReport, record: AllocationRecord) -> list[SvgFigure]:
    measured = AllocationPoint(record.chosen.bits_per_weight, report.comparison.kl_divergence)
    series = [
        _series(None, record.curve),
        replace(_series("one candidate in all layers", record.uniform), line="none"),
        _series("chosen", [record.chosen]),
        _series("measured", [measured]),
    ]
    return point_plot("Loss over size", LOSSES, series, x="bits per weight", y="KL divergence, nats", log_y=True)


def _series(label: str | None, points: list[AllocationPoint]) -> Series:
    return Series(label, [point.bits_per_weight for point in points], [point.loss for point in points])
