"""The figures of a refinement: the loss over the steps of the model's training, or over depth for blocks."""

from jointq_cli.records import RefinementCourse, RefinementRecord
from jointq_cli.report.figures.plots import Series, point_plot
from jointq_cli.report.figures.style import SvgFigure


def refinement_figures(record: RefinementRecord) -> list[SvgFigure]:
    """All figures for which the record has data."""
    if len(record.courses) == 1:
        return _course(record.courses[0])
    blocks = list(range(len(record.courses)))
    before = [course.points[0].heldout_loss for course in record.courses]
    after = [min(point.heldout_loss for point in course.points) for course in record.courses]
    series = [Series("before", blocks, before), Series("after", blocks, after)]
    caption = "Relative error of each block's output on windows that it was not trained on"
    title = "What the refinement of blocks has gained"
    return point_plot(title, caption, series, x="decoder block", y="error", log_y=True)


def _course(course: RefinementCourse) -> list[SvgFigure]:
    held_out = [(point.step, point.heldout_loss) for point in course.points]
    trained = [(point.step, point.loss) for point in course.points if point.loss]
    series = [
        Series(name, [step for step, _ in points], [loss for _, loss in points])
        for name, points in (("held out", held_out), ("trained on", trained))
    ]
    caption = (
        "KL(original || refined) of the next token, on windows trained on and held out. "
        f"The line marks the step that was kept, {course.best_step} of {course.steps}"
    )
    title, kept = "How the model was refined", [course.best_step]
    return point_plot(title, caption, series, x="step", y="KL, nats per token", references=kept)
