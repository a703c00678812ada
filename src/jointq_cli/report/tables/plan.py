"""The tables of `jointq plan`: the remaining work of each stage, and whether the machine has enough memory and disk."""

from jointq_cli.records import RunEstimate
from jointq_cli.report.number_format import MISSING, byte_size, duration
from jointq_cli.report.tables.table import TableDocument, TextTable


def plan_document(estimate: RunEstimate) -> TableDocument:
    columns = {
        "stage": lambda stage: stage.name,
        "state": lambda stage: stage.state,
        "time": lambda stage: _duration(stage.seconds) if stage.seconds else MISSING,
        "memory": lambda stage: _size(stage.memory) if stage.seconds else MISSING,
        "disk": lambda stage: _size(stage.disk) if stage.disk else MISSING,
    }
    memory, disk, scratch = map(_size, (estimate.memory, estimate.disk, estimate.scratch))
    both = _size(estimate.disk + estimate.scratch)
    return TableDocument(
        title="plan",
        headline=f"About {_duration(estimate.seconds)}, {memory} of memory, {both} of disk",
        warnings=estimate.warnings,
        notes=[
            f"memory: {memory} at its peak, the process itself included; {_size(estimate.memory_available)} are free",
            f"disk: {disk} stay, {scratch} come and go; {_size(estimate.disk_free)} are free",
            "time: about, and where nothing else runs; kernels that are yet to be compiled take 10 to 25 s more",
            *estimate.notes,
        ],
        tables=[TextTable.of("What there is to do", estimate.stages, columns, stub=2)],
    )


def _duration(seconds: float) -> str:
    """To two digits, the accuracy of an estimate."""
    return duration(float(f"{seconds:.2g}"))


def _size(count: float) -> str:
    return byte_size(int(float(f"{count:.2g}")))
