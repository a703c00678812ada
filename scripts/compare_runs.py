#!/usr/bin/env python
"""A markdown table of finished runs, one row each, from their report.json.

python scripts/compare_runs.py runs/pocket_w4g128/*
"""

import argparse
from pathlib import Path

from jointq_cli.records import RunReport
from jointq_cli.report import load_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories; others are passed over")
    print("| quantizer | bits per weight | perplexity | original | KL divergence | top-1 | quantise |")
    print("|---|---|---|---|---|---|---|")
    for run in parser.parse_args().runs:
        if (run / "report.json").exists():
            print(row(load_report(run / "report.json")))


def row(report: RunReport) -> str:
    seconds = sum(stage.seconds for stage in report.stages if stage.name == "quantize")
    cells = [
        report.quantizer,
        f"{report.bits_per_weight:.2f}",
        f"{report.quantized.value:.2f} ± {report.quantized.standard_error:.2f}",
        f"{report.original.value:.2f} ± {report.original.standard_error:.2f}",
        f"{report.comparison.kl_divergence:.4f} ± {report.comparison.kl_divergence_standard_error:.4f}",
        f"{report.comparison.top1_agreement:.1%}",
        f"{seconds:.0f} s",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
