"""The pictures of a report as inline SVG: no fixed colours, no fonts, no dates, no addresses.

Knows the records and matplotlib, which it imports: whoever wants no picture should not import this module.
Colours are CSS variables of the page, so that one picture serves light and dark.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
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

from jointq_cli.records import BlockRecord, LayerRecord, Perplexity, RunReport
from jointq_cli.report import summary, units

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


def draw_pictures(report: RunReport) -> list[Picture]:
    """Every picture for which the report has something to show."""
    layers = report.layers
    return [
        *_over_depth("E_y", "Output error over depth", layers, _output_error, "Relative error of each layer's output"),
        *_over_depth("E_w", "Weight error over depth", layers, _weight_error, "Relative error of each weight matrix"),
        *_accumulated(report.blocks),
        *_by_kind(layers),
        *_perplexities(report),
        *_times(report),
    ]


def _output_error(layer: LayerRecord) -> float:
    return layer.output_error


def _weight_error(layer: LayerRecord) -> float:
    return layer.weight_error


def _over_depth(
    symbol: str,
    title: str,
    layers: Sequence[LayerRecord],
    error: Callable[[LayerRecord], float],
    meaning: str,
) -> list[Picture]:
    shown = [layer for layer in layers if _fits_log_axis(error(layer))]
    if not shown:
        return []
    with _canvas(WIDE) as canvas:
        axes = canvas.axes
        tips: dict[str, list[str]] = {}
        for index, (kind, members) in enumerate(_by_kind_name(shown).items()):
            members = sorted(members, key=lambda layer: layer.block)
            group = f"{symbol}-{index}"
            depths, errors = [layer.block for layer in members], [error(layer) for layer in members]
            colour, marker = SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]
            # The thin line leads the eye; the points carry the tips.
            axes.plot(depths, errors, color=colour, linewidth=0.8, alpha=0.35)
            axes.plot(
                depths,
                errors,
                color=colour,
                marker=marker,
                markersize=4.5,
                linestyle="none",
                label=kind,
                gid=group,
            )
            tips[group] = [f"{layer.name}: {symbol} {units.relative_error(error(layer))}" for layer in members]
        _mark_fallbacks(axes, shown, error)
        axes.set_yscale("log")
        _log_ticks(axes.yaxis, [error(layer) for layer in shown])
        axes.set_xlabel("decoder block")
        axes.set_ylabel(symbol)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handletextpad=0.2)
        svg = canvas.svg(f"depth {symbol}", tips)
    return [Picture(title, meaning + _left_out(len(layers) - len(shown)), svg, wide=True)]


def _accumulated(blocks: Sequence[BlockRecord]) -> list[Picture]:
    shown = [block for block in blocks if _fits_log_axis(block.output_error)]
    if not shown:
        return []
    with _canvas(WIDE) as canvas:
        axes = canvas.axes
        errors = [block.output_error for block in shown]
        depths = [block.block for block in shown]
        axes.plot(depths, errors, color=SERIES[0], linewidth=0.8, alpha=0.35)
        axes.plot(depths, errors, color=SERIES[0], marker="o", markersize=4.5, linestyle="none", gid="blocks")
        axes.set_yscale("log")
        _log_ticks(axes.yaxis, errors)
        axes.set_xlabel("decoder block")
        axes.set_ylabel("error")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        tips = [f"block {block.block}: {units.relative_error(block.output_error)}" for block in shown]
        svg = canvas.svg("accumulated", {"blocks": tips})
    caption = "|quantised - original|\u00b2 / |original|\u00b2 of what leaves each block, all blocks up to it quantised"
    return [Picture("Accumulated error over depth", caption, svg, wide=True)]


def _mark_fallbacks(axes: Axes, layers: Sequence[LayerRecord], error: Callable[[LayerRecord], float]) -> None:
    fallen = [layer for layer in layers if layer.verdict == summary.FALLBACK]
    if fallen:
        axes.plot(
            [layer.block for layer in fallen],
            [error(layer) for layer in fallen],
            color=BAD,
            marker="o",
            markersize=11,
            markerfacecolor="none",
            markeredgewidth=1.6,
            linestyle="none",
            label="fallback",
        )


def _by_kind(layers: Sequence[LayerRecord]) -> list[Picture]:
    shown = [layer for layer in layers if _fits_log_axis(layer.output_error)]
    if not shown:
        return []
    kinds = _by_kind_name(shown)
    with _canvas(HALF) as canvas:
        axes = canvas.axes
        rows = list(range(len(kinds)))[::-1]
        for index, (row, members) in enumerate(zip(rows, kinds.values(), strict=True)):
            errors = [layer.output_error for layer in members]
            colour = SERIES[index % len(SERIES)]
            line = {"color": colour, "linewidth": 1.2}
            axes.boxplot(
                errors,
                positions=[row],
                orientation="horizontal",
                widths=0.55,
                showfliers=False,
                boxprops=line,
                whiskerprops=line,
                capprops=line,
                medianprops={"color": colour, "linewidth": 2.4},
            )
            axes.plot(
                errors,
                _spread(row, len(errors)),
                ".",
                color=colour,
                markersize=5,
                alpha=0.5,
                markeredgewidth=0,
            )
        axes.set_xscale("log")
        _log_ticks(axes.xaxis, [layer.output_error for layer in shown])
        axes.set_yticks(rows, list(kinds))
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("E_y")
        svg = canvas.svg("kinds", {})
    caption = "Output error by kind of layer: box from quartile to quartile, the thick line is the median"
    return [Picture("Output error by kind", caption + _left_out(len(layers) - len(shown)), svg, wide=False)]


def _perplexities(report: RunReport) -> list[Picture]:
    models = (("original", report.original, FAINT), ("quantised", report.quantized, SERIES[0]))
    shown = [entry for entry in models if _fits_log_axis(entry[1].value)]
    if len(shown) < len(models):
        return []
    values = [perplexity.value for _, perplexity, _ in shown]
    with _canvas(HALF) as canvas:
        axes = canvas.axes
        if max(values) > FAR_APART * min(values):
            axes.set_xscale("log")
            _log_ticks(axes.xaxis, values)
        for row, (_, perplexity, colour) in zip((1, 0), shown, strict=True):
            _with_error_bar(axes, row, perplexity, colour)
        axes.set_yticks([1, 0], [name for name, _, _ in shown])
        axes.set_ylim(-0.6, 1.75)
        axes.margins(x=0.25)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("perplexity")
        svg = canvas.svg("perplexity", {})
    caption = (
        "Bars are one standard error over windows. Both models saw the same tokens, so that the difference, "
        f"{units.change(summary.perplexity_increase(report), summary.perplexity_increase_error(report))}, "
        "is known far better than either."
    )
    return [Picture("Perplexity", caption, svg, wide=False)]


def _with_error_bar(axes: Axes, row: int, perplexity: Perplexity, colour: str) -> None:
    spread = perplexity.standard_error if math.isfinite(perplexity.standard_error) else 0.0
    axes.errorbar(perplexity.value, row, xerr=spread, fmt="o", color=colour, markersize=8, capsize=5, linewidth=1.8)
    text = units.plus_minus(perplexity.value, perplexity.standard_error)
    axes.annotate(text, (perplexity.value, row), xytext=(0, 12), textcoords="offset points", ha="center")


def _times(report: RunReport) -> list[Picture]:
    stages = [stage for stage in report.stages if math.isfinite(stage.seconds)]
    if not stages:
        return []
    with _canvas((WIDE[0], 0.9 + 0.34 * len(stages))) as canvas:
        axes = canvas.axes
        rows = list(range(len(stages)))[::-1]
        seconds = [0.0 if stage.reused else stage.seconds for stage in stages]
        axes.barh(rows, seconds, color=SERIES[0], height=0.6)
        for row, width, stage in zip(rows, seconds, stages, strict=True):
            text = "reused" if stage.reused else units.duration(stage.seconds)
            axes.annotate(text, (width, row), xytext=(5, 0), textcoords="offset points", va="center")
        axes.set_yticks(rows, [stage.name for stage in stages])
        axes.set_xlim(0, 1.15 * max(seconds) or 1.0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("seconds")
        svg = canvas.svg("times", {})
    total = units.duration(summary.total_seconds(report))
    return [Picture("Where the time went", f"{total} in all; reused stages cost nothing this time", svg, wide=True)]


class _canvas:
    """A figure in the house style, whatever the user's own matplotlib settings are."""

    def __init__(self, inches: tuple[float, float]) -> None:
        self._inches = inches

    def __enter__(self) -> "_canvas":
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


def _by_kind_name(layers: Iterable[LayerRecord]) -> dict[str, list[LayerRecord]]:
    kinds: dict[str, list[LayerRecord]] = {}
    for layer in layers:
        kinds.setdefault(layer.kind, []).append(layer)
    return kinds


def _fits_log_axis(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _power(value: float) -> str:
    """A tick's value with as many digits as it has: 2e-3, 1.5e-2."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _log_ticks(axis: Axis, values: Sequence[float]) -> None:
    """Ticks such as "2e-4", at as many digits of each power of ten as the range of `values` has room for."""
    decades = math.log10(max(values) / min(values))
    digits = (1.0,) if decades > 2.5 else (1.0, 2.0, 5.0) if decades > 0.6 else tuple(map(float, range(1, 10)))
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value >= 0.1 else _power(value)))
    axis.set_minor_formatter(NullFormatter())


def _left_out(count: int) -> str:
    if not count:
        return ""
    verb = "is" if count == 1 else "are"
    return f". {units.plural(count, 'layer')} without a positive error {verb} not drawn"


def _spread(row: float, count: int) -> list[float]:
    """Heights around `row` that keep `count` points apart; the same each time."""
    return [row + 0.18 * math.sin(2.4 * index) for index in range(count)]
