"""The figures of the report of one run. Knows the records."""

import math
from collections.abc import Callable, Sequence
from operator import attrgetter

from jointq_cli.records import BlockRecord, LayerRecord, RunReport
from jointq_cli.report import summary
from jointq_cli.report.figures import style
from jointq_cli.report.figures.allocation import allocation_figures
from jointq_cli.report.figures.plots import ACCUMULATED, MeasuredValue, Series, error_bars, errors_over_depth
from jointq_cli.report.figures.refinement import refinement_figures
from jointq_cli.report.figures.rotation import rotation_figures
from jointq_cli.report.figures.style import SvgFigure
from jointq_cli.report.number_format import duration, relative_change, scientific

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
        *_by_kind(layers),
        *_perplexities(report),
        *_times(report),
    ]


def _over_depth(
    symbol: str, title: str, layers: Sequence[LayerRecord], error: Callable[[LayerRecord], float], meaning: str
) -> list[SvgFigure]:
    shown = [layer for layer in layers if style.fits_log_axis(error(layer))]
    series = [
        Series(
            kind,
            [
                (layer.block, error(layer), f"{layer.name}: {symbol} {scientific(error(layer))}")
                for layer in sorted(members, key=lambda layer: layer.block)
            ],
        )
        for kind, members in summary.layers_by_kind(shown).items()
    ]
    fallbacks = [(layer.block, error(layer)) for layer in shown if layer.verdict == summary.FALLBACK]
    caption = meaning + style.not_drawn(len(layers) - len(shown), "layer")
    return errors_over_depth(title, caption, symbol, series, fallbacks)


def _accumulated(blocks: Sequence[BlockRecord]) -> list[SvgFigure]:
    points = [
        (float(block.block), block.output_error, f"block {block.block}: {scientific(block.output_error)}")
        for block in blocks
    ]
    return errors_over_depth("Accumulated error over depth", ACCUMULATED, "error", [Series(None, points)])


def _by_kind(layers: Sequence[LayerRecord]) -> list[SvgFigure]:
    shown = [layer for layer in layers if style.fits_log_axis(layer.output_error)]
    if not shown:
        return []
    kinds = summary.layers_by_kind(shown)
    with style.styled_axes(style.HALF) as axes:
        rows = list(range(len(kinds)))[::-1]
        for index, (row, members) in enumerate(zip(rows, kinds.values(), strict=True)):
            errors = [layer.output_error for layer in members]
            colour = style.SERIES[index % len(style.SERIES)]
            line = {"color": colour, "linewidth": 1.2}
            axes.boxplot(
                errors,
                positions=[row],
                orientation="horizontal",
                widths=0.55,
                showfliers=False,
                boxprops=line,
                whiskerprops=line,
                capprops=line,
                medianprops={"color": colour, "linewidth": 2.4},
            )
            heights = _spread(row, len(errors))
            axes.plot(errors, heights, ".", color=colour, markersize=5, alpha=0.5, markeredgewidth=0)
        axes.set_xscale("log")
        style.log_ticks(axes.xaxis, [layer.output_error for layer in shown])
        axes.set_yticks(rows, list(kinds))
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("E_y")
        caption = "Output error by kind of layer: box from quartile to quartile, the thick line is the median"
        caption += style.not_drawn(len(layers) - len(shown), "layer")
        return [style.svg_figure(axes, "Output error by kind", caption, wide=False)]


def _perplexities(report: RunReport) -> list[SvgFigure]:
    rows = [
        MeasuredValue("original", report.original.value, report.original.standard_error, (style.FAINT, "o")),
        MeasuredValue("quantised", report.quantized.value, report.quantized.standard_error, style.series_style(0)),
    ]
    caption = (
        "Bars are one standard error over windows. Both models saw the same tokens, so that the difference, "
        f"{relative_change(*summary.perplexity_increase(report))}, is known far better than either."
    )
    complete = all(style.fits_log_axis(row.value) for row in rows)
    return error_bars("Perplexity", caption, "perplexity", rows, style.HALF) if complete else []


def _times(report: RunReport) -> list[SvgFigure]:
    stages = [stage for stage in report.stages if math.isfinite(stage.seconds)]
    if not stages:
        return []
    with style.styled_axes((style.WIDE[0], 0.9 + 0.34 * len(stages))) as axes:
        rows = list(range(len(stages)))[::-1]
        seconds = [0.0 if stage.reused else stage.seconds for stage in stages]
        axes.barh(rows, seconds, color=style.SERIES[0], height=0.6)
        for row, width, stage in zip(rows, seconds, stages, strict=True):
            text = summary.stage_cost(stage)
            axes.annotate(text, (width, row), xytext=(5, 0), textcoords="offset points", va="center")
        axes.set_yticks(rows, [stage.name for stage in stages])
        axes.set_xlim(0, 1.15 * max(seconds) or 1.0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("seconds")
        caption = f"{duration(summary.total_seconds(report))} in total; reused stages cost nothing this time"
        return [style.svg_figure(axes, "Where the time went", caption)]


def _spread(row: float, count: int) -> list[float]:
    """Heights around `row` that keep `count` points apart; the same on every call."""
    return [row + 0.18 * math.sin(2.4 * index) for index in range(count)]
