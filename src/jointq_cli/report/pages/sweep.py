"""The files of a sweep: summary.csv, .json, .md and .html, and the recipe of the best job."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

from jointq_cli.report.comparison import ComparedRun, RunComparison
from jointq_cli.report.number_format import plural
from jointq_cli.report.pages.documents import document_markdown
from jointq_cli.report.run_files import RECIPE, REPORT, load_jobs
from jointq_cli.report.tables.comparison import comparison_document
from jointq_cli.report.tables.table import TableDocument, csv_text
from jointq_cli.system.files import translated_disk_errors, write_text_atomically
from jointq_cli.system.sweep_directory import SweepDirectory

BEST = "best"  # the name of the recipe


def write_summary(directory: SweepDirectory, *, page: bool) -> TableDocument:
    """page: write summary.html too, whose figures take a second or two. Returns its content. Raises ResourceError."""
    jobs = RunComparison(load_jobs(directory), "job")
    document = comparison_document(jobs, f"{directory.plan().name}: sweep of {plural(len(jobs.runs), 'job')}")
    rows = [_row(job, jobs) for job in jobs.runs]
    write_text_atomically(directory.path / "summary.json", json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    write_text_atomically(directory.path / "summary.csv", csv_text(rows))
    write_text_atomically(directory.path / "summary.md", document_markdown(document))
    _write_best(directory, jobs.ranking.best)
    if page:
        from jointq_cli.report.figures.comparison import sweep_figures  # imports matplotlib
        from jointq_cli.report.pages.documents import document_html

        write_text_atomically(directory.path / "summary.html", document_html(document, sweep_figures(jobs)))
    return document


def best_recipe(directory: SweepDirectory) -> Path:
    """The path of the best job's recipe; it exists once a job that has a recipe is done."""
    return directory.path / "recipe" / f"{BEST}.yaml"


def best_command(directory: Path) -> str:
    """The command that runs the best job again."""
    return f"jointq quantize --config-dir {shlex.quote(str(directory))} recipe={BEST}"


def _row(job: ComparedRun, jobs: RunComparison) -> dict[str, Any]:
    """All figures at full precision, with standard errors where they have one, and the place in the ranking."""
    figures: dict[str, float] = {}
    for name, (value, error) in job.figures.items():
        figures |= {name: value} if math.isnan(error) else {name: value, f"{name}_standard_error": error}
    ranked = jobs.ranking
    return {
        "job": int(job.name),
        **job.settings,
        "state": job.record.state,
        "error": job.record.error,
        **{name: value if math.isfinite(value) else str(value) for name, value in figures.items()},
        "ranked_by": ranked.best and ranked.figure,
        "best": job is ranked.best,
        "not_distinguishable_from_best": job in ranked.near,
    }


def _write_best(directory: SweepDirectory, job: ComparedRun | None) -> None:
    """Writes the best job's recipe to where --config-dir finds it. A job of `jointq evaluate` has none."""
    file = best_recipe(directory)
    run = None if job is None else directory.path / job.name
    if run is None or not (run / REPORT).is_file() or not (run / RECIPE).is_file():
        file.unlink(missing_ok=True)
        return
    text = (run / RECIPE).read_text(encoding="utf-8")
    head = f"# The best of a sweep, job {run.name}: {best_command(directory.path)}\n"
    package, _, rest = text.partition("\n")  # Hydra wants its own comment on line 1
    with translated_disk_errors(file):
        file.parent.mkdir(exist_ok=True)
    write_text_atomically(file, f"{package}\n{head}{rest}")
