"""The lines of a run as plain text, for the log file, for pipes and, with colour added, for the terminal.

Knows what a row holds and how wide it may be. Writes nothing.
"""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from jointq_cli.records import EvaluationReport, LayerRecord, RotationRecord, RunReport, StageRecord
from jointq_cli.report import number_format as units
from jointq_cli.report.compare import rotation_summary, summary
from jointq_cli.report.console.pace import Pace

# Heading and width of what follows a layer's name, each right-aligned behind two blanks but the last.
COLUMNS = (("shape", 11), ("E_y", 7), ("E_w", 7), ("damping", 7), ("s", 5))
VERDICT_WIDTH = 8
BESIDE_THE_NAME = sum(width + 2 for _, width in COLUMNS) + 2 + VERDICT_WIDTH
LEAST_NAME_WIDTH = 12
MOST_NAME_WIDTH = 56
ROOM_FOR_A_FULL_NAME = 32  # below this a name starts at its block's number in every row
PLAIN_NAME_WIDTH = 40


def name_width(line_width: int) -> int:
    """How many characters of a line of `line_width` are left for a layer's name."""
    return max(LEAST_NAME_WIDTH, min(MOST_NAME_WIDTH, line_width - 1 - BESIDE_THE_NAME))


def layer_heading(width: int) -> str:
    """width: of the name's column."""
    cells = "".join(f"  {heading:>{cell}}" for heading, cell in COLUMNS)
    return f"{'layer':<{width}}{cells}  verdict"


def layer_line(layer: LayerRecord, width: int) -> str:
    """One row of the table of layers, without its notes. width: of the name's column."""
    values = (
        f"{layer.out_features}x{layer.in_features}",
        units.relative_error(layer.output_error),
        units.relative_error(layer.weight_error),
        units.damping(layer.damping),
        f"{layer.seconds:.{2 if layer.seconds < 99.995 else 0}f}",
    )
    cells = "".join(f"  {value:>{cell}}" for value, (_, cell) in zip(values, COLUMNS, strict=True))
    return f"{layer_label(layer, width):<{width}}{cells}  {layer.verdict}"


def layer_label(layer: LayerRecord, width: int) -> str:
    """The layer's name in at most `width` characters, always with its block's number where that fits."""
    _, block, rest = layer.name.partition(f".{layer.block}.")
    name = layer.name if width >= ROOM_FOR_A_FULL_NAME or not block else f"…{block[1:]}{rest}"
    return units.shortened(name, width)


def layer_notes(layer: LayerRecord) -> str:
    """What else the quantizer said: "dead_columns=3 condition=1.2e+06"; counts of nothing are left out."""
    return " ".join(
        f"{name}={units.significant(value, 3) if isinstance(value, float) else value}"
        for name, value in layer.notes.items()
        if value not in (0, False, None, "")
    )


def layer_entry(layer: LayerRecord) -> str:
    """A row with everything in it, for the log and for pipes."""
    notes = layer_notes(layer)
    line = layer_line(layer, PLAIN_NAME_WIDTH)
    return f"{line:<{PLAIN_NAME_WIDTH + BESIDE_THE_NAME}}  {notes}" if notes else line


def stage_cost(stage: StageRecord) -> str:
    """ "12.3 s" or "reused"."""
    return "reused" if stage.reused else units.duration(stage.seconds)


def outcome(state: str, seconds: float) -> str:
    """How a stage ended: "12.3 s", "reused", "failed after 12.3 s"."""
    if state == "done":
        return units.duration(seconds)
    return state if state == "reused" else f"{state} after {units.duration(seconds)}"


def progress(pace: Pace) -> str:
    """ "120/210, 57 %, 1 min 20 s, 59.1 s left"; without the last where the speed is unknown."""
    rest = "" if math.isnan(pace.remaining) or not pace.remaining else f", {units.duration(pace.remaining)} left"
    return f"{pace.done}/{pace.total}, {100 * pace.share:.0f} %, {units.duration(pace.elapsed)}{rest}"


def aligned(pairs: list[tuple[str, str]]) -> list[str]:
    """Labels in one column, values in the next."""
    width = max((len(label) for label, _ in pairs), default=0)
    return [f"{label:<{width}}  {value}".rstrip() for label, value in pairs]


@dataclass(frozen=True)
class Closing:
    """The end of a run as what every screen shows, each in its way."""

    verdict: str
    problems: list[str]  # what speaks against the result
    figures: list[units.KeyFigure]
    details: list[tuple[str, str]]  # (label, value)
    next_steps: list[tuple[str, str]]  # where the results lie, and what to do with them

    def as_text(self) -> list[str]:
        figures = [(figure.label, f"{figure.value}  ({figure.detail})") for figure in self.figures]
        problems = [f"[problem] {problem}" for problem in self.problems]
        return [self.verdict, *problems, *aligned([*figures, *self.details, *self.next_steps])]


def closing_of_run(report: RunReport, run_directory: Path) -> Closing:
    """What `jointq quantize` ends with."""
    checkpoint = shlex.quote(f"model.path={run_directory / 'checkpoint'}")
    return Closing(
        verdict=summary.headline(report),
        problems=summary.problems(report),
        figures=summary.key_figures(report),
        details=[
            *summary.basis(report),
            ("checkpoint", f"{units.size(report.audit.checkpoint_bytes)} on disk, in the source's dtype"),
            ("stages", _stage_costs(report.stages)),
            ("layers", summary.layer_verdicts(report)),
            ("tensor audit", summary.audit_verdict(report)),
            ("reload check", report.reload_check),
            ("protocol", report.protocol.line()),
        ],
        next_steps=[
            ("results", str(run_directory)),
            ("look at it", str(run_directory / "report.html")),
            ("evaluate it", f"jointq evaluate {checkpoint}"),
        ],
    )


def closing_of_rotation(record: RotationRecord, run_directory: Path) -> Closing:
    """What `jointq rotate` ends with."""
    return Closing(
        verdict=rotation_summary.headline(record),
        problems=rotation_summary.problems(record),
        figures=rotation_summary.figures(record),
        details=rotation_summary.provenance(record),
        next_steps=[("results", str(run_directory)), ("the basis", str(run_directory / "rotation"))],
    )


def closing_of_evaluation(report: EvaluationReport, run_directory: Path) -> Closing:
    """What `jointq evaluate` ends with."""
    value = units.plus_minus(report.perplexity.value, report.perplexity.standard_error)
    reference = [("reference", report.reference)] if report.reference else []
    return Closing(
        verdict=f"perplexity {value}",
        problems=[] if math.isfinite(report.perplexity.value) else [f"the perplexity is {report.perplexity.value}"],
        figures=summary.measured_figures(report),
        details=[
            ("model", report.model),
            *reference,
            ("stages", _stage_costs(report.stages)),
            ("protocol", report.protocol.line()),
        ],
        next_steps=[("results", str(run_directory))],
    )


def _stage_costs(stages: list[StageRecord]) -> str:
    return ", ".join(f"{stage.name} {stage_cost(stage)}" for stage in stages)
