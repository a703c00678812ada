"""The figures of a rotation: its effect on the activations over depth, and how R1 was learned."""

from jointq_cli.records import RotationRecord, RotationTraining, Site
from jointq_cli.report import rotation_summary
from jointq_cli.report.figures import style
from jointq_cli.report.figures.plots import Series, draw_series
from jointq_cli.report.figures.style import SvgFigure
from jointq_cli.report.grouping import grouped


def rotation_figures(record: RotationRecord) -> list[SvgFigure]:
    """All figures for which the record has data."""
    trainings = [training for training in record.courses if training.name == "R1"]
    return [*_sites(record.sites), *map(_training, trainings)]


def _sites(sites: list[Site]) -> list[SvgFigure]:
    if not sites:
        return []
    before, after = rotation_summary.mean_sqnr(sites)
    by_name = grouped(sites, lambda site: site.name)
    with style.styled_axes(style.WIDE) as axes:
        for index, members in enumerate(by_name.values()):
            blocks = [site.block for site in members]
            colour, _ = style.series_style(index)
            axes.plot(blocks, [site.sqnr_before for site in members], color=colour, linestyle=":", linewidth=1.4)
        series = [
            Series(name, [(site.block, site.sqnr_after, _in_words(site)) for site in members])
            for name, members in by_name.items()
        ]
        tooltips = draw_series(axes, series, gid="sqnr")
        style.depth_axis(axes)
        axes.set_ylabel("SQNR, dB")
        style.legend_beside(axes)
        caption = (
            f"Signal to quantisation noise of layer inputs at 4 bits per token: dotted before ({before:.1f} dB on "
            f"average), points after ({after:.1f} dB). Tokens that nothing was learned from."
        )
        return [style.svg_figure(axes, "Activations before and after the rotation", caption, tooltips)]


def _in_words(site: Site) -> str:
    return (
        f"block {site.block} {site.name}: {site.sqnr_before:.1f} → {site.sqnr_after:.1f} dB, max/rms "
        f"{site.peak_before:.1f} → {site.peak_after:.1f}"
    )


def _training(training: RotationTraining) -> SvgFigure:
    with style.styled_axes(style.WIDE) as axes:
        points = [
            (float(point.step), point.error, f"step {point.step}: {point.error:.2e}") for point in training.errors
        ]
        tooltips = draw_series(axes, [Series(None, points)], gid="training")
        axes.axvline(training.best_step, color=style.FAINT, linewidth=1.2)
        axes.set_xlabel("step")
        axes.set_ylabel("error")
        axes.set_ylim(bottom=0)
        caption = (
            "Relative error of rotated activations at few bits, on tokens that were not learned from. The line marks "
            f"the step whose rotation was kept, {training.best_step} of {training.steps}."
        )
        return style.svg_figure(axes, "How R1 was learned", caption, tooltips)
