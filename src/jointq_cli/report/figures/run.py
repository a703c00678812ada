"""The pictures of one run's report. Knows the records; what they are drawn on is `canvas`, which brings matplotlib."""

import math
from collections.abc import Callable, Iterable, Sequence

from matplotlib.axes import Axes

from jointq_cli.records import BlockRecord, LayerRecord, RunReport
from jointq_cli.report import number_format as units
from jointq_cli.report.compare import summary
from jointq_cli.report.figures.rotation import draw_rotation
from jointq_cli.report.figures.style import (
    ACCUMULATED,
    BAD,
    FAINT,
    HALF,
    SERIES,
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


def draw_pictures(report: RunReport) -> list[Picture]:
    """Every picture for which the report has something to show."""
    layers = report.layers
    return [
        *_over_depth("E_y", "Output error over depth", layers, _output_error, "Relative error of each layer's output"),
        *_over_depth("E_w", "Weight error over depth", layers, _weight_error, "Relative error of each weight matrix"),
        *_accumulated(report.blocks),
        *(draw_rotation(report.rotation) if report.rotation else []),
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
    shown = [layer for layer in layers if fits_log_axis(error(layer))]
    if not shown:
        return []
    with Canvas(WIDE) as canvas:
        axes = canvas.axes
        tips: dict[str, list[str]] = {}
        for index, (kind, members) in enumerate(_by_kind_name(shown).items()):
            members = sorted(members, key=lambda layer: layer.block)
            group = f"{symbol}-{index}"
            depths, errors = [layer.block for layer in members], [error(layer) for layer in members]
            draw_over_depth(axes, depths, errors, look(index), label=kind, gid=group)
            tips[group] = [f"{layer.name}: {symbol} {units.relative_error(error(layer))}" for layer in members]
        _mark_fallbacks(axes, shown, error)
        depth_axes(axes, [error(layer) for layer in shown], symbol)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handletextpad=0.2)
        svg = canvas.svg(f"depth {symbol}", tips)
    return [Picture(title, meaning + left_out(len(layers) - len(shown), "layer"), svg, wide=True)]


def _accumulated(blocks: Sequence[BlockRecord]) -> list[Picture]:
    shown = [block for block in blocks if fits_log_axis(block.output_error)]
    if not shown:
        return []
    with Canvas(WIDE) as canvas:
        axes = canvas.axes
        errors = [block.output_error for block in shown]
        depths = [block.block for block in shown]
        draw_over_depth(axes, depths, errors, look(0), label=None, gid="blocks")
        depth_axes(axes, errors, "error")
        tips = [f"block {block.block}: {units.relative_error(block.output_error)}" for block in shown]
        svg = canvas.svg("accumulated", {"blocks": tips})
    return [Picture("Accumulated error over depth", ACCUMULATED, svg, wide=True)]


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
    shown = [layer for layer in layers if fits_log_axis(layer.output_error)]
    if not shown:
        return []
    kinds = _by_kind_name(shown)
    with Canvas(HALF) as canvas:
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
        log_ticks(axes.xaxis, [layer.output_error for layer in shown])
        axes.set_yticks(rows, list(kinds))
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("E_y")
        svg = canvas.svg("kinds", {})
    caption = "Output error by kind of layer: box from quartile to quartile, the thick line is the median"
    return [Picture("Output error by kind", caption + left_out(len(layers) - len(shown), "layer"), svg, wide=False)]


def _perplexities(report: RunReport) -> list[Picture]:
    models = (("original", report.original, (FAINT, "o")), ("quantised", report.quantized, look(0)))
    shown = [entry for entry in models if fits_log_axis(entry[1].value)]
    if len(shown) < len(models):
        return []
    values = [perplexity.value for _, perplexity, _ in shown]
    with Canvas(HALF) as canvas:
        axes = canvas.axes
        spread_axis(axes, values)
        for row, (_, perplexity, style) in zip((1, 0), shown, strict=True):
            with_error_bar(axes, row, perplexity.value, perplexity.standard_error, style)
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


def _times(report: RunReport) -> list[Picture]:
    stages = [stage for stage in report.stages if math.isfinite(stage.seconds)]
    if not stages:
        return []
    with Canvas((WIDE[0], 0.9 + 0.34 * len(stages))) as canvas:
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


def _by_kind_name(layers: Iterable[LayerRecord]) -> dict[str, list[LayerRecord]]:
    kinds: dict[str, list[LayerRecord]] = {}
    for layer in layers:
        kinds.setdefault(layer.kind, []).append(layer)
    return kinds


def _spread(row: float, count: int) -> list[float]:
    """Heights around `row` that keep `count` points apart; the same each time."""
    return [row + 0.18 * math.sin(2.4 * index) for index in range(count)]
