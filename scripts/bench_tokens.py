#!/usr/bin/env python
"""KL divergence over the number of calibration tokens, and CPU seconds, of a text and of what the model writes itself.

    python scripts/bench_tokens.py                                                # the bundled model
    python scripts/bench_tokens.py --windows 8 32 128 recipe=smollm2_135m_w3g64 calibration.path=...

Each series is a run of `jointq quantize` for each number of windows: `text` is the recipe's calibration text,
`generated` is as many windows that the model writes, and `added` is all of the text (--text-windows) and continuations
of it up to the number. A run that --output has already is not computed again. Tokens that the model writes are computed
once, and their seconds are those of the first run that needs them.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

WINDOWS = (8, 16, 32, 64, 128, 256, 512)
SERIES = ("text", "generated", "added")
QUANTIZERS = ("jointq", "gptq")


@dataclass(frozen=True)
class Point:
    """One run. seconds: of CPU, the writing of tokens included."""

    series: str
    quantizer: str
    windows: int
    tokens: int
    perplexity: float
    kl: float
    standard_error: float
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of all runs: recipe=..., calibration.seqlen=...")
    parser.add_argument("--windows", nargs="+", type=int, default=WINDOWS)
    parser.add_argument("--text-windows", type=int, default=64, help="that the text has; more of it are not tried (64)")
    parser.add_argument("--series", nargs="+", choices=SERIES, default=SERIES)
    parser.add_argument("--quantizers", nargs="+", default=QUANTIZERS)
    parser.add_argument("--output", type=Path, default=Path("runs/tokens"), help="of the runs and kl.png (runs/tokens)")
    arguments = parser.parse_args()
    overrides = arguments.overrides or ["recipe=pocket_w3g128"]
    points = [
        measure(arguments.output / f"{series}_{quantizer}_{count}", series, quantizer, count, overrides + words)
        for series in arguments.series
        for quantizer in arguments.quantizers
        for count in arguments.windows
        if (words := calibration(series, count, arguments.text_windows))
    ]
    show_table(points)
    draw(points, arguments.output / "kl.png")


def calibration(series: str, count: int, most: int) -> list[str]:
    """The words that ask for so many windows; none where the series does not have them."""
    if series == "generated":
        reads_none = ["calibration.path=null", "calibration.tokens=null"]
        return ["calibration.dataset=generated", *reads_none, f"calibration.num_samples={count}"]
    if (series == "text") != (count <= most):
        return []
    added = [] if series == "text" else [f"calibration.add_generated={count - most}"]
    return [f"calibration.num_samples={min(count, most)}", *added]


def measure(run: Path, series: str, quantizer: str, count: int, words: list[str]) -> Point:
    result = run / "point.json"
    if not result.exists():
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        settings = [f"name={run.name}", f"quantizer={quantizer}", f"hydra.run.dir={run}", "generate_tokens=0"]
        command = [sys.executable, "-m", "jointq_cli", "quantize", *words, *settings]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"{run.name}: {time.perf_counter() - start:.0f} s, {seconds:.0f} s of CPU", file=sys.stderr)
        result.write_text(json.dumps({"seconds": seconds, "words": words}))
    if json.loads(result.read_text())["words"] != words:
        sys.exit(f"{result}: of other settings; give another --output")
    report, provenance = json.loads((run / "report.json").read_text()), json.loads((run / "manifest.json").read_text())
    windows = provenance["texts"]["calibration"]
    return Point(
        series=series,
        quantizer=quantizer,
        windows=int(windows["num_samples"]),
        tokens=int(windows["num_samples"]) * int(windows["seqlen"]),
        perplexity=report["quantized"]["value"],
        kl=report["comparison"]["kl_divergence"],
        standard_error=report["comparison"]["kl_divergence_standard_error"],
        seconds=json.loads(result.read_text())["seconds"],
    )


def show_table(points: list[Point]) -> None:
    table = Table("calibrated on", "quantizer", "windows", "tokens", "perplexity", "KL", "CPU s")
    for point in points:
        error = f"{point.kl:.4f} ± {point.standard_error:.4f}"
        numbers = (f"{point.windows}", f"{point.tokens:,}", f"{point.perplexity:.2f}", error, f"{point.seconds:.0f}")
        table.add_row(point.series, point.quantizer, *numbers)
    Console(width=120).print(table)


def draw(points: list[Point], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in dict.fromkeys((point.series, point.quantizer) for point in points):
        line = sorted((point.tokens, point.kl, point.standard_error) for point in points if name == key(point))
        axes.errorbar(*zip(*line, strict=True), marker="o", capsize=2, label=" ".join(name))
    axes.set(xscale="log", xlabel="calibration tokens", ylabel="KL divergence (nats per token)")
    axes.legend()
    figure.savefig(path, dpi=150)


def key(point: Point) -> tuple[str, str]:
    return point.series, point.quantizer


if __name__ == "__main__":
    main()
