"""The figures of the report of one run. Knows the records."""

from collections.abc import Callable, Sequence
from operator import attrgetter

from jointq_cli.records import BlockRecord, LayerRecord, RunReport
from jointq_cli.report import summary
from jointq_cli.report.figures.allocation import allocation_figures
from jointq_cli.report.figures.plots import Series, point_plot
from jointq_cli.report.figures.refinement import refinement_figures
from jointq_cli.report.figures.rotation import rotation_figures
from jointq_cli.report.figures.style import SvgFigure

ACCUMULATED = (
    "|quantised - original|² / |original|² of what leaves each block, all blocks up to it quantised, "
    "on the first batch of calibration windows"
)
OUTPUT_ERROR, WEIGHT_ERROR = attrgetter("output_error"), attrgetter("weight_error")


def run_figures(report: RunReport) -> list[SvgFigure]:
    """All figures for which the report has data."""
    layers = report.layers
    return [
        *_over_depth("E_y", "Output error over depth", layers, OUTPUT_ERROR, "Relative error of each layer's output"),
        *_over_depth("E_w", "Weight error over depth", layers, WEIGHT_ERROR, "Relative error of each weight matrix"),
        *_accumulated(report.blocks),
        *(rotation_figures(report.rotation) if report.rotation else []),
        *allocation_figures(report),
        *(refinement_figures(report.refinement) if report.refinement else []),
    ]


def _over_depth(
    symbol: str, title: str, layers: Sequence[LayerRecord], error: Callable[[LayerRecord], float], caption: str
) -> list[SvgFigure]:
    series = [
        Series(kind, [layer.block for layer in members], [error(layer) for layer in members])
        for kind, members in summary.layers_by_kind(sorted(layers, key=lambda layer: layer.block)).items()
    ]
    fallen = [(layer.block, error(layer)) for layer in layers if layer.verdict == summary.FALLBACK]
    caption += "; circled: fell back to RTN" if fallen else ""
    return point_plot(title, caption, series, x="decoder block", y=symbol, log_y=True, rings=fallen)


def _accumulated(blocks: Sequence[BlockRecord]) -> list[SvgFigure]:
    series = [Series(None, [block.block for block in blocks], [block.output_error for block in blocks])]
    return point_plot("Accumulated error over depth", ACCUMULATED, series, x="decoder block", y="error", log_y=True)
