"""Self-contained HTML pages: no scripts, fonts or images from elsewhere. Imports matplotlib for the figures."""

import math
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined

from jointq_cli.records import LayerRecord, RunReport
from jointq_cli.report import number_format, rotation_summary, summary
from jointq_cli.report.compare.runs import RunComparison
from jointq_cli.report.figures.comparison import comparison_figures
from jointq_cli.report.figures.run import run_figures
from jointq_cli.report.figures.style import SvgFigure
from jointq_cli.report.tables.allocation import allocation_tables
from jointq_cli.report.tables.experts import experts_table
from jointq_cli.report.tables.run import kinds_table, tasks_table
from jointq_cli.report.tables.table import TableDocument


def run_html(report: RunReport) -> str:
    """The report of one run."""
    template = _environment().get_template("run.html.jinja")
    return template.render(
        title=summary.title(report),
        headline=summary.headline(report),
        explanation=summary.explanation(report),
        problems=summary.problems(report),
        metrics=summary.key_metrics(report),
        figures=run_figures(report),
        source="the rotated model" if report.rotation else "the source",
        refined_gains=summary.refined_gains(report),
        basis=summary.basis(report),
        stored_and_simulated=summary.stored_and_simulated(report),
        rotation_metrics=rotation_summary.metrics(report.rotation) if report.rotation else [],
        tables=[
            *tasks_table(report.tasks),
            *allocation_tables(report),
            kinds_table(report.layers),
            *experts_table(report.layers),
        ],
        layer_verdicts=summary.layer_verdicts(report),
        rows=_rows(report.layers),
        generations=report.generations,
        generation_note=summary.generation_note(report),
        warnings=report.warnings,
        provenance=summary.provenance(report),
    )


def comparison_html(comparison: RunComparison, document: TableDocument) -> str:
    """document: the tables of this comparison."""
    return document_html(document, comparison_figures(comparison))


def document_html(document: TableDocument, figures: Sequence[SvgFigure]) -> str:
    template = _environment().get_template("document.html.jinja")
    return template.render(title=document.title, document=document, figures=figures)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("jointq_cli", "report/pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        scientific=number_format.scientific,
        duration=number_format.duration,
        damping=number_format.damping_text,
        significant=number_format.significant,
    )
    return environment


def _rows(layers: list[LayerRecord]) -> list[dict[str, object]]:
    """Each layer with its notes and its output error as percent of the range from the smallest to the largest."""
    logs = [math.log(error) for layer in layers if math.isfinite(error := layer.output_error) and error > 0]
    low, high = min(logs, default=0.0), max(logs, default=0.0)
    return [
        {"layer": layer, "notes": summary.layer_notes(layer), "share": _percent_of_range(layer.output_error, low, high)}
        for layer in layers
    ]


def _percent_of_range(error: float, low: float, high: float) -> int:
    """low, high: logarithms."""
    if not math.isfinite(error):
        return 100
    if error <= 0 or high <= low:
        return 0
    return round(100 * (math.log(error) - low) / (high - low))
