"""The loss of a budget of bits, predicted and measured."""

from jointq_cli.records import RunReport
from jointq_cli.records.allocation import AllocationPoint
from jointq_cli.report.number_format import significant
from jointq_cli.report.tables.table import TextTable


def allocation_table(report: RunReport) -> TextTable:
    """A row for what was chosen and for each candidate in all layers; no row without a budget."""
    record, rows = report.allocation, []
    if record is not None:
        rows = [_row("as chosen", record.chosen, significant(report.comparison.kl_divergence))]
        rows += [_row(f"{words} in all", point) for words, point in zip(record.candidates, record.uniform, strict=True)]
        rows += [_row("chosen with the other allocation.tie", record.other_tie)] if record.other_tie else []
    note = (
        "Predicted: what each layer alone does to the loss, added up, on the calibration tokens and without error "
        "propagation; measured: on the evaluation text. Compare predictions with each other."
    )
    title = f"Budget: {record.allocation}" if record else ""
    return TextTable(title, ["bits", "bits per weight", "predicted KL", "measured KL"], rows, note=note)


def _row(text: str, point: AllocationPoint, measured: str = "") -> list[str]:
    return [text, significant(point.bits_per_weight), significant(point.loss), measured]
