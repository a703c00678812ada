"""The figures of a rotation: its effect on the activations over depth, and how R1 was learned."""

from jointq_cli.records import RotationRecord, RotationTraining, Site
from jointq_cli.report import rotation_summary
from jointq_cli.report.figures.plots import Series, point_plot
from jointq_cli.report.figures.style import SvgFigure
from jointq_cli.report.grouping import grouped


def rotation_figures(record: RotationRecord) -> list[SvgFigure]:
    """All figures for which the record has data."""
    trainings = [training for training in record.courses if training.name == "R1"]
    return [*_sites(record.sites), *(figure for training in trainings for figure in _training(training))]


def _sites(sites: list[Site]) -> list[SvgFigure]:
    if not sites:
        return []
    before, after = rotation_summary.mean_sqnr(sites)
    by_name = grouped(sites, lambda site: site.name)
    blocks = {name: [site.block for site in members] for name, members in by_name.items()}
    series = [
        *(Series(name, blocks[name], [site.sqnr_after for site in members]) for name, members in by_name.items()),
        *(
            Series(None, blocks[name], [site.sqnr_before for site in members], line="dotted")
            for name, members in by_name.items()
        ),
    ]
    caption = (
        f"Signal to quantisation noise of layer inputs at 4 bits per token: dotted before ({before:.1f} dB on "
        f"average), points after ({after:.1f} dB). Tokens that nothing was learned from"
    )
    title = "Activations before and after the rotation"
    return point_plot(title, caption, series, x="decoder block", y="SQNR, dB", colours=len(by_name))


def _training(training: RotationTraining) -> list[SvgFigure]:
    series = [Series(None, [point.step for point in training.errors], [point.error for point in training.errors])]
    caption = (
        "Relative error of rotated activations at few bits, on tokens that were not learned from. The line marks "
        f"the step whose rotation was kept, {training.best_step} of {training.steps}"
    )
    return point_plot("How R1 was learned", caption, series, x="step", y="error", references=[training.best_step])
