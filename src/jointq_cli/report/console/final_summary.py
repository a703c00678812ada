"""What a command shows at its end: the result, its problems, metrics, details and next steps."""

import shlex
from pathlib import Path

from jointq_cli.records import EvaluationReport, ExportRecord, RotationRecord, RunReport
from jointq_cli.report import rotation_summary, summary
from jointq_cli.report.number_format import byte_size
from jointq_cli.report.tables.table import TableDocument


def quantize_summary(report: RunReport, run: Path) -> TableDocument:
    """run: its directory, here and below."""
    size = byte_size(report.audit.checkpoint_bytes)
    return TableDocument(
        title=summary.title(report),
        headline=summary.headline(report),
        problems=summary.problems(report),
        metrics=summary.key_metrics(report),
        origin=[
            *summary.basis(report),
            ("checkpoint", f"{size} on disk, in the source's dtype; the figures above are its"),
            ("layers", summary.layer_verdicts(report)),
            ("tensor audit", summary.audit_verdict(report)),
            ("reload check", report.reload_check),
            *summary.exports(report),
            ("protocol", report.protocol.line()),
        ],
        next_steps=[
            ("results", _shown(run)),
            ("look at it", _shown(run / "report.html")),
            *(("serve it", _shown(run / "export" / record.format)) for record in report.exports),
            ("evaluate it", f"jointq evaluate {shlex.quote('model.path=' + _shown(run / 'checkpoint'))}"),
        ],
    )


def export_summary(records: list[ExportRecord], places: list[Path]) -> TableDocument:
    """places: where each was written."""
    lines = [summary.export_line(record) for record in records]
    alone, written = len(records) == 1, list(zip(records, places, strict=True))
    return TableDocument(
        title="export",
        headline=f"{records[0].format}: {lines[0]}" if alone else f"{len(records)} formats written",
        problems=[problem for record in records if record.check for problem in record.check.problems],
        origin=[] if alone else [(record.format, line) for record, line in zip(records, lines, strict=True)],
        next_steps=[pair for record, place in written for pair in _how_to_use(record, place)],
    )


def _how_to_use(record: ExportRecord, place: Path) -> list[tuple[str, str]]:
    """The commands of an export are written for its README, and so for its directory."""
    inside = f"cd {shlex.quote(_shown(place))} && "
    commands = [(name, text if text.startswith("pip ") else inside + text) for name, text in record.commands.items()]
    return [("written to", _shown(place)), *commands]


def rotate_summary(record: RotationRecord, run: Path) -> TableDocument:
    return TableDocument(
        title="rotation",
        headline=rotation_summary.headline(record),
        problems=rotation_summary.problems(record),
        metrics=rotation_summary.metrics(record),
        origin=rotation_summary.provenance(record),
        next_steps=[("results", _shown(run)), ("the basis", _shown(run / "rotation"))],
    )


def evaluate_summary(report: EvaluationReport, run: Path) -> TableDocument:
    compared = {"reference": report.reference, "engine": report.engine}
    return TableDocument(
        title="evaluation",
        headline=f"perplexity {summary.perplexity_text(report.perplexity)}",
        problems=summary.evaluation_problems(report),
        metrics=summary.evaluation_metrics(report),
        origin=[
            ("model", report.model),
            *((label, value) for label, value in compared.items() if value),
            ("protocol", report.protocol.line()),
        ],
        next_steps=[("results", _shown(run))],
    )


def _shown(path: Path) -> str:
    """Relative to the working directory, if it is below that."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
