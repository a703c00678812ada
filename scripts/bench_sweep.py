"""A sweep of lambda compared with separate runs: seconds of wall time and of CPU, by stage.

python scripts/bench_sweep.py                                      # the bundled model, as in docs/sweeps.md
python scripts/bench_sweep.py --lambdas 0.03 0.3 recipe=smollm2_135m_w3g64 ...
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

LAMBDAS = ("0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1.0", "2.0")
PER_JOB = ("quantize", "evaluate quantized")  # the stages that depend on lambda
KEY = "quantizer.regularization_lambda"
SHARED = ["calibration.inputs=original", "qep=none"]


def timed(words: Sequence[str]) -> tuple[float, float]:
    """Seconds and CPU seconds of one jointq quantize."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "jointq_cli", "quantize", *words], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - start, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def stages(run: Path) -> dict[str, float]:
    report = json.loads((run / "report.json").read_text())
    return {stage["name"]: stage["seconds"] for stage in report["stages"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of both: recipe=..., runtime.num_threads=...")
    parser.add_argument("--lambdas", nargs="+", default=LAMBDAS)
    parser.add_argument("--separate", type=int, help="how many of them to run separately as well (all)")
    arguments = parser.parse_args()
    words = [*arguments.overrides, *SHARED]
    with tempfile.TemporaryDirectory() as place:
        swept = Path(place, "sweep")
        sweep = timed(
            ["-m", *words, f"output_dir={place}", f"hydra.sweep.dir={swept}", f"{KEY}={','.join(arguments.lambdas)}"]
        )
        jobs = [stages(swept / str(number)) for number in range(len(arguments.lambdas))]
        alone = []
        for number, value in enumerate(arguments.lambdas[: arguments.separate]):
            folder = Path(place, f"alone{number}")
            cost = timed([*words, f"{KEY}={value}", f"output_dir={folder}", f"hydra.run.dir={folder}/run"])
            alone.append((*cost, stages(folder / "run")))
    print_table(sweep, jobs, alone)


def print_table(
    sweep: tuple[float, float], jobs: list[dict[str, float]], alone: list[tuple[float, float, dict[str, float]]]
) -> None:
    names = list(dict.fromkeys(name for job in jobs for name in job))
    scale = len(jobs) / len(alone)
    table = Table("stage", "first job", "other jobs, mean", f"{len(jobs)} jobs", f"{len(jobs)} runs", title="seconds")
    for name in names:
        first, *others = [job.get(name, 0.0) for job in jobs]
        single = scale * sum(run[2].get(name, 0.0) for run in alone)
        mean = sum(others) / max(1, len(others))
        table.add_row(name, f"{first:.2f}", f"{mean:.2f}", f"{first + sum(others):.1f}", f"{single:.1f}")
    wall, cpu = scale * sum(run[0] for run in alone), scale * sum(run[1] for run in alone)
    table.add_row("whole command", "", "", f"{sweep[0]:.1f}", f"{wall:.1f}", end_section=True)
    table.add_row("CPU seconds", "", "", f"{sweep[1]:.1f}", f"{cpu:.1f}")
    console = Console(width=120)
    console.print(table)
    in_stages = sum(sum(job.values()) for job in jobs)
    needed = sum(jobs[0].values()) + sum(job.get(name, 0.0) for job in jobs[1:] for name in PER_JOB)
    console.print(f"stages / (one calibration + {len(jobs)} x (solve + evaluate)): {in_stages / needed:.3f}")
    console.print(f"whole sweep / the same: {sweep[0] / needed:.3f}; separate runs / sweep: {wall / sweep[0]:.2f}")
    if len(alone) < len(jobs):
        console.print(f"{len(alone)} separate runs were timed, and scaled")


if __name__ == "__main__":
    main()
