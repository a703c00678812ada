"""`jointq report`: a finished run, rendered again from its report.json, or a sweep, finished or not."""

import argparse
from pathlib import Path
from typing import cast

from jointq_cli.errors import JointqError
from jointq_cli.records import EvaluationReport, RunReport
from jointq_cli.report import Console, load_record, load_report
from jointq_cli.report.console.final_summary import evaluate_summary, quantize_summary
from jointq_cli.report.pages.documents import document_markdown
from jointq_cli.report.pages.run import run_html, run_markdown
from jointq_cli.report.pages.sweep import write_summary
from jointq_cli.report.run_files import EVALUATION, RECIPE, REPORT, load_settings
from jointq_cli.system.run_directory import RunDirectory
from jointq_cli.system.sweep_directory import SweepDirectory

LAST_LINES = 6  # of the log of an interrupted run


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "jointq report",
        description="Render a finished run again, or show an evaluation, an interrupted run or a sweep.",
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
    if not (parsed.run_directory / REPORT).is_file() and parsed.run_directory.is_dir():
        return _report_without(parsed)
    report = load_report(parsed.run_directory / REPORT)
    if parsed.markdown:
        print(run_markdown(report), end="")
    elif parsed.html:
        print(_write_page(report, parsed.run_directory))
    else:
        with Console() as console:
            console.show(quantize_summary(report, parsed.run_directory))
    return 0


def _report_without(parsed: argparse.Namespace) -> int:
    """Of a run that has no report.json: an evaluation, or one that was interrupted."""
    run = parsed.run_directory
    if parsed.markdown or parsed.html:
        raise JointqError(f"{run}: has no {REPORT}; only a finished jointq quantize is rendered as Markdown or HTML")
    if (run / EVALUATION).is_file():
        report = cast(EvaluationReport, load_record(EvaluationReport, run / EVALUATION))
        with Console() as console:
            console.show(evaluate_summary(report, run))
        return 0
    if not (run / RECIPE).is_file():
        raise JointqError(f"{run}: has neither {REPORT} nor {EVALUATION} nor {RECIPE}, so it is no run of jointq")
    settings = load_settings(run / RECIPE)
    log = run / "log.txt"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:] if log.is_file() else []
    print(f"{run}: not finished; recipe {settings.get('name')}, model {settings.get('model.path')}")
    print("\n".join(["its log ends:", *lines] if lines else ["it has no log"]))
    print("The command that began it continues it; finished stages and layers are in the store.")
    return 1


def _report_sweep(sweep: SweepDirectory, parsed: argparse.Namespace) -> None:
    document = write_summary(sweep, page=parsed.html or (sweep.path / "summary.html").is_file())
    if parsed.markdown:
        print(document_markdown(document), end="")
    elif parsed.html:
        print(sweep.path / "summary.html")
    else:
        with Console() as console:
            console.show(document)


def _write_page(report: RunReport, directory: Path) -> Path:
    run = RunDirectory(directory)
    run.write(run.report_html, run_html(report))
    return run.report_html
