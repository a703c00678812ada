#!/usr/bin/env python
"""One process against several, one thread each: calibration and solve of the bundled model.

    python scripts/bench_distributed.py                           # the default recipe, 192 x 512 calibration tokens
    python scripts/bench_distributed.py --rounds 3 quantizer=gptq

Rounds alternate, so that other work on the machine affects both. Wall time is that of the stage quantize. CPU seconds
are the busiest process's, minus those of the same command when everything is in the store: start, imports and report.
Where cores are shared with other work, the ratio of CPU seconds estimates that of wall time on idle cores.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

SETTINGS = [
    "calibration.strategy=concat_rand", "evaluation.seqlen=128", "evaluation.max_windows=1", "runtime.num_threads=1",
    "output_dir=out",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--windows", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="further settings of jointq quantize")
    arguments = parser.parse_args()
    settings = [*SETTINGS, f"calibration.num_samples={arguments.windows}", *arguments.settings]
    print("| round | processes | wall s | CPU s | wall ratio | CPU ratio |\n|---|---|---|---|---|---|")
    for number in range(arguments.rounds):
        alone = measure(1, settings)
        together = measure(arguments.processes, settings)
        print(f"| {number} | 1 | {alone[0]:.1f} | {alone[1]:.1f} | | |")
        ratios = [one / other for one, other in zip(alone, together, strict=True)]
        line = f"{together[0]:.1f} | {together[1]:.1f} | {ratios[0]:.2f} x | {ratios[1]:.2f} x"
        print(f"| {number} | {arguments.processes} | {line} |", flush=True)


def measure(size: int, settings: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of calibration and solve."""
    with TemporaryDirectory() as folder:
        first = cpu_seconds(size, folder, [*settings, "hydra.run.dir=out/first"])
        again = cpu_seconds(size, folder, [*settings, "hydra.run.dir=out/again"])
        report = json.loads(Path(folder, "out/first/report.json").read_text())
    wall = sum(stage["seconds"] for stage in report["stages"] if stage["name"] in ("hessians", "quantize"))
    return wall, max(one - other for one, other in zip(first, again, strict=True))


def cpu_seconds(size: int, folder: str, settings: list[str]) -> list[float]:
    """Of each of the processes that run the command together."""
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        port = listening.getsockname()[1]
    processes = []
    for rank in range(size):
        members = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment = {**os.environ, **{name: str(value) for name, value in {**members, **meeting}.items()}}
        command = [sys.executable, "-m", "jointq_cli", "quantize", *settings]
        processes.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL))
    spent = []
    for process in processes:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{' '.join(process.args)}: exit code {process.returncode}")
        spent.append(usage.ru_utime + usage.ru_stime)
    return spent


if __name__ == "__main__":
    main()
