"""The two plots that all figures are, points with error bars and lines and a heat map, in one style. Knows no record.

Importing matplotlib takes half a second, so modules of this folder are imported only where figures are drawn.
"""

import math
import textwrap
from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from jointq_cli.report.number_format import plural, scientific

INK, FAINT, GRID = "#1d1d21", "#6d6d76", "#d4d4d0"
COLOURS = ("#2f63c9", "#d86f1c", "#1f9268", "#ad3f93", "#937300", "#1690ab", "#6a57cc", "#73737d")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # in addition to colours, for readers and printers without colour
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in a font of the reader's
    "svg.hashsalt": "jointq",  # the same file every time
    "figure.constrained_layout.use": True,
    "text.color": INK, "axes.labelcolor": INK, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "axes.edgecolor": FAINT, "xtick.color": FAINT, "ytick.color": FAINT, "grid.color": GRID, "grid.linewidth": 0.6,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "legend.frameon": False, "legend.handletextpad": 0.2,
}  # fmt: skip
WIDTH, HEIGHT, ROW = 9.6, 3.5, 0.3  # inches
MOST_NAME = 30  # characters in a line of a name
MOST_TICKS = 12  # up to so many values of x, each has its tick
MOST_COLUMNS = 40  # of a heat map whose cells have room for text
FAR_APART = 8  # ratio of the largest to the smallest value above which an axis is logarithmic


@dataclass(frozen=True)
class SvgFigure:
    """A finished figure."""

    title: str
    caption: str
    svg: str

    @property
    def address(self) -> str:
        """The image itself as a data URL, which a page needs no other file for. Pages invert it in dark mode."""
        return f"data:image/svg+xml;base64,{b64encode(self.svg.encode()).decode()}"


@dataclass(frozen=True)
class Series:
    """Points of one colour and marker. label: in the legend, None for none. points: (x, y).

    errors: the standard error of each y, in a plot with rows of each x. Neighbours that differ by no more than their
    errors together are not joined by the line. rings: circles around points of other series.
    """

    label: str | None
    points: Sequence[tuple[float, float]]
    errors: Sequence[float] = ()
    line: Literal["solid", "dotted", "none", "rings"] = "solid"


def point_plot(
    title: str, caption: str, series: Sequence[Series], *, x: str, y: str = "", rows: Sequence[str] = (),
    log_x: bool = False, log_y: bool = False, references: Sequence[float] = (), colours: int = 64,
) -> list[SvgFigure]:  # fmt: skip
    """A figure of all points that fit its axes; none without any, and the caption says how many do not.

    x, y: what the axes show. rows: their names, from above, in place of a y axis; the y of a point is the index of its
    row. references: values of x that get a broken line. colours: after how many series colours begin anew.
    """
    drawn = [_fitting(one, log_x, log_y) for one in series]
    points = [point for one in drawn for point in one.points]
    if not points:
        return []
    height = HEIGHT if not rows else 0.9 + ROW * sum(1 + _wrapped(row).count("\n") for row in rows)
    with _axes(height) as (figure, axes):
        axes.set(xlabel=x, ylabel=y, xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
        for index, one in enumerate(drawn):
            if one.points:
                _draw(axes, one, *series_style(index % colours), in_rows=bool(rows))
        for value in references:
            axes.axvline(value, color=FAINT, linewidth=1.0, linestyle="--", zorder=0)
        _ticks(axes.xaxis, [*references, *(point[0] for point in points)], log=log_x, each=not rows)
        if rows:
            axes.set_yticks(range(len(rows)), list(map(_wrapped, rows)))
            axes.set_ylim(len(rows) - 0.5, -0.5)
        elif log_y:
            _ticks(axes.yaxis, [point[1] for point in points], log=True, each=False)
        if any(one.label for one in drawn if one.points):
            figure.legend(loc="outside right center")
        lost = sum(len(one.points) for one in series) - len(points)
        note = f". {plural(lost, 'point')} that no such axis can show left out" if lost else ""
        return [SvgFigure(title, caption + note, _svg(figure))]


def heat_map(
    title: str, caption: str, values: Sequence[Sequence[float]], rows: Sequence[str], *, x: str,
) -> list[SvgFigure]:  # fmt: skip
    """A figure of a cell per value, the larger the darker; NaN is left blank, and without any number there is none.

    values: of each row a number per column; columns are numbered. x: what is numbered.
    """
    cells = [(at, row, value) for row, line in enumerate(values) for at, value in enumerate(line) if value == value]
    if not cells:
        return []
    shades = LinearSegmentedColormap.from_list("shades", [(*to_rgb(COLOURS[0]), alpha) for alpha in (0.08, 0.6)])
    with _axes(0.9 + ROW * len(rows)) as (figure, axes):
        axes.imshow(values, cmap=shades, aspect="auto", interpolation="none")
        for column, row, value in cells if len(values[0]) <= MOST_COLUMNS else []:
            axes.text(column, row, f"{value:.3g}", ha="center", va="center", fontsize=8)
        axes.grid(visible=False)
        axes.set_xlabel(x)
        axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
        axes.set_yticks(range(len(rows)), rows)
        return [SvgFigure(title, caption, _svg(figure))]


def fits_log_axis(value: float) -> bool:
    return math.isfinite(value) and value > 0


def far_apart(values: Iterable[float]) -> bool:
    """Whether a logarithmic axis shows these values better."""
    numbers = [value for value in values if math.isfinite(value)]
    return bool(numbers) and min(numbers) > 0 and max(numbers) >= FAR_APART * min(numbers)


def series_style(index: int) -> tuple[str, str]:
    """Colour and marker of a series: 64 pairs; the first eight differ in both."""
    return COLOURS[index % len(COLOURS)], MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]


