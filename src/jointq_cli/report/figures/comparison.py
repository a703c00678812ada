"""The figures that compare several runs, or the jobs of a sweep: one colour and marker per run in all of them."""

import math
import statistics
from collections.abc import Callable

from jointq_cli.report.comparison import MOST_DETAILED, ComparedRun, RunComparison
from jointq_cli.report.figures.plots import Series, SvgFigure, far_apart, fits_log_axis, point_plot
from jointq_cli.report.figures.run import ACCUMULATED, BLOCK
from jointq_cli.report.grouping import grouped
from jointq_cli.report.measured import KINDS
from jointq_cli.report.number_format import shortest_suffixes

LEAST_POINTS = 3  # of a curve: different values of the swept setting
UNITS = {"perplexity": "perplexity", "kl": "nats per token"}


def comparison_figures(comparison: RunComparison) -> list[SvgFigure]:
    """All figures for which the runs have data."""
    figures = [
        *_measured("Perplexity", "perplexity", "± one standard error over windows; broken: the original", comparison),
        *_measured("KL divergence", "kl", "KL(original || quantised), ± one standard error over windows", comparison),
    ]
    if len(comparison.solved) <= MOST_DETAILED:
        figures += _over_depth("Output error over depth", "E_y: median of each block's layers", comparison, _medians)
        figures += _over_depth("Accumulated error over depth", ACCUMULATED, comparison, _accumulated)
    return figures


def sweep_figures(sweep: RunComparison) -> list[SvgFigure]:
    """Perplexity and KL divergence over the setting with the most different numbers, a line for each combination of the
    other settings; none if these are too few for a curve."""
    jobs = [job for job in sweep.finished if math.isfinite(job.figures["perplexity"].value)]
    keys = dict.fromkeys(key for job in jobs for key in job.settings)
    numbers = {key: {job.name: value for job in jobs if (value := _number(job, key)) is not None} for key in keys}
    swept = max(keys, key=lambda key: len(set(numbers[key].values())), default="")
    place = numbers.get(swept, {})
    if len(set(place.values())) < LEAST_POINTS:
        return []
    jobs = [job for job in jobs if job.name in place]
    lines = grouped(jobs, lambda job: tuple((key, job.settings[key]) for key in job.settings if key != swept))
    name, best = swept.rpartition(".")[2], [job for job in jobs if job is sweep.ranking.best]
    figures = []
    for figure, unit in UNITS.items():
        if not all(math.isfinite(job.figure(figure).value) for job in jobs):
            continue
        series = []
        for others, members in lines.items():
            members.sort(key=lambda job: place[job.name])
            errors = [job.error(figure) for job in members]
            series.append(Series(_label(others), _points(members, place, figure), errors))
        ring = Series(f"least {KINDS[sweep.ranking.figure].label}", _points(best, place, figure), line="rings")
        caption = (
            "± one standard error; for perplexity that of the difference from the original's; neighbours that their "
            "errors do not distinguish are not joined"
        )
        log_x, log_y = far_apart(place.values()), far_apart(job.figures[figure].value for job in jobs)
        title = f"{KINDS[figure].label} over {name}"
        figures += point_plot(
            title[0].upper() + title[1:], caption, [*series, ring], x=name, y=unit, log_x=log_x, log_y=log_y
        )
    return figures


def _number(job: ComparedRun, key: str) -> float | None:
    """The value of a setting; None for one that is no number."""
    try:
        value = float(job.settings.get(key, ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _label(settings: tuple[tuple[str, str], ...]) -> str | None:
    names = shortest_suffixes([key for key, _ in settings])
    return ", ".join(f"{name}={value}" for name, (_, value) in zip(names, settings, strict=True)) or None


def _points(jobs: list[ComparedRun], place: dict[str, float], figure: str) -> list[tuple[float, float]]:
    return [(place[job.name], job.figures[figure].value) for job in jobs]


def _measured(title: str, figure: str, caption: str, comparison: RunComparison) -> list[SvgFigure]:
    """A row per run."""
    runs = [run for run in comparison.finished if figure in run.figures]
    names = list(map(comparison.label, runs))
    values = [run.figures[figure] for run in runs]
    series = [Series(None, [(value, row)], [error]) for row, (value, error) in enumerate(values)]
    originals = {run.figure(f"original_{figure}").value for run in runs}
    references = sorted(filter(fits_log_axis, originals))
    log = far_apart([*references, *(value for value, _ in values)])
    return point_plot(title, caption, series, x=UNITS[figure], rows=names, log_x=log, references=references)


def _over_depth(
    title: str, caption: str, comparison: RunComparison, points: Callable[[ComparedRun], list[tuple[int, float]]]
) -> list[SvgFigure]:
    """A series per run. points: (decoder block, error)."""
    series = [Series(comparison.label(run), points(run)) for run in comparison.solved]
    return point_plot(title, caption, series, x=BLOCK, y="error", log_y=True)


def _medians(run: ComparedRun) -> list[tuple[int, float]]:
    blocks = grouped(sorted(run.layers, key=lambda layer: layer.block), lambda layer: layer.block)
    return [(block, statistics.median(layer.output_error for layer in layers)) for block, layers in blocks.items()]


def _accumulated(run: ComparedRun) -> list[tuple[int, float]]:
    return [(block.block, block.output_error) for block in run.blocks]
