"""What a sweep found, in files: summary.csv, .json, .md, .html, best.yaml. Knows who renders each."""

import csv
import json
import math
import shlex
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from jointq_cli.report.compare.run_files import RECIPE, REPORT
from jointq_cli.report.compare.sweep import SweepJob, best, load_jobs
from jointq_cli.report.pages.markdown import render_sheet
from jointq_cli.report.tables.sweep import make_sweep_sheet
from jointq_cli.system.files import translated_disk_errors, write_text_atomically
from jointq_cli.system.sweep_directory import SweepDirectory

BEST = "best"  # the recipe's name


def write_summary(directory: SweepDirectory, *, page: bool) -> None:
    """page: with its pictures, which take a second or two. Raises ResourceError."""
    name, jobs = directory.plan().name, load_jobs(directory)
    sheet = make_sweep_sheet(name, jobs)
    table = [_row(job) for job in jobs]
    write_text_atomically(directory.path / "summary.json", json.dumps(table, indent=2, ensure_ascii=False) + "\n")
    write_text_atomically(directory.path / "summary.csv", _csv(table))
    write_text_atomically(directory.path / "summary.md", render_sheet(sheet))
    _write_best(directory, best(jobs))
    if page:
        from jointq_cli.report.figures.sweep import draw_sweep
        from jointq_cli.report.pages.comparison import render_sheet_page  # brings matplotlib

        write_text_atomically(directory.path / "summary.html", render_sheet_page(sheet, draw_sweep(jobs)))


def best_recipe(directory: SweepDirectory) -> Path:
    """Where the best job's recipe is, if there is a job that has one."""
    return directory.path / "recipe" / f"{BEST}.yaml"


def best_command(directory: Path) -> str:
    """What runs the best job again."""
    return f"jointq quantize --config-dir {shlex.quote(str(directory))} recipe={BEST}"


def _row(job: SweepJob) -> dict[str, Any]:
    """Everything measured, at full precision; null where there is nothing."""
    measured, comparison = job.measured, job.measured and job.measured.comparison
    figures: dict[str, Any] = {
        "perplexity": measured and measured.perplexity.value,
        "perplexity_standard_error": measured and measured.perplexity.standard_error,
        "original_perplexity": measured and measured.original_perplexity,
        "nll_increase": comparison and comparison.nll_increase,
        "nll_increase_standard_error": comparison and comparison.nll_increase_standard_error,
        "kl_divergence": comparison and comparison.kl_divergence,
        "kl_divergence_standard_error": comparison and comparison.kl_divergence_standard_error,
        "top1_agreement": comparison and comparison.top1_agreement,
        "bits_per_weight": measured and measured.bits_per_weight,
        "peak_memory": measured and measured.peak_memory,
    }
    return {
        "job": job.number,
        **job.settings,
        "state": job.record.state,
        "error": job.record.error,
        "seconds": round(job.record.seconds, 3),
        **{name: _jsonable(value) for name, value in figures.items()},
    }


def _jsonable(value: float | None) -> float | str | None:
    """JSON has neither NaN nor infinity."""
    return value if value is None or math.isfinite(value) else str(value)


def _csv(table: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in table for name in row))
    text = StringIO(newline="")
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def _write_best(directory: SweepDirectory, job: SweepJob | None) -> None:
    """The best job's recipe where --config-dir finds it. What was only evaluated has none."""
    file = best_recipe(directory)
    run = None if job is None else directory.run(job.number)
    if run is None or not (run / REPORT).is_file() or not (run / RECIPE).is_file():
        file.unlink(missing_ok=True)
        return
    text = (run / RECIPE).read_text(encoding="utf-8")
    head = f"# The best of a sweep, job {run.name}: {best_command(directory.path)}\n"
    package, _, rest = text.partition("\n")  # Hydra wants its own comment on line 1
    with translated_disk_errors(file):
        file.parent.mkdir(exist_ok=True)
    write_text_atomically(file, f"{package}\n{head}{rest}")
