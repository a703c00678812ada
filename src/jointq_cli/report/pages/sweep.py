"""The files of a sweep: summary.csv, .json, .md and .html, and the recipe of the best job."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

from jointq_cli.report.compare.run_files import RECIPE, REPORT
from jointq_cli.report.compare.sweep import Ranking, SweepJob, load_jobs, ranking
from jointq_cli.report.pages.markdown import document_markdown
from jointq_cli.report.tables.sweep import sweep_document
from jointq_cli.report.tables.table import csv_text
from jointq_cli.system.files import translated_disk_errors, write_text_atomically
from jointq_cli.system.sweep_directory import SweepDirectory

BEST = "best"  # the name of the recipe


def write_summary(directory: SweepDirectory, *, page: bool) -> None:
    """page: write summary.html too, whose figures take a second or two. Raises ResourceError."""
    name, jobs = directory.plan().name, load_jobs(directory)
    document, ranked = sweep_document(name, jobs), ranking(jobs)
    rows = [_row(job, ranked) for job in jobs]
    names = list(dict.fromkeys(name for row in rows for name in row))
    write_text_atomically(directory.path / "summary.json", json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    write_text_atomically(directory.path / "summary.csv", csv_text(names, rows))
    write_text_atomically(directory.path / "summary.md", document_markdown(document))
    _write_best(directory, ranked.best)
    if page:
        from jointq_cli.report.figures.sweep import sweep_figures  # imports matplotlib
        from jointq_cli.report.pages.html import document_html

        write_text_atomically(directory.path / "summary.html", document_html(document, sweep_figures(jobs)))


def best_recipe(directory: SweepDirectory) -> Path:
    """The path of the best job's recipe; it exists once a job that has a recipe is done."""
    return directory.path / "recipe" / f"{BEST}.yaml"


def best_command(directory: Path) -> str:
    """The command that runs the best job again."""
    return f"jointq quantize --config-dir {shlex.quote(str(directory))} recipe={BEST}"


def _row(job: SweepJob, ranked: Ranking) -> dict[str, Any]:
    """All measurements at full precision, and the place in the ranking; None where there is none."""
    measured, comparison = job.measured, job.measured and job.measured.comparison
    metrics: dict[str, Any] = {
        "perplexity": measured and measured.perplexity.value,
        "perplexity_standard_error": measured and measured.perplexity.standard_error,
        "original_perplexity": measured and measured.original_perplexity,
        "nll_increase": comparison and comparison.nll_increase,
        "nll_increase_standard_error": comparison and comparison.nll_increase_standard_error,
        "kl_divergence": comparison and comparison.kl_divergence,
        "kl_divergence_standard_error": comparison and comparison.kl_divergence_standard_error,
        "top1_agreement": comparison and comparison.top1_agreement,
        "bits_per_weight": measured and measured.bits_per_weight,
        "block_bits_per_weight": measured and measured.coverage and measured.coverage.block_bits,
        "checkpoint_bits_per_parameter": measured and measured.coverage and measured.coverage.checkpoint_bits,
        "peak_memory": measured and measured.peak_memory,
    }
    for task in measured.tasks if measured else []:
        metrics[task.name] = task.score.value
        metrics[f"{task.name}_standard_error"] = task.score.standard_error
    return {
        "job": job.number,
        **job.settings,
        "state": job.record.state,
        "error": job.record.error,
        "seconds": round(job.record.seconds, 3),
        **{name: _jsonable(value) for name, value in metrics.items()},
        "ranked_by": ranked.best and ranked.measure,
        "best": job is ranked.best,
        "not_distinguishable_from_best": job in ranked.near,
    }


def _jsonable(value: float | None) -> float | str | None:
    """JSON has neither NaN nor infinity."""
    return value if value is None or math.isfinite(value) else str(value)


def _write_best(directory: SweepDirectory, job: SweepJob | None) -> None:
    """Writes the best job's recipe to where --config-dir finds it. A job of `jointq evaluate` has none."""
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
