"""Reports a run: on the console while it runs, and in report files at its end. Runs and measures nothing.

Imports inside the room point one way, from left to right:

    console, pages > figures > tables > compare > summary, rotation_summary > number_format, grouping, limits

    reproduction   compares a run with its replay; imports compare and summary, and is imported by no other part
    console        display and log file of a running command
    pages          report files: one template for HTML, one for Markdown, and CSV and JSON
    figures        figures as inline SVG
    tables         documents of tables and texts, from which console and pages render; what their words mean
    compare        what differs between runs, and what the jobs of a sweep measured

The only room that imports rich, jinja2 and matplotlib, the latter two only when a page is rendered.
"""

from jointq_cli.report.console.console import Console
from jointq_cli.report.pages.writers import write_report
from jointq_cli.system.record_json import encode, load_record, load_report

__all__ = ["Console", "encode", "load_record", "load_report", "write_report"]
