"""The figures of a budget of bits: which layer has how many, and the loss over the size."""

from jointq_cli.records import RunReport
from jointq_cli.records.allocation import AllocationRecord
from jointq_cli.report import summary
from jointq_cli.report.figures import style
from jointq_cli.report.figures.style import SvgFigure
from jointq_cli.report.grouping import grouped
from jointq_cli.report.number_format import significant


def allocation_figures(report: RunReport) -> list[SvgFigure]:
    """All figures for which the report has data; none without a budget."""
    return [_over_depth(report), *_losses(report, report.allocation)] if report.allocation else []


def _over_depth(report: RunReport) -> SvgFigure:
    kinds = list(summary.layers_by_kind(report.layers))
    labels = grouped(sorted(report.layers, key=lambda layer: layer.bits_per_weight), lambda layer: layer.label)
    with style.styled_axes((style.WIDE[0], 1.1 + 0.3 * len(kinds))) as axes:
        tooltips = {}
        for index, (label, members) in enumerate(labels.items()):
            colour, marker = style.series_style(index)
            heights = [-kinds.index(layer.kind) for layer in members]
            axes.plot(
                [layer.block for layer in members], heights, color=colour, marker=marker, markersize=7,
                linestyle="none", label=label, gid=f"bits-{index}",
            )  # fmt: skip
            tooltips[f"bits-{index}"] = [f"{layer.name}: {label}" for layer in members]
        axes.set_yticks([-index for index in range(len(kinds))], kinds)
        style.depth_axis(axes)
        style.legend_beside(axes)
        return style.svg_figure(axes, "Bits over depth", "How each layer is stored", tooltips)


def _losses(report: RunReport, record: AllocationRecord) -> list[SvgFigure]:
    curve = [point for point in record.curve if style.fits_log_axis(point.loss)]
    uniform = [
        (point, words)
        for point, words in zip(record.uniform, record.candidates, strict=True)
        if style.fits_log_axis(point.loss)
    ]
    if not curve or not style.fits_log_axis(record.chosen.loss):
        return []
    with style.styled_axes(style.WIDE) as axes:
        colours = [style.series_style(index) for index in range(3)]
        axes.plot([point.bits_per_weight for point in curve], [point.loss for point in curve], color=colours[0][0])
        axes.plot(
            [point.bits_per_weight for point, _ in uniform], [point.loss for point, _ in uniform], color=colours[1][0],
            marker=colours[1][1], linestyle="none", label="one candidate in all layers", gid="uniform",
        )  # fmt: skip
        axes.plot(
            [record.chosen.bits_per_weight], [record.chosen.loss], color=colours[0][0], marker=colours[0][1],
            linestyle="none", label="chosen", gid="chosen",
        )  # fmt: skip
        losses = [point.loss for point in (*curve, *(point for point, _ in uniform))]
        measured = report.comparison.kl_divergence
        if style.fits_log_axis(measured):
            axes.plot(
                [record.chosen.bits_per_weight], [measured], color=colours[2][0], marker=colours[2][1],
                linestyle="none", label="measured", gid="measured",
            )  # fmt: skip
            losses.append(measured)
        axes.set_yscale("log")
        style.log_ticks(axes.yaxis, losses)
        axes.set_xlabel("bits per weight")
        axes.set_ylabel("KL divergence, nats")
        style.legend_beside(axes)
        tooltips = {
            "uniform": [f"{words}: {significant(point.loss)}" for point, words in uniform],
            "chosen": [
                f"{significant(record.chosen.bits_per_weight)} bits per weight: {significant(record.chosen.loss)}"
            ],
            "measured": [f"measured: {significant(measured)}"],
        }
        caption = (
            "The least loss that is predicted for each size, and what was measured: on the evaluation text, with error "
            "propagation, which predictions leave out"
        )
        return [style.svg_figure(axes, "Loss over size", caption, tooltips)]