@contextmanager
def _axes(height: float) -> Iterator[tuple[Figure, Axes]]:
    """A new figure of this height in inches, whatever the user's own matplotlib settings are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(WIDTH, height))
        yield figure, figure.add_subplot()


def _svg(figure: Figure) -> str:
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _fitting(series: Series, log_x: bool, log_y: bool) -> Series:
    """Without the points that the axes cannot show."""
    fits_x, fits_y = (fits_log_axis if log else math.isfinite for log in (log_x, log_y))
    errors = [error if math.isfinite(error) else 0.0 for error in series.errors]
    kept = [at for at, (x, y) in enumerate(series.points) if fits_x(x) and fits_y(y)]
    points, errors = [series.points[at] for at in kept], [errors[at] for at in kept if errors]
    return Series(series.label, points, errors, series.line)


def _draw(axes: Axes, series: Series, colour: str, marker: str, *, in_rows: bool) -> None:
    label = _wrapped(series.label) if series.label else None
    x, y = map(list, zip(*series.points, strict=True))
    if series.line == "rings":
        axes.plot(x, y, "o", color=INK, markersize=12, markerfacecolor="none", label=label)
    elif series.line == "dotted":
        axes.plot(x, y, ":", color=colour, label=label)
    else:
        if series.line == "solid" and not in_rows:
            axes.plot(*zip(*_joined(series), strict=True), color=colour, linewidth=1.0, alpha=0.5)
        x_errors, y_errors = (series.errors or None, None) if in_rows else (None, series.errors or None)
        axes.errorbar(x, y, y_errors, x_errors, marker, color=colour, markersize=5, capsize=3, label=label)


def _joined(series: Series) -> Iterator[tuple[float, float]]:
    """The points of the line, which NaN interrupts between neighbours that their errors do not distinguish."""
    yield series.points[0]
    for at in range(1, len(series.points)):
        distance = abs(series.points[at][1] - series.points[at - 1][1])
        if series.errors and distance <= series.errors[at] + series.errors[at - 1]:
            yield math.nan, math.nan
        yield series.points[at]


def _ticks(axis: Axis, values: Sequence[float], *, log: bool, each: bool) -> None:
    """each: at the values themselves, if these are few. On a logarithmic axis texts such as "2e-4"; the smaller the
    range, the more ticks per power of ten."""
    if each and len(set(values)) <= MOST_TICKS:
        axis.set_ticks(sorted(set(values)), [f"{value:g}" for value in sorted(set(values))])
        axis.set_minor_locator(NullLocator())
    elif log:
        decades = math.log10(max(values) / min(values))
        digits = (1.0,) if decades > 2.5 else (1.0, 2.0, 5.0) if decades > 1 else tuple(map(float, range(1, 10)))
        narrow = decades < 0.5  # where digits from 1 to 9 would be one or two ticks
        axis.set_major_locator(MaxNLocator(6) if narrow else LogLocator(subs=digits))
        decimals = 1 if narrow else 0
        axis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:g}" if value >= 0.01 else scientific(value, decimals))
        )
        axis.set_minor_formatter(NullFormatter())
    elif all(value == int(value) for value in values):
        axis.set_major_locator(MaxNLocator(integer=True))


def _wrapped(name: str) -> str:
    """In lines that leave room for the points."""
    return textwrap.fill(name, MOST_NAME)
