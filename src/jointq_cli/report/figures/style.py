"""The style of all figures, and their export as inline SVG.

Colours are CSS variables of the page, so that one figure serves light and dark mode; nothing is fetched from elsewhere.
Knows matplotlib and no record. Importing it takes half a second, so import it only where figures are drawn.
"""

import math
from collections.abc import Iterator, Sequence
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
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# matplotlib needs real colours. These stand for CSS variables, which replace them in the SVG.
INK, FAINT, GRID = "#010101", "#010102", "#010103"
SERIES = tuple(f"#0102{index:02x}" for index in range(8))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # in addition to colours, for readers and printers without colour
REPLACED = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    GRID: "var(--grid)",
    **{colour: f"var(--series-{index})" for index, colour in enumerate(SERIES)},
    "'DejaVu Sans', sans-serif": "system-ui, sans-serif",  # narrower, so that texts keep to their places
    ' xmlns:xlink="http://www.w3.org/1999/xlink"': "",  # HTML knows both
    ' xmlns="http://www.w3.org/2000/svg"': "",
    "xlink:href": "href",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: searchable, and in a font of the reader's
    "svg.hashsalt": "jointq",  # the same ids every time
    "font.sans-serif": ["DejaVu Sans"],
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
    "legend.handletextpad": 0.2,
}
NO_METADATA: dict[str, Any] = dict.fromkeys(["Creator", "Date", "Format", "Type"])


@dataclass(frozen=True)
class SvgFigure:
    """A finished figure: an <svg> element with title and caption."""

    title: str
    caption: str
    svg: str
    wide: bool  # over the full width of the page


@contextmanager
def styled_axes(
    width: float, height: float, *, left: float = 0.85, right: float = 0.2, bottom: float = 0.5, top: float = 0.15
) -> Iterator[Axes]:
    """The axes of a new figure in this style, whatever the user's own matplotlib settings are; all in inches.

    With given margins a figure takes half the time that matplotlib's layouts take.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        place = (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
        yield figure.add_axes(place)


def svg_of(axes: Axes, title: str) -> str:
    """The figure of axes as an element of a page; call it inside `styled_axes`. title: of no other figure of a page."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata=NO_METADATA)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for old, new in REPLACED.items():
        svg = svg.replace(old, new)
    name = title.replace(" ", "-")  # ids of a page are unique
    for start in (' id="', ' href="#', "url(#"):
        svg = svg.replace(start, f"{start}{escape(name)}-")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def fits_log_axis(value: float) -> bool:
    return math.isfinite(value) and value > 0


def log_ticks(axis: Axis, values: Sequence[float]) -> None:
    """Ticks such as "2e-4"; the smaller the range of `values`, the more ticks per power of ten."""
    decades = math.log10(max(values) / min(values))
    digits = (1.0,) if decades > 2.5 else (1.0, 2.0, 5.0) if decades > 1 else tuple(map(float, range(1, 10)))
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value >= 0.01 else _power(value)))
    axis.set_minor_formatter(NullFormatter())


def _power(value: float) -> str:
    """Without trailing zeros: 2e-3, 1.5e-2."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def series_style(index: int) -> tuple[str, str]:
    """Colour and marker of a series: 64 pairs; the first eight differ in both."""
    return SERIES[index % len(SERIES)], MARKERS[(index + index // len(SERIES)) % len(MARKERS)]
