"""A report as one HTML file that asks nobody for anything. Knows its template; imports matplotlib."""

import math

from jinja2 import Environment, PackageLoader, StrictUndefined

from jointq_cli.records import LayerRecord, RunReport
from jointq_cli.report import number_format as units
from jointq_cli.report.compare import rotation_summary, summary
from jointq_cli.report.console import lines
from jointq_cli.report.figures.run import draw_pictures

TEMPLATE = "run.html.jinja"


def render_page(report: RunReport) -> str:
    template = environment().get_template(TEMPLATE)
    return template.render(
        title=summary.title(report),
        headline=summary.headline(report),
        explanation=summary.explanation(report),
        problems=summary.problems(report),
        figures=summary.key_figures(report),
        pictures=draw_pictures(report),
        source="the rotated model" if report.rotation else "the source",
        basis=summary.basis(report),
        stored_and_simulated=summary.stored_and_simulated(report),
        rotation_figures=rotation_summary.figures(report.rotation) if report.rotation else [],
        kinds=summary.kind_summaries(report.layers),
        layer_verdicts=summary.layer_verdicts(report),
        rows=_rows(report.layers),
        warnings=report.warnings,
        provenance=summary.provenance(report),
    )


def environment() -> Environment:
    """Where the templates are, and how they put numbers."""
    environment = Environment(
        loader=PackageLoader("jointq_cli", "report/pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        error=units.relative_error,
        duration=units.duration,
        damping=units.damping,
        significant=units.significant,
    )
    return environment


def _rows(layers: list[LayerRecord]) -> list[dict[str, object]]:
    """Each layer with its notes and, in percent, its output error's place between smallest and largest."""
    logs = [math.log(error) for layer in layers if math.isfinite(error := layer.output_error) and error > 0]
    low, high = min(logs, default=0.0), max(logs, default=0.0)
    return [
        {"layer": layer, "notes": lines.layer_notes(layer), "share": _share(layer.output_error, low, high)}
        for layer in layers
    ]


def _share(error: float, low: float, high: float) -> int:
    if not math.isfinite(error):
        return 100
    if error <= 0 or high <= low:
        return 0
    return round(100 * (math.log(error) - low) / (high - low))
