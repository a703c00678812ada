"""One report, four files: report.json, layers.csv, report.md, report.html. Knows who renders each."""

import csv
import dataclasses
import json
from collections.abc import Sequence
from io import StringIO

from jointq_cli.records import LayerRecord, RunReport
from jointq_cli.report.pages.markdown import render_markdown
from jointq_cli.system.record_json import encode
from jointq_cli.system.run_directory import RunDirectory


def write_report(report: RunReport, directory: RunDirectory) -> None:
    """Writes every form of the report, the one that can be read again first. Raises ResourceError."""
    # Not above: matplotlib takes a second to import, and only the page has pictures.
    from jointq_cli.report.pages.run import render_page

    directory.write(directory.report_json, encode(report))
    directory.write(directory.layers, layers_csv(report.layers))
    directory.write(directory.report_markdown, render_markdown(report))
    directory.write(directory.report_html, render_page(report))


def layers_csv(layers: Sequence[LayerRecord]) -> str:
    """One row per layer under the names of the record's fields, at full precision; the notes as JSON."""
    names = [field.name for field in dataclasses.fields(LayerRecord)]
    text = StringIO(newline="")
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for layer in layers:
        row = {name: getattr(layer, name) for name in names}
        writer.writerow(row | {"notes": json.dumps(layer.notes, sort_keys=True)})
    return text.getvalue()
