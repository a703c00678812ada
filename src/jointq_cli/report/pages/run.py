"""The report files of a run: report.json, layers.csv, report.md and report.html."""

import dataclasses
import json
from collections.abc import Sequence

from jointq_cli.records import LayerRecord, RunReport
from jointq_cli.report.pages.documents import document_html, document_markdown
from jointq_cli.report.tables.run import run_document
from jointq_cli.report.tables.table import csv_text
from jointq_cli.system.record_json import encode
from jointq_cli.system.run_directory import RunDirectory

WORST = 10  # layers in Markdown; layers.csv has all


def write_report(report: RunReport, directory: RunDirectory, *, page: bool = True) -> None:
    """Writes all four files, first report.json, from which the others can be rendered. Raises ResourceError.

    page: report.html too, whose figures take a second.
    """
    directory.write(directory.report_json, encode(report))
    directory.write(directory.layers, layers_csv(report.layers))
    directory.write(directory.report_markdown, run_markdown(report))
    if page:
        directory.write(directory.report_html, run_html(report))


def run_markdown(report: RunReport) -> str:
    return document_markdown(run_document(report, WORST))


def run_html(report: RunReport) -> str:
    from jointq_cli.report.figures.run import run_figures  # imports matplotlib, which takes half a second

    return document_html(run_document(report), run_figures(report))


def layers_csv(layers: Sequence[LayerRecord]) -> str:
    """One row per layer at full precision. Columns are the fields of LayerRecord; the notes are JSON."""
    return csv_text(
        [dataclasses.asdict(layer) | {"notes": json.dumps(layer.notes, sort_keys=True)} for layer in layers]
    )
