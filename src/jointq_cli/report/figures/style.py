"""What every picture is drawn on: a figure in the house style that ends as inline SVG, and its axes.

No fixed colours, no fonts, no dates, no addresses: colours are CSS variables of the page, so that one picture serves
light and dark. Knows matplotlib, which it imports, and no record: whoever wants no picture should not import this.
"""

import math
import re
import warnings
from collections.abc import Iterable, Sequence
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

from jointq_cli.report import number_format as units

# matplotlib wants real colours. These stand for CSS variables, which take their place in the finished SVG.
INK, FAINT, GRID, BAD = "#010101", "#010102", "#010103", "#010104"
SERIES = tuple(f"#0102{index:02x}" for index in range(8))
VARIABLES = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    GRID: "var(--grid)",
    BAD: "var(--bad)",
    **{colour: f"var(--series-{index})" for index, colour in enumerate(SERIES)},
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # beside the colour, for eyes and printers without it
WIDE, HALF = (9.6, 3.7), (4.7, 3.1)  # inches
FAR_APART = 5  # ratio of two perplexities from which on only a logarithmic axis shows both
ACCUMULATED = (
    "|quantised - original|\u00b2 / |original|\u00b2 of what leaves each block, all blocks up to it quantised, "
    "on the first batch of calibration windows"
)
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
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
class Picture:
    """One picture with the words around it."""

    title: str
    caption: str
    svg: str
    wide: bool


class Canvas:
    """A figure in the house style, whatever the user's own matplotlib settings are."""

    def __init__(self, inches: tuple[float, float]) -> None:
        self._inches = inches

    def __enter__(self) -> "Canvas":
        self._settings = matplotlib.rc_context()
        self._settings.__enter__()
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        self._figure = Figure(figsize=self._inches, layout="constrained")
        FigureCanvasSVG(self._figure)
        self.axes: Axes = self._figure.add_subplot()
        return self

    def __exit__(self, *unused: Any) -> None:
        self._settings.__exit__(None, None, None)

    def svg(self, name: str, tips: dict[str, list[str]]) -> str:
        """The <svg> element. name: what its ids are derived from, so that they differ between pictures.

        tips: by the id of a group of points, what each of them says under the mouse.
        """
        matplotlib.rcParams["svg.hashsalt"] = name
        buffer = StringIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a layout too narrow for its labels is no trouble of the user
            self._figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        return _inline(buffer.getvalue(), name, tips)


def _inline(document: str, name: str, tips: dict[str, list[str]]) -> str:
    """matplotlib's SVG file as an element of a page."""
    svg = document[document.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    for group, texts in tips.items():
        svg = _with_tips(svg, group, texts)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r'\sid="([^"]*)"', lambda match: match.group(0) if match.group(1) in used else "", svg)
    svg = re.sub(r'(width|height)="[\d.]+pt"\s?', "", svg, count=2)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(name)}" ', 1)


def _with_tips(svg: str, group: str, texts: Iterable[str]) -> str:
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
    """A tick's value with as many digits as it has: 2e-3, 1.5e-2."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def log_ticks(axis: Axis, values: Sequence[float]) -> None:
    """Ticks such as "2e-4", at as many digits of each power of ten as the range of `values` has room for."""
    decades = math.log10(max(values) / min(values))
    digits = (1.0,) if decades > 2.5 else (1.0, 2.0, 5.0) if decades > 0.6 else tuple(map(float, range(1, 10)))
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value >= 0.01 else _power(value)))
    axis.set_minor_formatter(NullFormatter())


def depth_axis(axes: Axes) -> None:
    """Blocks to the right, whole ones."""
    axes.set_xlabel("decoder block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def depth_axes(axes: Axes, values: Sequence[float], symbol: str) -> None:
    """Decoder blocks to the right, errors upwards on a logarithmic axis. values: those that are drawn."""
    axes.set_yscale("log")
    log_ticks(axes.yaxis, values)
    axes.set_ylabel(symbol)
    depth_axis(axes)


def draw_over_depth(
    axes: Axes, depths: Sequence[int], errors: Sequence[float], look: tuple[str, str], label: str | None, gid: str
) -> None:
    """look: colour and marker. gid: the id of the points, for their tips."""
    colour, marker = look
    # The thin line leads the eye; the points carry the tips.
    axes.plot(depths, errors, color=colour, linewidth=0.8, alpha=0.35)
    axes.plot(depths, errors, color=colour, marker=marker, markersize=4.5, linestyle="none", label=label, gid=gid)


def look(index: int) -> tuple[str, str]:
    """Colour and marker of a series: 64 pairs, of which the first eight share nothing."""
    return SERIES[index % len(SERIES)], MARKERS[(index + index // len(SERIES)) % len(MARKERS)]


def spread_axis(axes: Axes, values: Sequence[float]) -> None:
    """Makes the axis to the right logarithmic where `values` are too far apart for any other."""
    if max(values) > FAR_APART * min(values):
        axes.set_xscale("log")
        log_ticks(axes.xaxis, values)


def with_error_bar(axes: Axes, row: float, value: float, standard_error: float, look: tuple[str, str]) -> None:
    """A point with its bar and, above it, both as text."""
    spread = standard_error if math.isfinite(standard_error) else 0.0
    colour, marker = look
    axes.errorbar(value, row, xerr=spread, fmt=marker, color=colour, markersize=8, capsize=5, linewidth=1.8)
    text = units.plus_minus(value, standard_error)
    axes.annotate(text, (value, row), xytext=(0, 12), textcoords="offset points", ha="center")


def left_out(count: int, noun: str) -> str:
    """The end of a caption: ". 2 layers without a positive error are not drawn", or nothing."""
    if not count:
        return ""
    verb = "is" if count == 1 else "are"
    return f". {units.plural(count, noun)} without a positive error {verb} not drawn"
