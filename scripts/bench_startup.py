"""What surrounds the work: CPU seconds of commands that compute nothing, the wait for the first line, and what a job of
a sweep costs beside its stages.

python scripts/bench_startup.py
"""

import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

JOINTQ = [sys.executable, "-m", "jointq_cli"]
COMMANDS = (
    "--help", "recipes", "quantize --help", "quantize quantizer=nosuch", "quantize quantizer.bits=[",
    "quantize quantizer.bits=99", "quantize --cfg job", "plan",
)  # fmt: skip
# Jobs that return at once: what remains is composing them and their place in the summary.
EMPTY_SWEEP = """
import sys
from jointq_cli.cli.compose import launch
launch("quantize", ["-m", *sys.argv[1:]], lambda recipe, job: None)
"""
FEW, MANY = 2, 12  # jobs


def cpu_seconds(command: Sequence[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def first_line() -> float:
    """Seconds of wall time from the start of `jointq quantize` to its first line."""
    start = time.perf_counter()
    with subprocess.Popen([*JOINTQ, "quantize"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
        assert run.stdout is not None
        run.stdout.readline()
        seconds = time.perf_counter() - start
        run.kill()
    return seconds


def empty_sweep(jobs: int, place: str) -> float:
    values = ",".join(f"{0.01 * (number + 1):.2f}" for number in range(jobs))
    words = [f"quantizer.regularization_lambda={values}", f"hydra.sweep.dir={place}/{jobs}"]
    return cpu_seconds([sys.executable, "-c", EMPTY_SWEEP, *words])


def main() -> None:
    for words in COMMANDS:
        print(f"{cpu_seconds([*JOINTQ, *words.split()]):6.2f} CPU s  jointq {words}")
    print(f"{first_line():6.2f} s      to the first line of jointq quantize")
    place = tempfile.mkdtemp()
    spent = {jobs: empty_sweep(jobs, place) for jobs in (FEW, MANY)}
    shutil.rmtree(place)
    print(f"{(spent[MANY] - spent[FEW]) / (MANY - FEW):6.2f} CPU s  per job of a sweep, composed and listed")


if __name__ == "__main__":
    main()
