"""The style of all figures, axes in that style, and their export as inline SVG.

The SVG has no fixed colours, fonts, dates or addresses: colours are CSS variables of the page, so that one figure
serves light and dark mode. Knows matplotlib and no record. Importing it takes a second, so import it only where figures
are drawn.
"""

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from jointq_cli.report.number_format import plural

# matplotlib needs real colours. These are placeholders for CSS variables, which replace them in the finished SVG.
INK, FAINT, GRID, BAD = "#010101", "#010102", "#010103", "#010104"
SERIES = tuple(f"#0102{index:02x}" for index in range(8))
VARIABLES = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    GRID: "var(--grid)",
    BAD: "var(--bad)",
    **{colour: f"var(--series-{index})" for index, colour in enumerate(SERIES)},
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # in addition to colours, for readers and printers without colour
WIDE, HALF = (9.6, 3.7), (4.7, 3.1)  # inches
FAR_APART = 5  # ratio of the largest to the smallest value above which an axis is logarithmic
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: searchable, and in the font of the page
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class SvgFigure:
    """A finished figure: an <svg> element with title and caption."""

    title: str
    caption: str
    svg: str
    wide: bool  # over the full width of the page


@contextmanager
def styled_axes(inches: tuple[float, float]) -> Iterator[Axes]:
    """The axes of a new figure in this style, whatever the user's own matplotlib settings are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=inches, layout="constrained")
        FigureCanvasSVG(figure)
        yield figure.add_subplot()


def svg_figure(
    axes: Axes, title: str, caption: str, tooltips: dict[str, list[str]] | None = None, *, wide: bool = True
) -> SvgFigure:
    """Exports axes; call it inside `styled_axes`. tooltips: one text per point, by the gid of the points."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    matplotlib.rcParams["svg.hashsalt"] = title  # ids are derived from it, so they differ between the figures of a page
    buffer = StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # that the layout is too narrow for its labels is no user's concern
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return SvgFigure(title, caption, _inline(buffer.getvalue(), title, tooltips or {}), wide)


def _inline(document: str, title: str, tooltips: dict[str, list[str]]) -> str:
    """The SVG file of matplotlib as an element of a page."""
    svg = document[document.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    for group, texts in tooltips.items():
        svg = _with_tooltips(svg, group, texts)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r'\sid="([^"]*)"', lambda match: match.group(0) if match.group(1) in used else "", svg)
    svg = re.sub(r'(width|height)="[\d.]+pt"\s?', "", svg, count=2)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def _with_tooltips(svg: str, group: str, texts: Iterable[str]) -> str:
    start = svg.find(f'<g id="{group}"')
    remaining = iter(texts)
    head, tail = svg[:start], svg[start:]

    def titled(match: re.Match[str]) -> str:
        text = next(remaining, None)
        return match.group(0) if text is None else f"{match.group(0)[:-2]}><title>{escape(text)}</title></use>"

    return head + re.sub(r"<use [^>]*/>", titled, tail) if start >= 0 else svg


def fits_log_axis(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _power(value: float) -> str:
    """Without trailing zeros: 2e-3, 1.5e-2."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def log_ticks(axis: Axis, values: Sequence[float]) -> None:
    """Ticks such as "2e-4"; the smaller the range of `values`, the more ticks per power of ten."""
    decades = math.log10(max(values) / min(values))
    digits = (1.0,) if decades > 2.5 else (1.0, 2.0, 5.0) if decades > 0.6 else tuple(map(float, range(1, 10)))
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value >= 0.01 else _power(value)))
    axis.set_minor_formatter(NullFormatter())


def depth_axis(axes: Axes) -> None:
    axes.set_xlabel("decoder block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def legend_beside(axes: Axes) -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handletextpad=0.2)


def series_style(index: int) -> tuple[str, str]:
    """Colour and marker of a series: 64 pairs; the first eight differ in both."""
    return SERIES[index % len(SERIES)], MARKERS[(index + index // len(SERIES)) % len(MARKERS)]


def not_drawn(count: int, noun: str) -> str:
    """The end of a caption: ". 2 layers without a positive error are not drawn", or nothing."""
    if not count:
        return ""
    verb = "is" if count == 1 else "are"
    return f". {plural(count, noun)} without a positive error {verb} not drawn"
