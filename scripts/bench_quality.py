#!/usr/bin/env python
"""What each setting brings, and how much of it other text sees: KL divergence on the calibration tokens, on other text
of the same kind and on the evaluation text, row by row.

    python scripts/bench_quality.py recipe=pocket_w3g128 calibration.num_samples=16
    python scripts/bench_quality.py recipe=smollm2_135m_w3g64 --row qep=none --row "qep.residual=0 quantizer=gptq"

Words are overrides of all rows; every --row adds its own to them. The other text is cut from the same calibration
text: windows at random places that share no run of 32 tokens with the calibration windows. CPU seconds are those of a
whole run; the first one also evaluates the original, which the others find in the store.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from jointq_cli.cli.compose import launch
from jointq_cli.data.calibration import calibration_tokens
from jointq_cli.data.overlap import windows_in
from jointq_cli.models.sources import fetch

POOL = 8  # windows drawn for each that is wanted; those that overlap the calibration windows are dropped
ROWS = (
    "",
    "qep=none",
    "qep.residual=0",
    "qep.residual=1",
    "qep.perccorr=0.5",
    "qep.residual=1 qep.perccorr_mode=shrinkage qep.heldout_share=0.5",
    "qep.pull=corrected",
    "quantizer.regularization_floor=0",
    "quantizer.regularization_lambda=0.1",
    "quantizer.regularization_gamma=0.5",
    "calibration.token_weighting=uniform",
    "calibration.matmul_precision=medium",
    "quantizer=gptq",
    "quantizer=gptq qep=none",
)


@dataclass(frozen=True)
class Subject:
    """The original model and the two texts that no run evaluates."""

    model: Any
    calibration: Tensor  # (windows, tokens) int64
    other: Tensor

    @classmethod
    def of(cls, overrides: list[str], windows: int) -> "Subject":
        recipes: list[Any] = []
        launch("quantize", [*overrides, "output_dir=unused"], lambda recipe, job: recipes.append(recipe))
        [recipe] = recipes
        directory = fetch(
            recipe.model, lambda place: sys.exit(f"{place}: must be a directory of safetensors")
        ).directory
        tokenizer = AutoTokenizer.from_pretrained(directory)
        used = calibration_tokens(recipe.calibration, tokenizer).windows
        drawn = replace(recipe.calibration, tokens=None, strategy="concat_rand", seed=1, num_samples=POOL * windows)
        found = calibration_tokens(drawn, tokenizer).windows
        return cls(load(directory), used[:windows], found[windows_in(used, found) == 0][:windows])

    def divergences(self, checkpoint: Path) -> list[tuple[float, float]]:
        quantized = load(checkpoint)
        return [divergence(self.model, quantized, windows) for windows in (self.calibration, self.other)]


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto")


@torch.no_grad()
def divergence(original: Any, quantized: Any, windows: Tensor) -> tuple[float, float]:
    """Nats per token and their standard error over windows; NaN without windows."""
    found = []
    for window in windows:
        p, q = (model(window[None]).logits[0, :-1].float().log_softmax(-1) for model in (original, quantized))
        found.append((p.exp() * (p - q)).sum(-1).mean().item())
    values = torch.tensor(found)
    return values.mean().item(), values.std().item() / math.sqrt(max(1, len(found)))


def quantize(words: list[str], place: Path) -> tuple[dict[str, Any], float]:
    """The report of a run in `place`, and its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "jointq_cli", "quantize", *words, f"hydra.run.dir={place}", "generate_tokens=0"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    report: dict[str, Any] = json.loads((place / "report.json").read_text())
    return report, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of all rows: recipe=..., calibration.num_samples=...")
    parser.add_argument("--row", action="append", help="overrides of a row, in one word; repeat it (the ablation)")
    parser.add_argument("--windows", type=int, default=24, help="of the calibration and of the other text (24)")
    arguments = parser.parse_args()
    console = Console(width=160)
    table = Table("overrides", "calibration", "other text", "other / calibration", "evaluation", "perplexity", "CPU s")
    subject = Subject.of(arguments.overrides, arguments.windows)
    with tempfile.TemporaryDirectory() as place:
        for number, row in enumerate(arguments.row or ROWS):
            run = Path(place, str(number))
            words = [*arguments.overrides, *row.split(), f"output_dir={place}"]
            report, seconds = quantize(words, run)
            seen, other = subject.divergences(run / "checkpoint")
            comparison = report["comparison"]
            table.add_row(
                row or "as it is",
                f"{seen[0]:.4f} ± {seen[1]:.4f}",
                f"{other[0]:.4f} ± {other[1]:.4f}",
                f"{other[0] / seen[0]:.2f}",
                f"{comparison['kl_divergence']:.4f} ± {comparison['kl_divergence_standard_error']:.4f}",
                f"{report['quantized']['value']:.2f}",
                f"{seconds:.0f}",
            )
            console.print(f"{row or 'as it is'}: done", style="dim")
    console.print(table)


if __name__ == "__main__":
    main()
