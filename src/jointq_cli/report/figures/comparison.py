"""The figures that compare several runs: one colour and one marker per run, the same in all of them."""

import statistics
from collections.abc import Callable

from jointq_cli.report.comparison import MOST_DETAILED, ComparedRun, RunComparison
from jointq_cli.report.figures.plots import Series, point_plot
from jointq_cli.report.figures.run import ACCUMULATED
from jointq_cli.report.figures.style import SvgFigure, fits_log_axis
from jointq_cli.report.grouping import grouped

LONG_NAME = 12  # characters above which a figure of half the page's width has no space beside the names
FAR_APART = 5  # ratio of the largest to the smallest value above which an axis is logarithmic


def comparison_figures(comparison: RunComparison) -> list[SvgFigure]:
    """All figures for which the runs have data."""
    figures = [
        *_measured("Perplexity", "perplexity", "± one standard error over windows; broken: the original", comparison),
        *_measured("KL divergence", "kl", "KL(original || quantised), ± one standard error over windows", comparison),
    ]
    if len(comparison.finished) <= MOST_DETAILED:
        figures += _over_depth("Output error over depth", "E_y: median of each block's layers", comparison, _medians)
        figures += _by_kind(comparison)
        figures += _over_depth("Accumulated error over depth", ACCUMULATED, comparison, _accumulated)
    return figures


def _measured(title: str, figure: str, caption: str, comparison: RunComparison) -> list[SvgFigure]:
    """A row per run."""
    runs = [run for run in comparison.finished if figure in run.figures]
    names = list(map(comparison.label, runs))
    values = [run.figures[figure] for run in runs]
    series = [Series(None, [value], [row], [error]) for row, (value, error) in enumerate(values)]
    originals = {run.figures[f"original_{figure}"].value for run in runs if f"original_{figure}" in run.figures}
    references = sorted(filter(fits_log_axis, originals))
    positive = [value for value in [*references, *(value for value, _ in values)] if fits_log_axis(value)]
    log = not positive or max(positive) > FAR_APART * min(positive)
    wide = any(len(name) > LONG_NAME for name in names)
    unit = "nats per token" if figure == "kl" else figure
    return point_plot(title, caption, series, x=unit, rows=names, log_x=log, references=references, wide=wide)


def _over_depth(
    title: str, caption: str, comparison: RunComparison, points: Callable[[ComparedRun], list[tuple[int, float]]]
) -> list[SvgFigure]:
    """A series per run. points: (decoder block, error)."""
    labels, found = map(comparison.label, comparison.finished), map(points, comparison.finished)
    series = [
        Series(label, [block for block, _ in each], [error for _, error in each])
        for label, each in zip(labels, found, strict=True)
    ]
    return point_plot(title, caption, series, x="decoder block", y="error", log_y=True)


def _medians(run: ComparedRun) -> list[tuple[int, float]]:
    blocks = grouped(run.layers, lambda layer: layer.block)
    return [(block, statistics.median(layer.output_error for layer in blocks[block])) for block in sorted(blocks)]


def _accumulated(run: ComparedRun) -> list[tuple[int, float]]:
    return [(block.block, block.output_error) for block in run.blocks]


def _by_kind(comparison: RunComparison) -> list[SvgFigure]:
    """A row per kind, a point per run."""
    kinds = comparison.kind_errors()
    series = [
        Series(comparison.label(run), [errors[index] for errors in kinds.values()], range(len(kinds)))
        for index, run in enumerate(comparison.finished)
    ]
    caption = "E_y: median over the layers that all runs have"
    return point_plot("Output error by kind", caption, series, x="E_y", rows=list(kinds), log_x=True)
