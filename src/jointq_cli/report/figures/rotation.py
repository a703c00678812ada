"""The pictures of a rotation: what it does to the activations over depth, and how R1 was learned."""

from jointq_cli.records import RotationRecord, RotationTraining, Site
from jointq_cli.report.compare import rotation_summary
from jointq_cli.report.figures.style import FAINT, WIDE, Canvas, Picture, depth_axis, draw_over_depth, look


def draw_rotation(record: RotationRecord) -> list[Picture]:
    """Every picture for which the record has something to show."""
    return [*_sites(record.sites), *(_course(course) for course in record.courses if course.name == "R1")]


def _sites(sites: list[Site]) -> list[Picture]:
    if not sites:
        return []
    before, after = rotation_summary.mean_sqnr(sites)
    with Canvas(WIDE) as canvas:
        axes = canvas.axes
        tips: dict[str, list[str]] = {}
        for index, name in enumerate(dict.fromkeys(site.name for site in sites)):
            members = [site for site in sites if site.name == name]
            depths = [site.block for site in members]
            colour, _ = look(index)
            axes.plot(depths, [site.sqnr_before for site in members], color=colour, linestyle=":", linewidth=1.4)
            group = f"sqnr-{index}"
            draw_over_depth(axes, depths, [site.sqnr_after for site in members], look(index), label=name, gid=group)
            tips[group] = [
                f"block {site.block} {name}: {site.sqnr_before:.1f} → {site.sqnr_after:.1f} dB, max/rms "
                f"{site.peak_before:.1f} → {site.peak_after:.1f}"
                for site in members
            ]
        depth_axis(axes)
        axes.set_ylabel("SQNR, dB")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handletextpad=0.2)
        svg = canvas.svg("sqnr", tips)
    caption = (
        f"Signal to quantisation noise of what layers are given, 4 bits per token: dotted before ({before:.1f} dB in "
        f"the mean), points after ({after:.1f} dB). Tokens that nothing was learned from."
    )
    return [Picture("Activations before and after the rotation", caption, svg, wide=True)]


def _course(course: RotationTraining) -> Picture:
    steps = [checkup.step for checkup in course.errors]
    errors = [checkup.error for checkup in course.errors]
    with Canvas(WIDE) as canvas:
        axes = canvas.axes
        draw_over_depth(axes, steps, errors, look(0), label=None, gid="course")
        axes.axvline(course.best_step, color=FAINT, linewidth=1.2)
        axes.set_xlabel("step")
        axes.set_ylabel("error")
        axes.set_ylim(bottom=0)
        tips = [f"step {step}: {error:.2e}" for step, error in zip(steps, errors, strict=True)]
        svg = canvas.svg("course", {"course": tips})
    caption = (
        "Relative error of rotated activations at few bits, on tokens that were not learned from. The line marks the "
        f"step whose rotation was kept, {course.best_step} of {course.steps}."
    )
    return Picture("How R1 was learned", caption, svg, wide=True)
