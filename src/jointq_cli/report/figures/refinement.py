"""The figures of a refinement: the loss over the steps of the model's training, or over depth for blocks."""

from jointq_cli.records import RefinementCourse, RefinementRecord
from jointq_cli.report.figures import style
from jointq_cli.report.figures.plots import Series, draw_series, errors_over_depth
from jointq_cli.report.figures.style import SvgFigure
from jointq_cli.report.number_format import scientific


def refinement_figures(record: RefinementRecord) -> list[SvgFigure]:
    """All figures for which the record has data."""
    if len(record.courses) == 1:
        return [_course(record.courses[0])]
    pairs = [
        (course.points[0].heldout_loss, min(each.heldout_loss for each in course.points)) for course in record.courses
    ]
    series = [
        Series(
            name,
            [(float(block), pair[at], f"block {block}: {scientific(pair[at])}") for block, pair in enumerate(pairs)],
        )
        for at, name in enumerate(("before", "after"))
    ]
    caption = "Relative error of each block's output on windows that it was not trained on"
    return errors_over_depth("What the refinement of blocks has gained", caption, "error", series)


def _course(course: RefinementCourse) -> SvgFigure:
    with style.styled_axes(style.WIDE) as axes:
        held_out = [
            (float(each.step), each.heldout_loss, _in_words(each.step, each.heldout_loss)) for each in course.points
        ]
        trained = [
            (float(each.step), each.loss, _in_words(each.step, each.loss)) for each in course.points if each.loss
        ]
        series = [Series("held out", held_out), Series("trained on", trained)]
        tooltips = draw_series(axes, [one for one in series if one.points], gid="refinement")
        axes.axvline(course.best_step, color=style.FAINT, linewidth=1.2)
        axes.set_xlabel("step")
        axes.set_ylabel("KL, nats per token")
        axes.set_ylim(bottom=0)
        style.legend_beside(axes)
        caption = (
            "KL(original || refined) of the next token, on windows trained on and held out. "
            f"The line marks the step that was kept, {course.best_step} of {course.steps}."
        )
        return style.svg_figure(axes, "How the model was refined", caption, tooltips)


def _in_words(step: int, loss: float) -> str:
    return f"step {step}: {scientific(loss)}"
