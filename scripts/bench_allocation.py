#!/usr/bin/env python
"""Budgets of bits against uniform widths: KL divergence over bits per weight, with both kinds of ties.

    python scripts/bench_allocation.py recipe=pocket_w3g128 --budgets 2.64 3.148 3.65
    python scripts/bench_allocation.py recipe=smollm2_135m_w3g64 --budgets 3.296 --candidates "[{bits:2},{bits:3}]"

Words are overrides of all runs. Each candidate alone gives the uniform rows; the line is the log-linear interpolation
of their KL divergence at the size of a budget.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from bisect import bisect
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

CANDIDATES = "[{bits:2,zero_point:half},{bits:3},{bits:4}]"


def run(words: list[str], place: Path) -> dict[str, Any]:
    """The report of a run in `place`."""
    command = [sys.executable, "-m", "jointq_cli", "quantize", *words, f"hydra.run.dir={place}", "generate_tokens=0"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    report: dict[str, Any] = json.loads((place / "report.json").read_text())
    return report


def line(uniform: list[tuple[float, float]], bits: float) -> float:
    """uniform: (bits per weight, KL), by rising bits; NaN outside."""
    at = bisect([size for size, _ in uniform], bits)
    if not 0 < at < len(uniform):
        return math.nan
    (low, first), (high, second) = uniform[at - 1 : at + 1]
    share = (bits - low) / (high - low)
    return math.exp((1 - share) * math.log(first) + share * math.log(second))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of all runs: recipe=..., qep=...")
    parser.add_argument("--budgets", nargs="+", type=float, required=True, help="bits per weight")
    parser.add_argument("--candidates", default=CANDIDATES, help="as allocation.candidates has them")
    parser.add_argument("--out", type=Path, help="directory of the runs and their store (a temporary one)")
    arguments = parser.parse_args()
    table = Table("run", "bits per weight", "predicted", "KL divergence", "line", "against the line")
    uniform: list[tuple[float, float]] = []

    def add(name: str, report: dict[str, Any]) -> None:
        compared, bits = report["comparison"], report["bits_per_weight"]
        measured, error = compared["kl_divergence"], compared["kl_divergence_standard_error"]
        expected = line(sorted(uniform), bits)
        predicted = report["allocation"]["chosen"]["loss"] if report["allocation"] else math.nan
        table.add_row(
            name,
            f"{bits:.4f}",
            "" if math.isnan(predicted) else f"{predicted:.4f}",
            f"{measured:.4f} ± {error:.4f}",
            "" if math.isnan(expected) else f"{expected:.4f}",
            "" if math.isnan(expected) else f"{100 * (measured / expected - 1):+.1f} %",
        )

    with tempfile.TemporaryDirectory() as scratch:
        place = (arguments.out or Path(scratch)).absolute()
        words = [*arguments.overrides, f"store={place / 'store'}", f"output_dir={place}"]
        for number, settings in enumerate(yaml.safe_load(arguments.candidates.replace(":", ": "))):
            fields = [f"quantizer.{name}={value}" for name, value in settings.items()]
            report = run([*words, *fields], place / f"uniform{number}")
            add(" ".join(fields), report)
            uniform.append((report["bits_per_weight"], report["comparison"]["kl_divergence"]))
        for budget in arguments.budgets:
            for tie in ("none", "kernel"):
                fields = [
                    "allocation=budget",
                    f"allocation.bits_per_weight={budget}",
                    f"allocation.candidates={arguments.candidates}",
                    f"allocation.tie={tie}",
                ]
                add(f"budget {budget:g} tie={tie}", run([*words, *fields], place / f"budget{budget:g}{tie}"))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
