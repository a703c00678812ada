"""The tables of `jointq plan`: the remaining work of each stage, and whether the machine has enough memory and disk."""

from jointq_cli.records import RunEstimate, StageEstimate
from jointq_cli.report.number_format import MISSING, byte_size, duration
from jointq_cli.report.tables.table import Cell, TableDocument, TextTable


def plan_document(estimate: RunEstimate) -> TableDocument:
    rows = [_row(stage) for stage in estimate.stages]
    return TableDocument(
        title="plan",
        headline=(
            f"About {_duration(estimate.seconds)}, {_size(estimate.memory)} of memory, "
            f"{_size(estimate.disk + estimate.scratch)} of disk"
        ),
        warnings=estimate.warnings,
        notes=[
            f"memory: {_size(estimate.memory)} at its peak, the process itself included; "
            f"{_size(estimate.memory_there)} are free",
            f"disk: {_size(estimate.disk)} stay, {_size(estimate.scratch)} come and go; "
            f"{_size(estimate.disk_there)} are free",
            "time: about, and where nothing else runs; kernels that are yet to be compiled take 10 to 25 s more",
            *estimate.notes,
        ],
        tables=[TextTable("What there is to do", 2, ["stage", "state", "time", "memory", "disk"], rows)],
    )


def _row(stage: StageEstimate) -> list[Cell]:
    costs = (
        (stage.seconds, _duration(stage.seconds)),
        (stage.seconds, _size(stage.memory)),
        (stage.disk, _size(stage.disk)),
    )
    return [Cell(stage.name), Cell(stage.state), *(Cell(text if value else MISSING) for value, text in costs)]


def _duration(seconds: float) -> str:
    """To two digits, the accuracy of an estimate."""
    return duration(float(f"{seconds:.2g}"))


def _size(count: float) -> str:
    return byte_size(int(float(f"{count:.2g}")))
