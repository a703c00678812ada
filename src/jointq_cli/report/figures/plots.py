"""The two plots that all figures are: points with error bars and lines, and a heat map. Knows no record."""

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.ticker import MaxNLocator, NullLocator

from jointq_cli.report.figures import style
from jointq_cli.report.figures.style import SvgFigure
from jointq_cli.report.number_format import plural

WIDE, HALF, HEIGHT = 9.6, 4.7, 3.5  # inches
ROW = 0.36  # inches
CHARACTER = 0.088  # inches; of a digit, letters are narrower on average
MOST_LEGEND = 30  # characters in a line of a name
MOST_COLUMNS = 40  # of a heat map whose cells have room for text


@dataclass(frozen=True)
class Series:
    """Points of one colour and marker. label: in the legend, None for none.

    errors: the standard error of each y, in a plot with rows of each x. Neighbours that differ by no more than their
    errors together are not joined by the line.
    """

    label: str | None
    x: Sequence[float]
    y: Sequence[float]
    errors: Sequence[float] = ()
    line: Literal["solid", "dotted", "none"] = "solid"


def point_plot(
    title: str,
    caption: str,
    series: Sequence[Series],
    *,
    x: str,
    y: str = "",
    rows: Sequence[str] = (),
    log_x: bool = False,
    log_y: bool = False,
    ticks: Sequence[float] = (),
    references: Sequence[float] = (),
    rings: Sequence[tuple[float, float]] = (),
    colours: int = 64,
    wide: bool = True,
) -> list[SvgFigure]:
    """A figure of all points that fit its axes; none without any, and the caption says how many do not.

    x, y: what the axes show. rows: their names, from above, in place of a y axis; the y of a point is the index of its
    row. ticks: of the x axis. references: values of x that get a broken line. rings: points that get a circle.
    colours: after how many series colours and markers begin anew.
    """
    drawn = [_fitting(one, log_x, log_y) for one in series]
    points = [point for one in drawn for point in zip(one.x, one.y, strict=True)]
    if not points:
        return []
    rows = [_wrapped(row) for row in rows]
    height = 0.75 + ROW * sum(1 + row.count("\n") / 2 for row in rows) if rows else HEIGHT
    legend = max((_breadth(_wrapped(one.label)) for one in drawn if one.label and one.x), default=0)
    left = 0.25 + CHARACTER * max(map(_breadth, rows)) if rows else 0.85
    right = 0.45 + CHARACTER * legend if legend else 0.2
    with style.styled_axes(WIDE if wide else HALF, height, left=left, right=right) as axes:
        if log_x:
            axes.set_xscale("log")
            style.log_ticks(axes.xaxis, [*ticks, *references, *(point[0] for point in points)])
        if log_y:
            axes.set_yscale("log")
            style.log_ticks(axes.yaxis, [point[1] for point in points])
        for index, one in enumerate(drawn):
            if one.x:
                _draw(axes, one, index % colours, in_rows=bool(rows))
        for value in references:
            axes.axvline(value, color=style.FAINT, linewidth=1.0, linestyle="--", zorder=0)
        for ring in rings:
            axes.plot(*ring, color=style.INK, marker="o", markersize=12, markerfacecolor="none", markeredgewidth=1.5)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if rows:
            axes.set_yticks(range(len(rows)), rows)
            axes.set_ylim(len(rows) - 0.5, -0.5)
        if ticks:
            axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
            axes.xaxis.set_minor_locator(NullLocator())
        elif not log_x and all(value == int(value) for value, _ in points):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if legend:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        lost = sum(len(one.x) for one in series) - len(points)
        note = f". {plural(lost, 'point')} that no such axis can show left out" if lost else ""
        return [SvgFigure(title, caption + note, style.svg_of(axes, title), wide)]


def heat_map(
    title: str,
    caption: str,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    *,
    x: str,
    text: Callable[[float], str] = "{:g}".format,
) -> list[SvgFigure]:
    """A figure of a cell per value, the larger the darker; NaN is left blank, and without any number there is none.

    values: of each row a number per column; columns are numbered. x: what is numbered. text: of a cell, where there is
    room for it.
    """
    numbers = [value for row in values for value in row if math.isfinite(value)]
    if not numbers:
        return []
    columns = len(values[0])
    left = 0.25 + CHARACTER * max(map(len, rows))
    with style.styled_axes(WIDE, 0.75 + ROW * len(rows), left=left) as axes:
        ink = to_rgb(style.SERIES[0])
        shades = LinearSegmentedColormap.from_list("shades", [(*ink, 0.08), (*ink, 0.8)])
        axes.pcolormesh(values, cmap=shades, vmin=min(numbers), vmax=max(numbers), edgecolors="none")
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                if columns <= MOST_COLUMNS and math.isfinite(value):
                    axes.text(column + 0.5, row + 0.5, text(value), ha="center", va="center", fontsize=8)
        axes.grid(visible=False)
        axes.set_xlabel(x)
        shown = range(0, columns, max(1, columns // 16))
        axes.set_xticks([column + 0.5 for column in shown], [str(column) for column in shown])
        axes.set_yticks([row + 0.5 for row in range(len(rows))], rows)
        axes.invert_yaxis()
        return [SvgFigure(title, caption, style.svg_of(axes, title), wide=True)]


def _fitting(series: Series, log_x: bool, log_y: bool) -> Series:
    errors = series.errors or [0.0] * len(series.x)
    points = [
        (x, y, error if math.isfinite(error) else 0.0)
        for x, y, error in zip(series.x, series.y, errors, strict=True)
        if (style.fits_log_axis(x) if log_x else math.isfinite(x))
        and (style.fits_log_axis(y) if log_y else math.isfinite(y))
    ]
    xs, ys, spreads = map(list, zip(*points, strict=True)) if points else ([], [], [])
    return replace(series, x=xs, y=ys, errors=spreads if series.errors else [])


def _draw(axes: Axes, series: Series, index: int, *, in_rows: bool) -> None:
    colour, marker = style.series_style(index)
    if series.line == "dotted":
        axes.plot(series.x, series.y, color=colour, linestyle=":", linewidth=1.4, label=_wrapped(series.label) or None)
        return
    if series.line == "solid" and not in_rows:
        axes.plot(*_joined(series), color=colour, linewidth=1.0, alpha=0.5)
    errors = series.errors or None
    axes.errorbar(
        series.x, series.y, xerr=errors if in_rows else None, yerr=None if in_rows else errors, color=colour,
        marker=marker, markersize=5, linestyle="none", capsize=3, elinewidth=1.0, label=_wrapped(series.label) or None,
    )  # fmt: skip


def _joined(series: Series) -> tuple[list[float], list[float]]:
    """The points of the line, which NaN interrupts between neighbours that their errors do not distinguish."""
    xs, ys = list(series.x[:1]), list(series.y[:1])
    for at in range(1, len(series.x)):
        if series.errors and abs(series.y[at] - series.y[at - 1]) <= series.errors[at] + series.errors[at - 1]:
            xs, ys = [*xs, math.nan], [*ys, math.nan]
        xs, ys = [*xs, series.x[at]], [*ys, series.y[at]]
    return xs, ys


def _wrapped(label: str | None) -> str:
    """In lines that leave room for the points."""
    return textwrap.fill(label or "", MOST_LEGEND)


def _breadth(text: str) -> int:
    """Of the longest line, in characters."""
    return max(map(len, text.splitlines()), default=0)
