"""The figures of a sweep: a measurement over the swept setting, one line per combination of the other settings.

Knows the jobs of a sweep.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jointq_cli.report.comparison import ComparedRun, Ranking, RunComparison
from jointq_cli.report.figures.plots import Series, point_plot
from jointq_cli.report.figures.style import SvgFigure, fits_log_axis
from jointq_cli.report.grouping import grouped
from jointq_cli.report.measured import KINDS
from jointq_cli.report.number_format import shortest_suffixes

LEAST_POINTS = 3  # different values of the swept setting
MOST_TICKS = 12
WIDE_RANGE = 8  # ratio of the largest to the smallest value above which an axis is logarithmic


@dataclass(frozen=True)
class _SweptSetting:
    """Its key and, by the name of the job, its value."""

    key: str
    values: dict[str, float]

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[2]

    @property
    def logarithmic(self) -> bool:
        values = list(self.values.values())
        return min(values) > 0 and max(values) >= WIDE_RANGE * min(values)


UNJOINED = "neighbours that their errors do not distinguish are not joined"


def sweep_figures(sweep: RunComparison) -> list[SvgFigure]:
    """Nothing if no setting has enough numeric values for a curve, or if nothing was measured."""
    measured = [job for job in sweep.finished if math.isfinite(job.figures["perplexity"].value)]
    swept = _swept_setting(measured)
    if swept is None:
        return []
    figures = _curves(f"Perplexity over {swept.name}", "perplexity", "perplexity", swept, measured, sweep.ranking)
    if all(math.isfinite(job.figures["kl"].value) if "kl" in job.figures else False for job in measured):
        title = f"KL divergence over {swept.name}"
        figures += _curves(title, "kl", "nats per token", swept, measured, sweep.ranking)
    return figures


def _error(job: ComparedRun, figure: str) -> float:
    """That of a perplexity is the one of the difference from the original's."""
    if figure == "perplexity":
        increase = job.figures.get("nll_increase")
        return job.figures[figure].value * increase.error if increase else math.nan
    return job.figures[figure].error


def _swept_setting(jobs: Sequence[ComparedRun]) -> _SweptSetting | None:
    """The setting with the most different numeric values."""
    keys = dict.fromkeys(key for job in jobs for key in job.settings)
    settings = [_SweptSetting(key, _numbers(jobs, key)) for key in keys]
    settings = [setting for setting in settings if len(set(setting.values.values())) >= LEAST_POINTS]
    return max(settings, key=lambda setting: len(set(setting.values.values())), default=None)


def _numbers(jobs: Sequence[ComparedRun], key: str) -> dict[str, float]:
    found = {}
    for job in jobs:
        try:
            value = float(job.settings[key])
        except (KeyError, ValueError):
            continue
        if math.isfinite(value):
            found[job.name] = value
    return found


def _curves(
    title: str, figure: str, unit: str, swept: _SweptSetting, jobs: Sequence[ComparedRun], ranked: Ranking
) -> list[SvgFigure]:
    lines = _lines(jobs, swept)
    series = [
        Series(
            label or None,
            [swept.values[job.name] for job in members],
            [job.figures[figure].value for job in members],
            [_error(job, figure) for job in members],
        )
        for label, members in lines.items()
    ]
    values = [value for one in series for value in one.y]
    best = ranked.best
    rings = [(swept.values[best.name], best.figures[figure].value)] if best and best.name in swept.values else []
    ticks = sorted(set(swept.values.values()))
    return point_plot(
        title,
        _caption(figure, [job for members in lines.values() for job in members], ranked),
        series,
        x=swept.name,
        y=unit,
        log_x=swept.logarithmic,
        log_y=all(map(fits_log_axis, values)) and max(values) > WIDE_RANGE * min(values),
        ticks=ticks if len(ticks) <= MOST_TICKS else (),
        rings=rings,
    )


def _caption(figure: str, jobs: Sequence[ComparedRun], ranked: Ranking) -> str:
    circle = f"in the circle: the job with the least {KINDS[ranked.figure].label}" if ranked.best in jobs else ""
    about = ""
    if figure == "kl":
        about = f"KL(original || quantised), ± one standard error over windows; {UNJOINED}"
    elif any("nll_increase" in job.figures for job in jobs):
        about = f"± the standard error of the difference to the original; {UNJOINED}"
    return "; ".join(filter(None, [about, circle]))


def _lines(jobs: Sequence[ComparedRun], swept: _SweptSetting) -> dict[str, list[ComparedRun]]:
    """The jobs that differ in the swept setting only, ordered by it, under the settings that they share."""

    def label(job: ComparedRun) -> str:
        others = [key for key in job.settings if key != swept.key]
        names = shortest_suffixes(others)
        return ", ".join(f"{name}={job.settings[key]}" for name, key in zip(names, others, strict=True))

    shown = [job for job in jobs if job.name in swept.values]
    lines = grouped(sorted(shown, key=lambda job: (swept.values[job.name], int(job.name))), label)
    return dict(sorted(lines.items(), key=lambda line: int(line[1][0].name)))
