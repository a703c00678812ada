#!/usr/bin/env python
"""Peak memory against model size: it should follow the block and the embeddings, not the number of layers.

    python scripts/bench_memory.py                 # random Llamas of 4, 8 and 16 layers, 1024 wide
    python scripts/bench_memory.py --llama1b       # and one of exactly Llama-3.2-1B's shape (2.5 GB on disk)

Each model is quantised by `jointq quantize` in a process of its own, 8 x 512 calibration tokens, 2 x 512 evaluated.
Peak memory is the maximum resident set size of that process, Python and PyTorch included.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

SCRIPTS = Path(__file__).parent
SETTINGS = [
    "recipe=pocket_w4g128", "calibration.num_samples=8", "calibration.seqlen=512", "evaluation.seqlen=512",
    "evaluation.max_windows=2",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama1b", action="store_true")
    parser.add_argument("--scratch", type=Path, default=Path("models"), help="where models and runs are written")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="further settings of jointq quantize")
    arguments = parser.parse_args()
    wide = [
        "--hidden",
        "1024",
        "--intermediate",
        "4096",
        "--heads",
        "16",
        "--kv-heads",
        "4",
        "--vocabulary",
        "32768",
    ]
    shapes = {f"random-{layers}-layers": ["--layers", str(layers), *wide] for layers in (4, 8, 16)}
    if arguments.llama1b:
        shapes["random-llama1b"] = []
    print("| model | parameters | bf16 weights | peak memory | seconds |\n|---|---|---|---|---|")
    for name, shape in shapes.items():
        print(measure(arguments.scratch, name, shape, arguments.settings), flush=True)


def measure(scratch: Path, name: str, shape: list[str], settings: list[str]) -> str:
    model, run = scratch / name, scratch / "runs" / f"{name}_{time.time_ns()}"
    if not (model / "config.json").exists():
        subprocess.run([sys.executable, SCRIPTS / "make_random_model.py", model, *shape], check=True, stdout=sys.stderr)
    places = [f"model.path={model.resolve()}", f"output_dir={run}", f"hydra.run.dir={run}/run"]
    started = time.perf_counter()
    command = [sys.executable, "-m", "jointq_cli", "quantize", *SETTINGS, *places, *settings]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    report = json.loads((run / "run" / "report.json").read_text())
    size, peak = report["audit"]["source_bytes"], report["peak_memory"]
    return (
        f"| {name} | {report['parameters'] / 1e6:,.0f} M | {size / 1e9:.2f} GB | {peak / 1e9:.2f} GB | {seconds:.0f} |"
    )


if __name__ == "__main__":
    main()
