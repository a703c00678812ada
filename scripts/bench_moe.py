#!/usr/bin/env python
"""KL divergence of a quantised mixture of experts, by quantizer, bits and how its experts are calibrated.

    python scripts/bench_moe.py pocket-moe runs/moe                    # 30 runs, about a minute each
    python scripts/bench_moe.py pocket-moe runs/moe --bits 3 2 --set calibration.num_samples=8

pocket-moe is what scripts/train_pocket.py --experts 8 trains. Runs that are in the folder already are not repeated.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from jointq_cli.report import load_report

SETTINGS = ["calibration.num_samples=32", "evaluation.max_windows=40", "generate_tokens=0"]
METHODS = {
    "RTN": ["quantizer=rtn", "qep=none"],
    "GPTQ": ["quantizer=gptq", "qep=none"],
    "GPTQ + QEP": ["quantizer=gptq"],
    "JointQ + QEP": ["quantizer=jointq"],
}
EXPERTS = {
    "blend": ["experts.calibration=blend"],
    "routed": ["experts.calibration=routed"],
    "all": ["experts.calibration=all"],
    "blend, own routing": ["experts.calibration=blend", "experts.routing=own"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path, help="of the runs")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--experts", nargs="+", default=list(EXPERTS), choices=EXPERTS, help="how they are calibrated")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of every run")
    given = parser.parse_args()
    print("| quantizer | experts | " + " | ".join(f"W{bits}" for bits in given.bits) + " |")
    print("|---|---|" + "---|" * len(given.bits))
    for experts in given.experts:
        for method, words in METHODS.items():
            if experts == "blend" or "QEP" in method:
                settings = [*words, *EXPERTS[experts], *given.set]
                figures = [divergence(given.model, given.folder, bits, settings) for bits in given.bits]
                print(f"| {method} | {experts} | {' | '.join(figures)} |", flush=True)


def divergence(model: Path, folder: Path, bits: int, settings: list[str]) -> str:
    """KL divergence and its standard error, nats per token."""
    run = folder / "_".join([f"w{bits}", *(word.replace("=", "-") for word in settings)])
    if not (run / "report.json").is_file():
        words = ["model=checkpoint", f"model.path={model}", f"quantizer.bits={bits}", *SETTINGS, *settings]
        places = [f"hydra.run.dir={run}", f"store={folder / 'store'}"]
        command = [sys.executable, "-m", "jointq_cli", "quantize", *words, *places]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = load_report(run / "report.json").comparison
    return f"{found.kl_divergence:.4f} ± {found.kl_divergence_standard_error:.4f}"


if __name__ == "__main__":
    main()
