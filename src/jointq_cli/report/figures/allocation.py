"""The figures of a budget of bits: which layer has how many, and the loss over the size."""

import math
import statistics

from jointq_cli.records import RunReport
from jointq_cli.records.allocation import AllocationRecord
from jointq_cli.report import summary
from jointq_cli.report.figures.plots import Series, heat_map, point_plot
from jointq_cli.report.figures.style import SvgFigure


def allocation_figures(report: RunReport) -> list[SvgFigure]:
    """All figures for which the report has data; none without a budget."""
    return [*_over_depth(report), *_losses(report, report.allocation)] if report.allocation else []


def _over_depth(report: RunReport) -> list[SvgFigure]:
    kinds = summary.layers_by_kind(report.layers)
    blocks = range(1 + max(layer.block for layer in report.layers))
    bits = {
        (kind, block): [layer.bits_per_weight for layer in members if layer.block == block]
        for kind, members in kinds.items()
        for block in blocks
    }
    values = [
        [statistics.mean(found) if (found := bits[kind, block]) else math.nan for block in blocks] for kind in kinds
    ]
    caption = "Bits per weight, all that a layer needs counted"
    return heat_map("Bits over depth", caption, values, list(kinds), x="decoder block", text="{:.3g}".format)


def _losses(report: RunReport, record: AllocationRecord) -> list[SvgFigure]:
    size = record.chosen.bits_per_weight
    series = [
        Series("least predicted", [point.bits_per_weight for point in record.curve], [p.loss for p in record.curve]),
        Series(
            "one form in all layers",
            [point.bits_per_weight for point in record.uniform],
            [point.loss for point in record.uniform],
            line="none",
        ),
        Series("measured", [size], [report.comparison.kl_divergence], line="none"),
    ]
    caption = (
        "The least loss that is predicted for each size, in the circle what was chosen, and what was measured: on the "
        "evaluation text, with error propagation, which predictions leave out"
    )
    return point_plot(
        "Loss over size", caption, series, x="bits per weight", y="KL divergence, nats", log_y=True,
        rings=[(size, record.chosen.loss)],
    )  # fmt: skip
