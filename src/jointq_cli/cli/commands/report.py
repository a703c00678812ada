"""`jointq report`: a finished run, rendered again from its report.json, or a sweep, finished or not."""

import argparse
from pathlib import Path

from jointq_cli.records import RunReport
from jointq_cli.report import Console, load_report
from jointq_cli.report.compare.sweep import load_jobs
from jointq_cli.report.pages.markdown import document_markdown, run_markdown
from jointq_cli.report.pages.sweep import write_summary
from jointq_cli.report.tables.sweep import sweep_document
from jointq_cli.system.run_directory import RunDirectory
from jointq_cli.system.sweep_directory import SweepDirectory


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "jointq report", description="Render a finished run again, or a sweep, finished or not."
    )
    parser.add_argument("run_directory", type=Path, help="a run directory, such as runs/NAME/DATE_TIME, or a sweep's")
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--terminal", action="store_true", help="the closing table (default)")
    forms.add_argument("--markdown", action="store_true", help="print it as markdown")
    forms.add_argument("--html", action="store_true", help="write report.html again")
    parsed = parser.parse_args(arguments)
    sweep = SweepDirectory(parsed.run_directory)
    if sweep.exists:
        _report_sweep(sweep, parsed)
        return 0
    report = load_report(parsed.run_directory / "report.json")
    if parsed.markdown:
        print(run_markdown(report), end="")
    elif parsed.html:
        print(_write_page(report, parsed.run_directory))
    else:
        with Console() as console:
            console.show_run(report, parsed.run_directory)
    return 0


def _report_sweep(sweep: SweepDirectory, parsed: argparse.Namespace) -> None:
    write_summary(sweep, page=parsed.html or (sweep.path / "summary.html").is_file())
    document = sweep_document(sweep.plan().name, load_jobs(sweep))
    if parsed.markdown:
        print(document_markdown(document), end="")
    elif parsed.html:
        print(sweep.path / "summary.html")
    else:
        with Console() as console:
            console.show_tables(document)


def _write_page(report: RunReport, directory: Path) -> Path:
    from jointq_cli.report.pages.html import run_html  # imports matplotlib, for this form only

    run = RunDirectory(directory)
    run.write(run.report_html, run_html(report))
    return run.report_html
