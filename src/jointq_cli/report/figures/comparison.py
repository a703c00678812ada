"""The figures that compare several runs: one colour and one marker per run, the same in all of them."""

import statistics
from collections.abc import Callable, Sequence

from jointq_cli.records import RunReport
from jointq_cli.report.compare.runs import ComparedRun, kind_errors, run_labels
from jointq_cli.report.figures.plots import ACCUMULATED, MeasuredValue, Series, error_bars, errors_over_depth
from jointq_cli.report.figures.style import (
    HALF,
    WIDE,
    SvgFigure,
    fits_log_axis,
    legend_beside,
    log_ticks,
    not_drawn,
    series_style,
    styled_axes,
    svg_figure,
)
from jointq_cli.report.grouping import grouped
from jointq_cli.report.number_format import scientific

ROW_HEIGHT = 0.5  # inches
LONG_NAME = 12  # characters above which a figure of half the page's width has no space beside the names


def comparison_figures(runs: Sequence[ComparedRun]) -> list[SvgFigure]:
    """All figures for which the runs have data."""
    return [
        *_perplexities(runs),
        *_divergences(runs),
        *_over_depth("Output error over depth", "E_y: median of each block's layers", runs, _medians),
        *_by_kind(runs),
        *_over_depth("Accumulated error over depth", ACCUMULATED, runs, _accumulated),
    ]


def _perplexities(runs: Sequence[ComparedRun]) -> list[SvgFigure]:
    values = [(run.report.quantized.value, run.report.quantized.standard_error) for run in runs]
    originals = sorted({run.report.original.value for run in runs if fits_log_axis(run.report.original.value)})
    caption = "± one standard error over windows; a broken line: the original model"
    return _error_bars("Perplexity", "perplexity", caption, runs, values, originals)


def _divergences(runs: Sequence[ComparedRun]) -> list[SvgFigure]:
    comparisons = [run.report.comparison for run in runs]
    values = [(each.kl_divergence, each.kl_divergence_standard_error) for each in comparisons]
    caption = "KL(original || quantised), ± one standard error over windows"
    return _error_bars("KL divergence", "nats per token", caption, runs, values, [])


def _error_bars(
    title: str,
    unit: str,
    caption: str,
    runs: Sequence[ComparedRun],
    values: Sequence[tuple[float, float]],
    references: Sequence[float],
) -> list[SvgFigure]:
    """values: value and standard error of each run."""
    rows = [
        MeasuredValue(run.name, *value, series_style(index))
        for index, (run, value) in enumerate(zip(runs, values, strict=True))
    ]
    width = (WIDE if any(len(run.name) > LONG_NAME for run in runs) else HALF)[0]
    caption += not_drawn(sum(not fits_log_axis(row.value) for row in rows), "run")
    return error_bars(title, caption, unit, rows, (width, 1.0 + ROW_HEIGHT * len(runs)), references)


def _over_depth(
    title: str, caption: str, runs: Sequence[ComparedRun], points: Callable[[RunReport], list[tuple[int, float]]]
) -> list[SvgFigure]:
    """A series per run. points: (decoder block, error)."""
    series = [
        Series(
            run.name,
            [(block, error, f"{label}: block {block}, {scientific(error)}") for block, error in points(run.report)],
        )
        for run, label in zip(runs, run_labels(runs), strict=True)
    ]
    return errors_over_depth(title, caption, "error", series)


def _medians(report: RunReport) -> list[tuple[int, float]]:
    blocks = grouped(report.layers, lambda layer: layer.block)
    return [(block, statistics.median(layer.output_error for layer in blocks[block])) for block in sorted(blocks)]


def _accumulated(report: RunReport) -> list[tuple[int, float]]:
    return [(block.block, block.output_error) for block in report.blocks]


def _by_kind(runs: Sequence[ComparedRun]) -> list[SvgFigure]:
    """A row per kind, a point per run."""
    rows = kind_errors(runs)
    errors = [error for row in rows for error in row.errors if fits_log_axis(error)]
    if not errors:
        return []
    with styled_axes((WIDE[0], 1.0 + 0.36 * len(rows))) as axes:
        tooltips: dict[str, list[str]] = {}
        for index, (run, label) in enumerate(zip(runs, run_labels(runs), strict=True)):
            points = [(row.errors[index], -height, row.name) for height, row in enumerate(rows)]
            points = [point for point in points if fits_log_axis(point[0])]
            colour, marker = series_style(index)
            axes.plot(
                [error for error, _, _ in points],
                [height for _, height, _ in points],
                color=colour,
                marker=marker,
                markersize=7,
                linestyle="none",
                label=run.name,
                gid=f"kinds-{index}",
            )
            tooltips[f"kinds-{index}"] = [f"{label}: {kind}, {scientific(error)}" for error, _, kind in points]
        axes.set_xscale("log")
        log_ticks(axes.xaxis, errors)
        axes.set_yticks([-height for height in range(len(rows))], [row.name for row in rows])
        axes.set_xlabel("E_y")
        legend_beside(axes)
        caption = "E_y: median over the layers that all runs have"
        return [svg_figure(axes, "Output error by kind", caption, tooltips)]
