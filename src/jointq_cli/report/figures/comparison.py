"""The pictures of several runs side by side: one colour and one marker per run, the same in all of them.

Knows runs and how they compare; what they are drawn on is `canvas`, which brings matplotlib.
"""

import statistics
from collections.abc import Callable, Sequence

from jointq_cli.records import RunReport
from jointq_cli.report import number_format as units
from jointq_cli.report.compare import runs as side_by_side
from jointq_cli.report.compare.runs import Run
from jointq_cli.report.figures.style import (
    ACCUMULATED,
    FAINT,
    HALF,
    WIDE,
    Canvas,
    Picture,
    depth_axes,
    draw_over_depth,
    fits_log_axis,
    left_out,
    log_ticks,
    look,
    spread_axis,
    with_error_bar,
)
from jointq_cli.report.tables.table import labels

Points = list[tuple[int, float]]  # (decoder block, error)
ROW_HEIGHT = 0.5  # inches
LONG_NAME = 12  # characters, from which on half a page leaves no room beside the names


def draw_comparison(runs: Sequence[Run]) -> list[Picture]:
    """Every picture for which the runs have something to show."""
    return [
        *_perplexities(runs),
        *_divergences(runs),
        *_over_depth("Output error over depth", "E_y: median of each block's layers", runs, _medians),
        *_by_kind(runs),
        *_over_depth("Accumulated error over depth", ACCUMULATED, runs, _accumulated),
    ]


def _perplexities(runs: Sequence[Run]) -> list[Picture]:
    figures = [(run.report.quantized.value, run.report.quantized.standard_error) for run in runs]
    originals = sorted({run.report.original.value for run in runs if fits_log_axis(run.report.original.value)})
    caption = "± one standard error over windows; a broken line: the original model"
    return _dots("Perplexity", "perplexity", caption, runs, figures, originals)


def _divergences(runs: Sequence[Run]) -> list[Picture]:
    comparisons = [run.report.comparison for run in runs]
    figures = [(each.kl_divergence, each.kl_divergence_standard_error) for each in comparisons]
    caption = "KL(original || quantised), ± one standard error over windows"
    return _dots("KL divergence", "nats per token", caption, runs, figures, [])


def _dots(
    title: str,
    unit: str,
    caption: str,
    runs: Sequence[Run],
    figures: Sequence[tuple[float, float]],
    lines: Sequence[float],
) -> list[Picture]:
    """A row per run. figures: value and standard error of each. lines: values to draw from top to bottom."""
    shown = [(index, *figure) for index, figure in enumerate(figures) if fits_log_axis(figure[0])]
    if not shown:
        return []
    wide = any(len(run.name) > LONG_NAME for run in runs)
    with Canvas(((WIDE if wide else HALF)[0], 1.0 + ROW_HEIGHT * len(runs))) as canvas:
        axes = canvas.axes
        spread_axis(axes, [*lines, *(value for _, value, _ in shown)])
        for line in lines:
            axes.axvline(line, color=FAINT, linewidth=1.0, zorder=0, linestyle="--")
        for index, value, standard_error in shown:
            with_error_bar(axes, -index, value, standard_error, look(index))
        axes.set_yticks([-index for index in range(len(runs))], [run.name for run in runs])
        axes.set_ylim(-len(runs) + 0.4, 0.75)
        axes.margins(x=0.25)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(unit)
        svg = canvas.svg(title, {})
    return [Picture(title, caption + left_out(len(runs) - len(shown), "run"), svg, wide)]


def _over_depth(title: str, caption: str, runs: Sequence[Run], points: Callable[[RunReport], Points]) -> list[Picture]:
    """A line per run."""
    series = [[point for point in points(run.report) if fits_log_axis(point[1])] for run in runs]
    errors = [error for members in series for _, error in members]
    if not errors:
        return []
    with Canvas(WIDE) as canvas:
        axes = canvas.axes
        tips: dict[str, list[str]] = {}
        for index, (run, told, members) in enumerate(zip(runs, labels(runs), series, strict=True)):
            group = f"{title.split()[0]}-{index}"
            depths, heights = [depth for depth, _ in members], [error for _, error in members]
            draw_over_depth(axes, depths, heights, look(index), label=run.name, gid=group)
            tips[group] = [f"{told}: block {depth}, {units.relative_error(error)}" for depth, error in members]
        depth_axes(axes, errors, "error")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handletextpad=0.2)
        svg = canvas.svg(title, tips)
    return [Picture(title, caption, svg, wide=True)]


def _medians(report: RunReport) -> Points:
    blocks: dict[int, list[float]] = {}
    for layer in report.layers:
        blocks.setdefault(layer.block, []).append(layer.output_error)
    return [(block, statistics.median(errors)) for block, errors in sorted(blocks.items())]


def _accumulated(report: RunReport) -> Points:
    return [(block.block, block.output_error) for block in report.blocks]


def _by_kind(runs: Sequence[Run]) -> list[Picture]:
    """A row per kind, a point per run."""
    rows = side_by_side.kind_errors(runs)
    errors = [error for row in rows for error in row.errors if fits_log_axis(error)]
    if not errors:
        return []
    with Canvas((WIDE[0], 1.0 + 0.36 * len(rows))) as canvas:
        axes = canvas.axes
        tips: dict[str, list[str]] = {}
        for index, (run, told) in enumerate(zip(runs, labels(runs), strict=True)):
            points = [(row.errors[index], -height, row.name) for height, row in enumerate(rows)]
            points = [point for point in points if fits_log_axis(point[0])]
            colour, marker = look(index)
            group = f"kinds-{index}"
            axes.plot(
                [error for error, _, _ in points],
                [height for _, height, _ in points],
                color=colour,
                marker=marker,
                markersize=7,
                linestyle="none",
                label=run.name,
                gid=group,
            )
            tips[group] = [f"{told}: {kind}, {units.relative_error(error)}" for error, _, kind in points]
        axes.set_xscale("log")
        log_ticks(axes.xaxis, errors)
        axes.set_yticks([-height for height in range(len(rows))], [row.name for row in rows])
        axes.set_xlabel("E_y")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handletextpad=0.2)
        svg = canvas.svg("kinds of layers", tips)
    return [Picture("Output error by kind", "E_y: median over the layers that all runs have", svg, wide=True)]
