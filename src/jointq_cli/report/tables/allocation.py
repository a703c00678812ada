"""How a budget of bits was distributed: over depth and kinds of layers, and the loss predicted and measured."""

from jointq_cli.records import RunReport
from jointq_cli.records.allocation import AllocationPoint
from jointq_cli.report.grouping import grouped
from jointq_cli.report.number_format import significant
from jointq_cli.report.tables.table import Cell, TextTable


def allocation_tables(report: RunReport) -> list[TextTable]:
    """No table without a budget."""
    return [_over_depth(report), _predicted(report)] if report.allocation else []


def _over_depth(report: RunReport) -> TextTable:
    """A row per kind of layer, with the rounded bits per weight of its layers, from the first block to the last."""
    rows = []
    for kind, members in grouped(report.layers, lambda layer: layer.kind).items():
        sizes = [layer.out_features * layer.in_features for layer in members]
        mean = sum(layer.bits_per_weight * size for layer, size in zip(members, sizes, strict=True)) / sum(sizes)
        digits = " ".join(f"{layer.bits_per_weight:.0f}" for layer in sorted(members, key=lambda layer: layer.block))
        rows.append([Cell(kind), Cell(significant(mean, 3)), Cell(digits)])
    note = (
        "Rounded bits per weight of each layer, from the first block to the last; `allocation.yaml` has the settings."
    )
    return TextTable("Bits over depth", 1, ["kind", "mean", "by block"], rows, note)


def _predicted(report: RunReport) -> TextTable:
    record = report.allocation
    assert record is not None
    measured = report.comparison.kl_divergence
    rows = [_row("as chosen", record.chosen, measured)]
    rows += [_row(f"{words} in all", point) for words, point in zip(record.candidates, record.uniform, strict=True)]
    if record.other_tie:
        rows.append(_row("chosen with the other `allocation.tie`", record.other_tie))
    note = (
        f"{record.allocation}. Predicted: what each layer alone does to the loss, added up, on the calibration tokens "
        "and without error propagation; measured: on the evaluation text. Compare predictions with each other."
    )
    return TextTable("Loss of the budget", 1, ["bits", "bits per weight", "predicted KL", "measured KL"], rows, note)


def _row(text: str, point: AllocationPoint, measured: float | None = None) -> list[Cell]:
    figures = (point.bits_per_weight, point.loss, measured)
    return [Cell(text), *(Cell("" if figure is None else significant(figure)) for figure in figures)]
