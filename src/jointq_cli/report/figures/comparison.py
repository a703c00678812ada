"""The figures that compare several runs: one colour and one marker per run, the same in all of them."""

import statistics
from collections.abc import Callable, Sequence

from jointq_cli.records import RunReport
from jointq_cli.report.compare.runs import RunComparison
from jointq_cli.report.figures import style
from jointq_cli.report.figures.plots import ACCUMULATED, MeasuredValue, Series, error_bars, errors_over_depth
from jointq_cli.report.figures.style import SvgFigure
from jointq_cli.report.grouping import grouped
from jointq_cli.report.number_format import scientific

ROW_HEIGHT = 0.5  # inches
LONG_NAME = 12  # characters above which a figure of half the page's width has no space beside the names


def comparison_figures(comparison: RunComparison) -> list[SvgFigure]:
    """All figures for which the runs have data."""
    return [
        *_perplexities(comparison),
        *_divergences(comparison),
        *_over_depth("Output error over depth", "E_y: median of each block's layers", comparison, _medians),
        *_by_kind(comparison),
        *_over_depth("Accumulated error over depth", ACCUMULATED, comparison, _accumulated),
    ]


def _perplexities(comparison: RunComparison) -> list[SvgFigure]:
    reports = [run.report for run in comparison.runs]
    values = [(report.quantized.value, report.quantized.standard_error) for report in reports]
    originals = sorted({report.original.value for report in reports if style.fits_log_axis(report.original.value)})
    caption = "± one standard error over windows; a broken line: the original model"
    return _error_bars("Perplexity", "perplexity", caption, comparison, values, originals)


def _divergences(comparison: RunComparison) -> list[SvgFigure]:
    measured = [run.report.comparison for run in comparison.runs]
    values = [(each.kl_divergence, each.kl_divergence_standard_error) for each in measured]
    caption = "KL(original || quantised), ± one standard error over windows"
    return _error_bars("KL divergence", "nats per token", caption, comparison, values, [])


def _error_bars(
    title: str,
    unit: str,
    caption: str,
    comparison: RunComparison,
    values: Sequence[tuple[float, float]],
    references: Sequence[float],
) -> list[SvgFigure]:
    """values: value and standard error of each run."""
    names = [run.name for run in comparison.runs]
    rows = [MeasuredValue(names[index], *value, style.series_style(index)) for index, value in enumerate(values)]
    width = (style.WIDE if any(len(name) > LONG_NAME for name in names) else style.HALF)[0]
    caption += style.not_drawn(sum(not style.fits_log_axis(row.value) for row in rows), "run")
    return error_bars(title, caption, unit, rows, (width, 1.0 + ROW_HEIGHT * len(rows)), references)


def _over_depth(
    title: str, caption: str, comparison: RunComparison, points: Callable[[RunReport], list[tuple[int, float]]]
) -> list[SvgFigure]:
    """A series per run. points: (decoder block, error)."""
    series = [
        Series(
            run.name,
            [(block, error, f"{label}: block {block}, {scientific(error)}") for block, error in points(run.report)],
        )
        for run, label in zip(comparison.runs, comparison.labels(), strict=True)
    ]
    return errors_over_depth(title, caption, "error", series)


def _medians(report: RunReport) -> list[tuple[int, float]]:
    blocks = grouped(report.layers, lambda layer: layer.block)
    return [(block, statistics.median(layer.output_error for layer in blocks[block])) for block in sorted(blocks)]


def _accumulated(report: RunReport) -> list[tuple[int, float]]:
    return [(block.block, block.output_error) for block in report.blocks]


def _by_kind(comparison: RunComparison) -> list[SvgFigure]:
    """A row per kind, a point per run."""
    rows = comparison.kind_errors()
    errors = [error for row in rows for error in row.errors if style.fits_log_axis(error)]
    if not errors:
        return []
    with style.styled_axes((style.WIDE[0], 1.0 + 0.36 * len(rows))) as axes:
        tooltips: dict[str, list[str]] = {}
        for index, (run, label) in enumerate(zip(comparison.runs, comparison.labels(), strict=True)):
            shown = [(row, -height) for height, row in enumerate(rows) if style.fits_log_axis(row.errors[index])]
            colour, marker = style.series_style(index)
            gid = f"kinds-{index}"
            axes.plot(
                [row.errors[index] for row, _ in shown], [height for _, height in shown], color=colour, marker=marker,
                markersize=7, linestyle="none", label=run.name, gid=gid,
            )  # fmt: skip
            tooltips[gid] = [f"{label}: {row.name}, {scientific(row.errors[index])}" for row, _ in shown]
        axes.set_xscale("log")
        style.log_ticks(axes.xaxis, errors)
        axes.set_yticks([-height for height in range(len(rows))], [row.name for row in rows])
        axes.set_xlabel("E_y")
        style.legend_beside(axes)
        caption = "E_y: median over the layers that all runs have"
        return [style.svg_figure(axes, "Output error by kind", caption, tooltips)]
