#!/usr/bin/env python
"""The slow check of `allocation.sensitivity`: the KL divergence of one quantised layer at a time, against predictions.

    python scripts/check_sensitivity.py recipe=pocket_w3g128 --budgets 2.64 3.148 --out DIR
    python scripts/check_sensitivity.py recipe=smollm2_135m_w3g64 ... --budgets 3.3 --windows 4 --out DIR

Layers are quantised for the inputs of the original model and without QEP, as both sensitivities assume. Each candidate
in all layers is one run of `jointq quantize`; of its checkpoint one layer after the other replaces that of the original
model, in float32, and the KL divergence is measured on --windows windows of the calibration text that no run is
calibrated on: forward passes of the whole model, layers times candidates times windows of them. These are losses like
those predicted, and the same exact dynamic programme chooses by either for each budget. What it chooses is quantised
and evaluated as the recipe says.

Finished runs, and measured layers, in --out are not computed again.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from bench_allocation import CANDIDATES, run
from bench_quality import Subject
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from jointq_cli.quantization.allocation import in_words
from jointq_cli.quantization.knapsack import Choice, Knapsack
from jointq_cli.quantization.sensitivity import Losses, LossFiles

ALONE = ["qep=none", "calibration.inputs=original"]
SENSITIVITIES = ("kfac", "fisher")
MEASURED = "KL of one layer"


def finished(overrides: list[str], place: Path) -> dict[str, Any]:
    """The report of a run in `place`."""
    report = place / "report.json"
    if not report.exists():
        return run(overrides, place)
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def predicted(overrides: list[str], place: Path) -> Losses:
    """The losses that a run with a budget has left in its own store."""
    store = place / "store"
    finished([*overrides, f"store={store}"], place / "run")
    (directory,) = store.glob("sensitivity-*")
    return LossFiles(directory).read()


def measured(subject: Subject, runs: list[Path], layers: list[str], known: Path) -> Losses:
    """The KL divergence of each layer with the weights of each run, in nats per token. known: JSON of those measured
    already, written after each layer."""
    losses: Losses = json.loads(known.read_text()) if known.exists() else {}
    original: PreTrainedModel = subject.model.float()
    candidates = [weights(directory / "checkpoint") for directory in runs]
    with torch.no_grad():
        expected = [log_probabilities(original, window) for window in subject.other]
        for name in layers:
            if name not in losses:
                losses[name] = [
                    with_weight(
                        original, name, each[f"{name}.weight"], lambda: divergence(original, subject.other, expected)
                    )
                    for each in candidates
                ]
                known.write_text(json.dumps(losses))
    return losses


def weights(checkpoint: Path) -> dict[str, Tensor]:
    return {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}


def with_weight(model: PreTrainedModel, name: str, weight: Tensor, measure: Callable[[], float]) -> float:
    """What `measure` finds while a layer has this weight."""
    parameter = model.get_parameter(f"{name}.weight")
    kept = parameter.data
    parameter.data = weight.to(kept.dtype)
    found = measure()
    parameter.data = kept
    return found


def divergence(model: PreTrainedModel, windows: Tensor, expected: list[Tensor]) -> float:
    """Mean KL(original || model) over the tokens of all windows."""
    found = [
        (log_p.exp() * (log_p - log_probabilities(model, window))).sum(dim=-1).mean()
        for window, log_p in zip(windows, expected, strict=True)
    ]
    return float(torch.stack(found).mean())


def log_probabilities(model: PreTrainedModel, window: Tensor) -> Tensor:
    """(tokens, vocabulary) float32."""
    logits: Tensor = model(window[None], use_cache=False).logits[0]
    return logits.log_softmax(dim=-1)


def choose(losses: Losses, bits: Mapping[str, list[int]], budget: int) -> dict[str, int]:
    """The number of the candidate of each layer, of least loss within so many bits."""
    units = [[Choice(size, loss) for size, loss in zip(bits[name], losses[name], strict=True)] for name in bits]
    return dict(zip(bits, Knapsack(units).choose(budget), strict=True))


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def correlation(first: Losses, second: Losses) -> float:
    """Spearman's, over all candidates of all layers."""
    a, b = (ranks(torch.tensor([loss for name in first for loss in losses[name]])) for losses in (first, second))
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of all runs: recipe=..., quantizer.incoherence=none")
    parser.add_argument("--budgets", nargs="+", type=float, default=[3.148], help="bits per weight (3.148)")
    parser.add_argument("--candidates", default=CANDIDATES, help="as allocation.candidates has them")
    parser.add_argument("--windows", type=int, default=8, help="of the calibration text (8)")
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs, their stores and the losses")
    arguments = parser.parse_args()
    place: Path = arguments.out.absolute()
    place.mkdir(parents=True, exist_ok=True)
    candidates = yaml.safe_load(arguments.candidates.replace(":", ": "))
    words = [*arguments.overrides, f"store={place / 'store'}", f"output_dir={place}"]

    uniform, runs = [], [place / f"uniform{number}" for number in range(len(candidates))]
    for settings, directory in zip(candidates, runs, strict=True):
        fields = [f"quantizer.{name}={value}" for name, value in settings.items()]
        uniform.append(finished([*words, *ALONE, *fields], directory))
    layers = {each["name"]: each["out_features"] * each["in_features"] for each in uniform[0]["layers"]}
    bits = {
        name: [round(report["layers"][number]["bits_per_weight"] * size) for report in uniform]
        for number, (name, size) in enumerate(layers.items())
    }

    budget = ["allocation=budget", f"allocation.candidates={arguments.candidates}"]
    first = f"allocation.bits_per_weight={arguments.budgets[0]}"
    losses = {
        sensitivity: predicted(
            [
                *arguments.overrides,
                f"output_dir={place}",
                *ALONE,
                *budget,
                first,
                f"allocation.sensitivity={sensitivity}",
            ],
            place / sensitivity,
        )
        for sensitivity in SENSITIVITIES
    }
    subject = Subject.of(arguments.overrides, arguments.windows)
    losses[MEASURED] = measured(subject, runs, list(layers), place / "losses.json")

    columns = [f"all {in_words(settings)}" for settings in candidates]
    table = Table("sums of single layers", *columns, "rank correlation", title="Predicted against measured")
    for name, found in losses.items():
        sums = [f"{sum(each[number] for each in found.values()):.4f}" for number in range(len(candidates))]
        table.add_row(name, *sums, f"{correlation(losses[MEASURED], found):.3f}")
    together = [f"{report['comparison']['kl_divergence']:.4f}" for report in uniform]
    table.add_row("KL of all layers at once, evaluation text", *together, "")
    Console(width=160).print(table)

    table = Table("bits per weight", "chosen by", "predicted", "KL", "KL with the recipe's QEP", title="Budgets")
    for size in arguments.budgets:
        for name, found in losses.items():
            chosen = choose(found, bits, int(size * sum(layers.values())))
            file = place / f"{size:g}_{name.replace(' ', '_')}.yaml"
            file.write_text(yaml.safe_dump({layer: candidates[number] for layer, number in chosen.items()}))
            own = f"layers.overrides=@{file}"
            alone, corrected = (
                finished([*words, *more, own], file.with_suffix(suffix))["comparison"]
                for more, suffix in ((ALONE, ".alone"), ([], ".corrected"))
            )
            loss = sum(found[layer][number] for layer, number in chosen.items())
            table.add_row(f"{size:g}", name, f"{loss:.4f}", shown(alone), shown(corrected))
    Console(width=160).print(table)


def shown(comparison: Mapping[str, float]) -> str:
    return f"{comparison['kl_divergence']:.4f} ± {comparison['kl_divergence_standard_error']:.4f}"


if __name__ == "__main__":
    main()
