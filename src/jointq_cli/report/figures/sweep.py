"""The figures of a sweep: a measurement over the swept setting, one line per combination of the other settings.

Knows the jobs of a sweep.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jointq_cli.report.compare.sweep import Ranking, SweepJob, SweepMeasurement, finite, ranking
from jointq_cli.report.figures.plots import Series, point_plot
from jointq_cli.report.figures.style import SvgFigure, fits_log_axis
from jointq_cli.report.grouping import grouped
from jointq_cli.report.number_format import shortest_suffixes, significant

LEAST_POINTS = 3  # different values of the swept setting
MOST_TICKS = 12
WIDE_RANGE = 8  # ratio of the largest to the smallest value above which an axis is logarithmic
Metric = Callable[[SweepMeasurement], tuple[float, float]]  # value and standard error


@dataclass(frozen=True)
class _SweptSetting:
    """Its key and, by the number of the job, its value."""

    key: str
    values: dict[int, float]

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[2]

    @property
    def logarithmic(self) -> bool:
        values = list(self.values.values())
        return min(values) > 0 and max(values) >= WIDE_RANGE * min(values)


UNJOINED = "neighbours that their errors do not distinguish are not joined"


def sweep_figures(jobs: Sequence[SweepJob]) -> list[SvgFigure]:
    """Nothing if no setting has enough numeric values for a curve, or if nothing was measured."""
    measured = finite(jobs)
    swept = _swept_setting(measured)
    if swept is None:
        return []
    ranked = ranking(jobs)
    figures = [*_curves(f"Perplexity over {swept.name}", "perplexity", _perplexity, swept, measured, ranked)]
    if all(job.measured and math.isfinite(_divergence(job.measured)[0]) for job in measured):
        title = f"KL divergence over {swept.name}"
        figures += _curves(title, "nats per token", _divergence, swept, measured, ranked)
    return figures


def _perplexity(measured: SweepMeasurement) -> tuple[float, float]:
    value, comparison = measured.perplexity.value, measured.comparison
    return value, value * (comparison.nll_increase_standard_error if comparison else math.nan)


def _divergence(measured: SweepMeasurement) -> tuple[float, float]:
    found = measured.comparison
    return (found.kl_divergence, found.kl_divergence_standard_error) if found else (math.nan, math.nan)


def _swept_setting(jobs: Sequence[SweepJob]) -> _SweptSetting | None:
    """The setting with the most different numeric values."""
    keys = dict.fromkeys(key for job in jobs for key in job.settings)
    settings = [_SweptSetting(key, _numbers(jobs, key)) for key in keys]
    settings = [setting for setting in settings if len(set(setting.values.values())) >= LEAST_POINTS]
    return max(settings, key=lambda setting: len(set(setting.values.values())), default=None)


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
    title: str, unit: str, metric: Metric, swept: _SweptSetting, jobs: Sequence[SweepJob], ranked: Ranking
) -> list[SvgFigure]:
    lines = _lines(jobs, swept)
    series = []
    for label, members in lines.items():
        measured = [metric(job.measured) for job in members if job.measured]
        values, errors = [value for value, _ in measured], [error for _, error in measured]
        series.append(Series(label or None, [swept.values[job.number] for job in members], values, errors))
    values = [value for one in series for value in one.y]
    rings = [
        (swept.values[best.number], metric(best.measured)[0])
        for best in [ranked.best]
        if best is not None and best.measured is not None and best.number in swept.values
    ]
    ticks = sorted(set(swept.values.values()))
    return point_plot(
        title,
        _caption(metric, [job for members in lines.values() for job in members], ranked),
        series,
        x=swept.name,
        y=unit,
        log_x=swept.logarithmic,
        log_y=all(map(fits_log_axis, values)) and max(values) > WIDE_RANGE * min(values),
        ticks=ticks if len(ticks) <= MOST_TICKS else (),
        rings=rings,
    )


def _caption(metric: Metric, jobs: Sequence[SweepJob], ranked: Ranking) -> str:
    circle = f"; in the circle: the job with the least {ranked.measure}" if ranked.best in jobs else ""
    if metric is _divergence:
        return f"KL(original || quantised), ± one standard error over windows; {UNJOINED}{circle}"
    found = {job.measured.original_perplexity for job in jobs if job.measured and job.measured.original_perplexity}
    if not found:
        return circle.removeprefix("; ")
    originals = map(significant, sorted(found))
    original = f"the original, whose perplexity is {', '.join(originals)}"
    return f"± the standard error of the difference to {original}; {UNJOINED}{circle}"


def _lines(jobs: Sequence[SweepJob], swept: _SweptSetting) -> dict[str, list[SweepJob]]:
    """The jobs that differ in the swept setting only, ordered by it, under the settings that they share."""

    def label(job: SweepJob) -> str:
        others = [key for key in job.settings if key != swept.key]
        names = shortest_suffixes(others)
        return ", ".join(f"{name}={job.settings[key]}" for name, key in zip(names, others, strict=True))

    shown = [job for job in jobs if job.number in swept.values]
    lines = grouped(sorted(shown, key=lambda job: (swept.values[job.number], job.number)), label)
    return dict(sorted(lines.items(), key=lambda line: line[1][0].number))
