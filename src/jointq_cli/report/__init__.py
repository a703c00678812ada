"""How a run is told: the console while it goes on, and the report files at its end.

    console      what the engine calls; screens (silent, plain), terminal (rich), log_file, pace
    writers      report.json, layers.csv, report.md, report.html; json_form, markdown, page, pictures, canvas
    summary      what is said; lines: as rows of text; units: as numbers
    sheet        several runs as tables: runs (from disk), side_by_side (what differs), comparison_page and its pictures

The only room that knows rich, jinja2 and matplotlib. Imports of the last two wait until a page is rendered.
"""

from jointq_cli.report.console.console import Console
from jointq_cli.report.pages.writers import write_report
from jointq_cli.system.record_json import encode, load_record, load_report

__all__ = ["Console", "encode", "load_record", "load_report", "write_report"]
