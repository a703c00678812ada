"""What a sweep found, in files: summary.csv, .json, .md, .html, best.yaml. Knows who renders each."""

import csv
import json
import math
import shlex
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from jointq_cli.report.markdown import render_sheet
from jointq_cli.report.runs import RECIPE
from jointq_cli.report.sweep_sheet import SweepJob, best, load_jobs, make_sweep_sheet
from jointq_cli.run_directory import write_whole
from jointq_cli.store import translated_disk_errors
from jointq_cli.sweep_directory import SweepDirectory

BEST = "best"  # the recipe's name


def write_summary(directory: SweepDirectory, *, page: bool) -> None:
    """page: with its pictures, which take a second or two. Raises ResourceError."""
    name, jobs = directory.plan().name, load_jobs(directory)
    sheet = make_sweep_sheet(name, jobs)
    table = [_row(job) for job in jobs]
    write_whole(directory.path / "summary.json", json.dumps(table, indent=2, ensure_ascii=False) + "\n")
    write_whole(directory.path / "summary.csv", _csv(table))
    write_whole(directory.path / "summary.md", render_sheet(sheet))
    _write_best(directory, best(jobs))
    if page:
        from jointq_cli.report.comparison_page import render_sheet_page  # brings matplotlib
        from jointq_cli.report.sweep_pictures import draw_sweep

        write_whole(directory.path / "summary.html", render_sheet_page(sheet, draw_sweep(jobs)))


def best_command(directory: Path) -> str:
    """What runs the best job again."""
    return f"jointq quantize --config-dir {shlex.quote(str(directory))} recipe={BEST}"


def _row(job: SweepJob) -> dict[str, Any]:
    """Everything measured, at full precision; null where there is nothing."""
    report = job.report
    measured: dict[str, Any] = {
        "perplexity": report and report.quantized.value,
        "perplexity_standard_error": report and report.quantized.standard_error,
        "original_perplexity": report and report.original.value,
        "nll_increase": report and report.comparison.nll_increase,
        "nll_increase_standard_error": report and report.comparison.nll_increase_standard_error,
        "kl_divergence": report and report.comparison.kl_divergence,
        "kl_divergence_standard_error": report and report.comparison.kl_divergence_standard_error,
        "top1_agreement": report and report.comparison.top1_agreement,
        "bits_per_weight": report and report.bits_per_weight,
        "peak_memory": report and report.peak_memory,
    }
    return {
        "job": job.number,
        **job.settings,
        "state": job.record.state,
        "error": job.record.error,
        "seconds": round(job.record.seconds, 3),
        **{name: _jsonable(value) for name, value in measured.items()},
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
    """The best job's recipe where --config-dir finds it."""
    file = directory.path / "recipe" / f"{BEST}.yaml"
    recipe = None if job is None else directory.run(job.number) / RECIPE
    if job is None or recipe is None or not recipe.is_file():
        file.unlink(missing_ok=True)
        return
    text = recipe.read_text(encoding="utf-8")
    head = f"# The best of a sweep, job {job.number}: {best_command(directory.path)}\n"
    package, _, rest = text.partition("\n")  # Hydra wants its own comment on line 1
    with translated_disk_errors(file):
        file.parent.mkdir(exist_ok=True)
    write_whole(file, f"{package}\n{head}{rest}")
