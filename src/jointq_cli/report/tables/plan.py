"""A plan as tables of text: what each stage has yet to do, and whether the machine has what that takes."""

from jointq_cli.records import RunEstimate, StageEstimate
from jointq_cli.report import number_format as units
from jointq_cli.report.tables.table import MISSING, Cell, Sheet, TextTable


def plan_sheet(outlook: RunEstimate) -> Sheet:
    rows = [_row(stage) for stage in outlook.stages]
    return Sheet(
        title="plan",
        headline=(
            f"About {_duration(outlook.seconds)}, {_size(outlook.memory)} of memory, "
            f"{_size(outlook.disk + outlook.scratch)} of disk"
        ),
        warnings=outlook.warnings,
        notes=[
            f"memory: {_size(outlook.memory)} at its peak, the process itself included; "
            f"{_size(outlook.memory_there)} are free",
            f"disk: {_size(outlook.disk)} stay, {_size(outlook.scratch)} come and go; "
            f"{_size(outlook.disk_there)} are free",
            "time: about, and where nothing else runs; kernels that are yet to be compiled take 10 to 25 s more",
            *outlook.notes,
        ],
        grids=[TextTable("What there is to do", 2, ["stage", "state", "time", "memory", "disk"], rows)],
    )


def _row(stage: StageEstimate) -> list[Cell]:
    figures = (
        (stage.seconds, _duration(stage.seconds)),
        (stage.seconds, _size(stage.memory)),
        (stage.disk, _size(stage.disk)),
    )
    return [Cell(stage.name), Cell(stage.state), *(Cell(text if value else MISSING) for value, text in figures)]


def _duration(seconds: float) -> str:
    """To the digits that an estimate has."""
    return units.duration(float(f"{seconds:.2g}"))


def _size(count: float) -> str:
    return units.size(int(float(f"{count:.2g}")))
