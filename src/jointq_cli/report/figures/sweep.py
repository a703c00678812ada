"""The pictures of a sweep: what was measured over the setting that was swept, a line for every mix of the others.

Knows jobs; what they are drawn on is `canvas`, which brings matplotlib.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from jointq_cli.report import number_format as units
from jointq_cli.report.compare.sweep import SweepJob, SweepMeasurement, best
from jointq_cli.report.figures.style import INK, WIDE, Canvas, Picture, fits_log_axis, log_ticks, look
from jointq_cli.report.tables.table import tails

LEAST_POINTS = 3  # of a curve
MOST_TICKS = 12
WIDE_RANGE = 8  # ratio of the largest to the smallest value from which on the axis is logarithmic
Figure = Callable[[SweepMeasurement], tuple[float, float]]  # value and standard error


@dataclass(frozen=True)
class _Axis:
    """The swept setting: its key and, by job, its value."""

    key: str
    values: dict[int, float]

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[2]

    @property
    def logarithmic(self) -> bool:
        values = list(self.values.values())
        return min(values) > 0 and max(values) >= WIDE_RANGE * min(values)


def draw_sweep(jobs: Sequence[SweepJob]) -> list[Picture]:
    """Nothing where no setting has enough numbers for a curve, or nothing has been measured."""
    measured = [job for job in jobs if job.figure < math.inf]
    axis = _axis(measured)
    if axis is None:
        return []
    marked = best(jobs)
    pictures = [_curves(f"Perplexity over {axis.name}", "perplexity", _perplexity, axis, measured, marked)]
    if all(job.measured and job.measured.comparison for job in measured):
        title = f"KL divergence over {axis.name}"
        pictures.append(_curves(title, "nats per token", _divergence, axis, measured, marked))
    return pictures


def _perplexity(measured: SweepMeasurement) -> tuple[float, float]:
    value, comparison = measured.perplexity.value, measured.comparison
    return value, value * (comparison.nll_increase_standard_error if comparison else math.nan)


def _divergence(measured: SweepMeasurement) -> tuple[float, float]:
    assert measured.comparison is not None
    return measured.comparison.kl_divergence, measured.comparison.kl_divergence_standard_error


def _axis(jobs: Sequence[SweepJob]) -> _Axis | None:
    """The setting with the most different numbers."""
    keys = list(dict.fromkeys(key for job in jobs for key in job.settings))
    axes = [_Axis(key, _numbers(jobs, key)) for key in keys]
    axes = [axis for axis in axes if len(set(axis.values.values())) >= LEAST_POINTS]
    return max(axes, key=lambda axis: len(set(axis.values.values())), default=None)


def _numbers(jobs: Sequence[SweepJob], key: str) -> dict[int, float]:
    found = {}
    for job in jobs:
        try:
            value = float(job.settings[key])
        except (KeyError, ValueError):
            continue
        if math.isfinite(value):
            found[job.number] = value
    return found


def _curves(
    title: str, unit: str, figure: Figure, axis: _Axis, jobs: Sequence[SweepJob], marked: SweepJob | None
) -> Picture:
    lines = _lines(jobs, axis)
    drawn = [job for members in lines.values() for job in members]
    values = [figure(job.measured)[0] for job in drawn if job.measured]
    with Canvas(WIDE) as canvas:
        axes = canvas.axes
        for index, (label, members) in enumerate(lines.items()):
            colour, marker = look(index)
            points = [(axis.values[job.number], *figure(job.measured)) for job in members if job.measured]
            x, y, errors = map(list, zip(*points, strict=True))
            axes.errorbar(
                x, y, yerr=errors, color=colour, marker=marker, markersize=5, capsize=3, linewidth=1.2,
                elinewidth=1.0, label=label or None,
            )  # fmt: skip
        if marked is not None and marked.measured is not None and marked.number in axis.values:
            value = figure(marked.measured)[0]
            at = axis.values[marked.number]
            axes.plot([at], [value], marker="o", markersize=14, markerfacecolor="none", color=INK, linestyle="none")
        _values_below(axes, axis)
        if values and all(map(fits_log_axis, values)) and max(values) > WIDE_RANGE * min(values):
            axes.set_yscale("log")
            log_ticks(axes.yaxis, values)
        axes.set_xlabel(axis.name)
        axes.set_ylabel(unit)
        if len(lines) > 1:
            axes.legend()
        return Picture(title, _caption(figure, drawn), canvas.svg(title, {}), wide=True)


def _values_below(axes: Axes, axis: _Axis) -> None:
    """A tick for every value that was tried, as long as there is room for them."""
    values = sorted(set(axis.values.values()))
    if axis.logarithmic:
        axes.set_xscale("log")
        log_ticks(axes.xaxis, values)
    if len(values) <= MOST_TICKS:
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.xaxis.set_minor_locator(NullLocator())


def _caption(figure: Figure, jobs: Sequence[SweepJob]) -> str:
    circle = "; in the circle: the least perplexity"
    if figure is _divergence:
        return f"KL(original || quantised), ± one standard error over windows{circle}"
    found = {job.measured.original_perplexity for job in jobs if job.measured and job.measured.original_perplexity}
    if not found:
        return circle.removeprefix("; ")
    originals = map(units.significant, sorted(found))
    return f"± the standard error of the difference to the original, whose perplexity is {', '.join(originals)}{circle}"


def _lines(jobs: Sequence[SweepJob], axis: _Axis) -> dict[str, list[SweepJob]]:
    """The jobs that differ in nothing but the swept setting, by what they share, in the order of that setting."""
    lines: dict[str, list[SweepJob]] = {}
    for job in sorted(
        (job for job in jobs if job.number in axis.values), key=lambda job: (axis.values[job.number], job.number)
    ):
        others = [key for key in job.settings if key != axis.key]
        label = ", ".join(f"{head}={job.settings[key]}" for head, key in zip(tails(others), others, strict=True))
        lines.setdefault(label, []).append(job)
    return dict(sorted(lines.items(), key=lambda line: line[1][0].number))
