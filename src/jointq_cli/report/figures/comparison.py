"""The figures that compare several runs: one colour and one marker per run, the same in all of them."""

import statistics
from collections.abc import Callable, Sequence

from jointq_cli.records import RunReport
from jointq_cli.report.compare.runs import RunComparison
from jointq_cli.report.figures.plots import Series, point_plot
from jointq_cli.report.figures.run import ACCUMULATED
from jointq_cli.report.figures.style import SvgFigure, fits_log_axis
from jointq_cli.report.grouping import grouped

LONG_NAME = 12  # characters above which a figure of half the page's width has no space beside the names
MOST_SERIES = 16  # in one figure
FAR_APART = 5  # ratio of the largest to the smallest value above which an axis is logarithmic


def comparison_figures(comparison: RunComparison) -> list[SvgFigure]:
    """All figures for which the runs have data."""
    few = comparison.closest(MOST_SERIES)
    left_out = len(comparison.runs) - len(few.runs)
    most = f"; without the {left_out} runs of largest KL divergence" if left_out else ""
    caption = f"E_y: median of each block's layers{most}"
    return [
        *_perplexities(comparison),
        *_divergences(comparison),
        *_over_depth("Output error over depth", caption, few, _medians),
        *_by_kind(few),
        *_over_depth("Accumulated error over depth", ACCUMULATED + most, few, _accumulated),
    ]


def _perplexities(comparison: RunComparison) -> list[SvgFigure]:
    reports = [run.report for run in comparison.runs]
    values = [(report.quantized.value, report.quantized.standard_error) for report in reports]
    originals = sorted({report.original.value for report in reports if fits_log_axis(report.original.value)})
    caption = "± one standard error over windows; a broken line: the original model"
    return _measured("Perplexity", "perplexity", caption, comparison, values, originals)


def _divergences(comparison: RunComparison) -> list[SvgFigure]:
    measured = [run.report.comparison for run in comparison.runs]
    values = [(each.kl_divergence, each.kl_divergence_standard_error) for each in measured]
    caption = "KL(original || quantised), ± one standard error over windows"
    return _measured("KL divergence", "nats per token", caption, comparison, values, [])


def _measured(
    title: str,
    unit: str,
    caption: str,
    comparison: RunComparison,
    values: Sequence[tuple[float, float]],
    references: Sequence[float],
) -> list[SvgFigure]:
    """A row per run. values: value and standard error of each."""
    names = comparison.labels()
    series = [Series(None, [value], [row], [error]) for row, (value, error) in enumerate(values)]
    positive = [value for value in [*references, *(value for value, _ in values)] if fits_log_axis(value)]
    log = not positive or max(positive) > FAR_APART * min(positive)
    wide = any(len(name) > LONG_NAME for name in names)
    return point_plot(title, caption, series, x=unit, rows=names, log_x=log, references=references, wide=wide)


def _over_depth(
    title: str, caption: str, comparison: RunComparison, points: Callable[[RunReport], list[tuple[int, float]]]
) -> list[SvgFigure]:
    """A series per run. points: (decoder block, error)."""
    labels, found = comparison.labels(), [points(run.report) for run in comparison.runs]
    series = [
        Series(label, [block for block, _ in each], [error for _, error in each])
        for label, each in zip(labels, found, strict=True)
    ]
    return point_plot(title, caption, series, x="decoder block", y="error", log_y=True)


def _medians(report: RunReport) -> list[tuple[int, float]]:
    blocks = grouped(report.layers, lambda layer: layer.block)
    return [(block, statistics.median(layer.output_error for layer in blocks[block])) for block in sorted(blocks)]


def _accumulated(report: RunReport) -> list[tuple[int, float]]:
    return [(block.block, block.output_error) for block in report.blocks]


def _by_kind(comparison: RunComparison) -> list[SvgFigure]:
    """A row per kind, a point per run."""
    rows = comparison.kind_errors()
    series = [
        Series(label, [row.errors[index] for row in rows], list(range(len(rows))))
        for index, label in enumerate(comparison.labels())
    ]
    caption = "E_y: median over the layers that all runs have"
    return point_plot("Output error by kind", caption, series, x="E_y", rows=[row.name for row in rows], log_x=True)
