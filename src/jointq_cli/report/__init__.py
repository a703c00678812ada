"""Reports a run: on the console while it runs, and in report files at its end. Runs and measures nothing.

Imports inside the room point one way, from left to right:

    console, pages, reproduction > figures > tables > summary, finished_run > run_files > comparison > measured

    console        display and log file of a running command
    pages          report files: one template for HTML, one for Markdown, and CSV and JSON
    reproduction   whether two runs are the same
    figures        figures as SVG
    tables         documents of tables and texts, from which console and pages render; what their words mean
    comparison     what differs between runs, or the jobs of a sweep, and which is best; run_files reads them
    measured       the figures of a report by name, and how they are shown; limits are set by these names

The only room that imports rich, jinja2 and matplotlib, the latter two only when a page is rendered.
"""

from jointq_cli.report.console.console import Console
from jointq_cli.report.pages.run import write_report
from jointq_cli.system.record_json import encode, load_record, load_report

__all__ = ["Console", "encode", "load_record", "load_report", "write_report"]
