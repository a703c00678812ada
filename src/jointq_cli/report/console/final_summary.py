"""What a command prints at its end: the result, its problems, metrics, details and next steps. Writes nothing."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from jointq_cli.records import EvaluationReport, ExportRecord, RotationRecord, RunReport, StageRecord
from jointq_cli.report import rotation_summary, summary
from jointq_cli.report.number_format import KeyMetric, byte_size
from jointq_cli.report.tables.table import aligned


@dataclass(frozen=True)
class FinalSummary:
    """The end of a command, independent of where it is displayed."""

    headline: str
    problems: list[str]
    metrics: list[KeyMetric]
    details: list[tuple[str, str]]  # (label, value)
    next_steps: list[tuple[str, str]]  # (label, path or command)

    def as_text(self) -> list[str]:
        metrics = [(metric.label, f"{metric.value}  ({metric.detail})") for metric in self.metrics]
        problems = [f"[problem] {problem}" for problem in self.problems]
        return [self.headline, *problems, *aligned([*metrics, *self.details, *self.next_steps])]


def quantize_summary(report: RunReport, run_directory: Path) -> FinalSummary:
    checkpoint = shlex.quote(f"model.path={run_directory / 'checkpoint'}")
    return FinalSummary(
        headline=summary.headline(report),
        problems=summary.problems(report),
        metrics=summary.key_metrics(report),
        details=[
            *summary.basis(report),
            ("checkpoint", f"{byte_size(report.audit.checkpoint_bytes)} on disk, in the source's dtype"),
            ("stages", _stage_costs(report.stages)),
            ("layers", summary.layer_verdicts(report)),
            ("tensor audit", summary.audit_verdict(report)),
            ("reload check", report.reload_check),
            *summary.exports(report),
            ("protocol", report.protocol.line()),
        ],
        next_steps=[
            ("results", str(run_directory)),
            ("look at it", str(run_directory / "report.html")),
            *(("serve it", str(run_directory / "export" / record.format)) for record in report.exports),
            ("evaluate it", f"jointq evaluate {checkpoint}"),
        ],
    )


def export_summary(records: list[ExportRecord], places: list[Path]) -> FinalSummary:
    lines = [summary.export_line(record) for record in records]
    return FinalSummary(
        headline=f"{records[0].format}: {lines[0]}" if len(records) == 1 else f"{len(records)} formats written",
        problems=[problem for record in records if record.check for problem in record.check.problems],
        metrics=[],
        details=[(record.format, line) for record, line in zip(records, lines, strict=True) if len(records) > 1],
        next_steps=[
            pair
            for record, place in zip(records, places, strict=True)
            for pair in (
                ("written to", str(place)),
                *((runtime, _run_in(place, command)) for runtime, command in record.commands.items()),
            )
        ],
    )


def _run_in(place: Path, command: str) -> str:
    """Commands of an export are written for its README, and so for its directory."""
    return command if command.startswith("pip ") else f"cd {shlex.quote(str(place))} && {command}"


def rotate_summary(record: RotationRecord, run_directory: Path) -> FinalSummary:
    return FinalSummary(
        headline=rotation_summary.headline(record),
        problems=rotation_summary.problems(record),
        metrics=rotation_summary.metrics(record),
        details=rotation_summary.provenance(record),
        next_steps=[("results", str(run_directory)), ("the basis", str(run_directory / "rotation"))],
    )


def evaluate_summary(report: EvaluationReport, run_directory: Path) -> FinalSummary:
    compared = {"reference": report.reference, "engine": report.engine}
    further = [(label, value) for label, value in compared.items() if value]
    return FinalSummary(
        headline=f"perplexity {summary.perplexity_text(report.perplexity)}",
        problems=summary.evaluation_problems(report),
        metrics=summary.evaluation_metrics(report),
        details=[
            ("model", report.model),
            *further,
            ("stages", _stage_costs(report.stages)),
            ("protocol", report.protocol.line()),
        ],
        next_steps=[("results", str(run_directory))],
    )


def _stage_costs(stages: list[StageRecord]) -> str:
    return ", ".join(f"{stage.name} {summary.stage_cost(stage)}" for stage in stages)
