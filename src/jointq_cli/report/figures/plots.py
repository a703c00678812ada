"""Plots that several figures share: series over depth, and values with error bars. Knows no record."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from jointq_cli.report.figures import style
from jointq_cli.report.figures.style import SvgFigure
from jointq_cli.report.number_format import plus_minus

ACCUMULATED = (
    "|quantised - original|² / |original|² of what leaves each block, all blocks up to it quantised, "
    "on the first batch of calibration windows"
)


@dataclass(frozen=True)
class Series:
    """Points of one colour and marker."""

    label: str | None  # in the legend
    points: list[tuple[float, float, str]]  # (x, y, tooltip)


@dataclass(frozen=True)
class MeasuredValue:
    """A row of an error bar plot."""

    label: str
    value: float
    standard_error: float
    colour_and_marker: tuple[str, str]


def draw_series(axes: Axes, series: Sequence[Series], gid: str) -> dict[str, list[str]]:
    """Draws each series as markers on a thin line. Returns the tooltips for `svg_figure`, by ids that begin with
    `gid`."""
    for index, line in enumerate(series):
        colour, marker = style.series_style(index)
        x, y = [x for x, _, _ in line.points], [y for _, y, _ in line.points]
        axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.35)
        axes.plot(
            x, y, color=colour, marker=marker, markersize=4.5, linestyle="none", label=line.label, gid=f"{gid}-{index}"
        )
    return {f"{gid}-{index}": [text for _, _, text in line.points] for index, line in enumerate(series)}


def errors_over_depth(
    title: str, caption: str, symbol: str, series: Sequence[Series], fallbacks: Sequence[tuple[float, float]] = ()
) -> list[SvgFigure]:
    """Errors on a logarithmic axis over decoder blocks; nothing without any error that fits such an axis.

    symbol: the label of the y axis. fallbacks: (block, error) of layers that fell back to RTN, which get a circle.
    """
    series = [Series(line.label, [point for point in line.points if style.fits_log_axis(point[1])]) for line in series]
    errors = [error for line in series for _, error, _ in line.points]
    if not errors:
        return []
    with style.styled_axes(style.WIDE) as axes:
        tooltips = draw_series(axes, series, gid=title)
        if fallbacks:
            axes.plot(
                *map(list, zip(*fallbacks, strict=True)), color=style.BAD, marker="o", markersize=11,
                markerfacecolor="none", markeredgewidth=1.6, linestyle="none", label="fallback",
            )  # fmt: skip
        axes.set_yscale("log")
        style.log_ticks(axes.yaxis, errors)
        axes.set_ylabel(symbol)
        style.depth_axis(axes)
        if any(line.label for line in series):
            style.legend_beside(axes)
        return [style.svg_figure(axes, title, caption, tooltips)]


def error_bars(
    title: str,
    caption: str,
    unit: str,
    rows: Sequence[MeasuredValue],
    inches: tuple[float, float],
    references: Sequence[float] = (),
) -> list[SvgFigure]:
    """A row per value, with its standard error; nothing without any value that can be drawn.

    The axis is logarithmic if the values are far apart. references: values that get a vertical line.
    """
    shown = [(-index, row) for index, row in enumerate(rows) if style.fits_log_axis(row.value)]
    if not shown:
        return []
    with style.styled_axes(inches) as axes:
        values = [*references, *(row.value for _, row in shown)]
        if max(values) > style.FAR_APART * min(values):
            axes.set_xscale("log")
            style.log_ticks(axes.xaxis, values)
        for value in references:
            axes.axvline(value, color=style.FAINT, linewidth=1.0, zorder=0, linestyle="--")
        for height, row in shown:
            colour, marker = row.colour_and_marker
            spread = row.standard_error if math.isfinite(row.standard_error) else 0.0
            axes.errorbar(
                row.value, height, xerr=spread, fmt=marker, color=colour, markersize=8, capsize=5, linewidth=1.8
            )
            text = plus_minus(row.value, row.standard_error)
            axes.annotate(text, (row.value, height), xytext=(0, 12), textcoords="offset points", ha="center")
        axes.set_yticks([-index for index in range(len(rows))], [row.label for row in rows])
        axes.set_ylim(-len(rows) + 0.4, 0.75)
        axes.margins(x=0.25)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(unit)
        return [style.svg_figure(axes, title, caption, wide=inches[0] == style.WIDE[0])]
