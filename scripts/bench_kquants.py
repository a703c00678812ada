#!/usr/bin/env python
"""GGUF K-quants of single layers: jointq's search against llama.cpp's quantiser with an importance matrix, same bytes.

    python scripts/bench_kquants.py                                       # all layers of the bundled model
    python scripts/bench_kquants.py --types q4_k --layers down_proj --quantizers rtn,jointq --settings max_sweeps=5
    python scripts/bench_kquants.py --model DIR --layers '(0|14|29).mlp.down_proj' --windows 16 --each
    python scripts/bench_kquants.py --quantizers none                     # llama.cpp alone

The Hessians are those that jointq collects in the original model: one of the calibration tokens, which both quantisers
see (the importance matrix is its diagonal), and one of tokens of another text, which neither sees. Errors are
tr(E H E^T) / tr(W H W^T); tables have geometric means over layers. Runs on one thread; needs the package xllamacpp.
"""

import argparse
import json
import math
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from ggml_quantizer import bits_per_weight, dequantized, kind_of, quantized_bytes
from gguf import GGMLQuantizationType
from rich.console import Console
from rich.table import Table
from torch import Tensor

from jointq_cli.data.calibration import Calibration, calibration_tokens
from jointq_cli.data.tokenizer import load_tokenizer
from jointq_cli.formats.k_quant import SUPER_BLOCK
from jointq_cli.models.sources import ModelSource, fetch
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.hidden_states import HiddenStateFile
from jointq_cli.quantization.qep import NoQep
from jointq_cli.quantization.quantizers import GPTQ, RTN, JointQ
from jointq_cli.quantization.quantizers.base import Quantizer
from jointq_cli.quantization.quantizers.statistics import output_error
from jointq_cli.quantization.settings import LoopSettings
from jointq_cli.quantization.walk import walk
from jointq_cli.stages.base import open_model, windows_per_pass
from jointq_cli.system.distributed import SINGLE_PROCESS
from jointq_cli.system.settings import Runtime

IMATRIX, PLAIN, JOINTQ_W4 = "llama.cpp + imatrix", "llama.cpp", "JointQ W4 g32 (5 bits, Q4_1)"
QUANTIZERS: dict[str, Any] = {"rtn": RTN, "gptq": GPTQ, "jointq": JointQ}


@dataclass(frozen=True, eq=False)
class Input:
    """Layers that read the same tensor. weights: (out, in) float32 by name; seen, unseen: its Hessians (in, in) float64
    of calibration and of other tokens."""

    weights: dict[str, Tensor]
    seen: Tensor
    unseen: Tensor


@dataclass(frozen=True)
class Result:
    """One layer by one method: relative output errors on calibration and other tokens, and CPU seconds."""

    layer: str
    seen: float
    unseen: float
    seconds: float


def hessians(model: StreamedModel, names: list[str], text: Calibration) -> dict[tuple[str, ...], Tensor]:
    """Those (in, in) of the inputs that the layers of these names read in the original model, by all layers that share
    an input."""
    windows = calibration_tokens(text, load_tokenizer(model.checkpoint.directory, trust_remote_code=False)).windows
    loop = LoopSettings(
        quantizer=RTN(),
        qep=NoQep(),
        layers=frozenset(names),
        inputs="original",
        weights=text.weights,
        windows=len(windows),
        batch=windows_per_pass(Runtime(), windows),
        suspended_bytes=4e9,
    )
    found = {}
    last = max(model.block_of(name) or 0 for name in names)
    with tempfile.TemporaryDirectory() as folder:
        states = HiddenStateFile(Path(folder))
        for visit in walk(model, windows, loop, states, {"original": True}, 0, lambda: None, SINGLE_PROCESS):
            for group in visit.groups():
                found[tuple(layer.name for layer in group.layers)] = group.statistics().hessian
            if visit.index == last:
                break
    return found


def read_inputs(model: StreamedModel, names: list[str], arguments: argparse.Namespace) -> list[Input]:
    """Those of the layers of these names."""
    chosen = Calibration(
        token_weighting=arguments.weighting, seqlen=arguments.seqlen, num_samples=arguments.windows, inputs="original"
    )
    if arguments.text is not None:
        chosen = replace(chosen, dataset="text", path=arguments.text)
    heldout = replace(chosen, num_samples=arguments.heldout_windows)
    if arguments.heldout_text is not None:
        heldout = replace(heldout, dataset="text", path=arguments.heldout_text)
    elif chosen.dataset == "pydoc":
        heldout = replace(heldout, split="evaluation")
    seen, unseen = (hessians(model, names, text) for text in (chosen, heldout))
    found = []
    for layers, hessian in seen.items():
        weights = {}
        for layer in layers:
            stored = model.stored_name(f"{layer}.weight")
            weights[layer] = model.linear_layers()[layer].turned(model.checkpoint.read([stored])[stored].float())
        found.append(Input(weights, hessian, unseen[layers]))
    return found


def results(inputs: list[Input], solve_input: Callable[[Input], Callable[[Tensor], Tensor]]) -> list[Result]:
    """solve_input: of an input, the function from a weight to the dequantised one. CPU seconds are those of both."""
    found = []
    for layer_input in inputs:
        started = time.process_time()
        solve = solve_input(layer_input)
        shared = (time.process_time() - started) / len(layer_input.weights)
        for name, weight in layer_input.weights.items():
            started = time.process_time()
            quantized = solve(weight)
            seconds = shared + time.process_time() - started
            errors = (output_error(weight, quantized, hessian) for hessian in (layer_input.seen, layer_input.unseen))
            found.append(Result(name, *errors, seconds=seconds))
    return found


def by_llama_cpp(kind: GGMLQuantizationType, *, imatrix: bool) -> Callable[[Input], Callable[[Tensor], Tensor]]:
    def solve_input(layer_input: Input) -> Callable[[Tensor], Tensor]:
        importance = layer_input.seen.diagonal() if imatrix else None
        return lambda weight: dequantized(quantized_bytes(weight, kind, importance), kind)

    return solve_input


def by_jointq(quantizer: Quantizer) -> Callable[[Input], Callable[[Tensor], Tensor]]:
    def solve_input(layer_input: Input) -> Callable[[Tensor], Tensor]:
        prepared = quantizer.prepare(layer_input.seen)
        return lambda weight: quantizer.quantize(weight, prepared, torch.bfloat16).quantized.dequantize(torch.float32)

    return solve_input


def warm_up(quantizer: Quantizer) -> None:
    """Compiles, or loads, the kernels."""
    weight = torch.randn(16, SUPER_BLOCK, generator=torch.Generator().manual_seed(0))
    by_jointq(quantizer)(Input({}, torch.eye(SUPER_BLOCK, dtype=torch.float64), torch.empty(0)))(weight)


def measure(inputs: list[Input], name: str, quantizers: list[str], settings: dict[str, Any]) -> dict[str, list[Result]]:
    """The results of each method for one type."""
    kind = kind_of(name)
    found = {
        IMATRIX: results(inputs, by_llama_cpp(kind, imatrix=True)),
        PLAIN: results(inputs, by_llama_cpp(kind, imatrix=False)),
    }
    for word in quantizers:
        own = settings if word == "jointq" else {}
        quantizer = QUANTIZERS[word](grid=name, **own)
        warm_up(quantizer)
        found[quantizer.describe()] = results(inputs, by_jointq(quantizer))
    return found


def mean(values: Iterable[float]) -> float:
    """Geometric; of zeros 0."""
    logarithms = [math.log(value) if value > 0 else -math.inf for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def table_of(name: str, found: dict[str, list[Result]], reference: list[Result] | None) -> Table:
    bits = bits_per_weight(kind_of(name))
    layers = found[IMATRIX]
    table = Table(title=f"{name}: {bits:g} bits per weight, {len(layers)} layers", title_justify="left")
    table.add_column("method")
    for column in ("calibration", "held-out", "x imatrix", "worst layer", "CPU s", "x JointQ W4"):
        table.add_column(column, justify="right")
    seconds_of_w4 = sum(result.seconds for result in reference) if reference else None
    rows = dict(found) | ({JOINTQ_W4: reference} if reference else {})
    for method, values in rows.items():
        ratios = [value.unseen / base.unseen for value, base in zip(values, layers, strict=True)]
        seconds = sum(value.seconds for value in values)
        table.add_row(
            method,
            f"{mean(value.seen for value in values):.3e}",
            f"{mean(value.unseen for value in values):.3e}",
            f"{mean(ratios):.3f}",
            f"{max(ratios):.3f}",
            f"{seconds:.2f}",
            "" if seconds_of_w4 is None else f"{seconds / seconds_of_w4:.2f}",
            style="dim" if method == JOINTQ_W4 else None,
        )
    return table


def table_of_layers(name: str, found: dict[str, list[Result]]) -> Table:
    table = Table(title=f"{name}: held-out error of each layer, relative to {IMATRIX}", title_justify="left")
    table.add_column("layer")
    table.add_column(IMATRIX, justify="right")
    others = [method for method in found if method != IMATRIX]
    for method in others:
        table.add_column(method, justify="right")
    for number, base in enumerate(found[IMATRIX]):
        ratios = (f"{found[method][number].unseen / base.unseen:.3f}" for method in others)
        table.add_row(".".join(base.layer.split(".")[-3:]), f"{base.unseen:.3e}", *ratios)
    return table


def choose(model: StreamedModel, pattern: str, console: Console) -> list[str]:
    """The layers whose names the pattern matches and whose columns the super-blocks divide; says which are skipped."""
    linear = model.linear_layers()
    named = [name for name in linear if model.block_of(name) is not None and re.search(pattern, name)]
    fitting = [name for name in named if linear[name].in_features % SUPER_BLOCK == 0]
    if skipped := Counter(linear[name].in_features for name in named if name not in fitting):
        words = ", ".join(f"{count} of {columns} columns" for columns, count in skipped.items())
        console.print(f"skipped, since {SUPER_BLOCK} does not divide them: {words}")
    if not fitting:
        raise SystemExit(f"--layers {pattern}: matches no layer whose columns {SUPER_BLOCK} divides")
    return fitting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="as model.path")
    parser.add_argument("--layers", default=".", help="a regular expression of their names")
    parser.add_argument("--types", default="q4_k,q3_k,q2_k")
    parser.add_argument("--quantizers", default="rtn,gptq,jointq", help="none: llama.cpp alone")
    parser.add_argument("--settings", nargs="*", default=[], metavar="KEY=VALUE", help="of JointQ on the K grids")
    parser.add_argument("--text", help="a calibration text; default: that of the recipes")
    parser.add_argument("--heldout-text", help="another text than --text")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--heldout-windows", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--weighting", default="residual", choices=("uniform", "input", "residual"), help="of tokens")
    parser.add_argument("--each", action="store_true", help="also a table of every layer")
    parser.add_argument("--output", type=Path, help="write all results there, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    console = Console(width=120)
    checkpoint = fetch(ModelSource(arguments.model), lambda place: place)
    model = open_model(checkpoint, Runtime(), torch.device("cpu"), trust_remote_code=False)
    names = choose(model, arguments.layers, console)
    quantizers = [] if arguments.quantizers == "none" else arguments.quantizers.split(",")
    settings = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in arguments.settings)}
    with console.status("Hessians"):
        inputs = read_inputs(model, names, arguments)
    reference = None
    if quantizers:
        quantizer = JointQ(bits=4, group_size=32)
        warm_up(quantizer)
        reference = results(inputs, by_jointq(quantizer))
    everything = {}
    for name in arguments.types.split(","):
        found = measure(inputs, name, quantizers, settings)
        everything[name] = {method: [asdict(value) for value in values] for method, values in found.items()}
        console.print(table_of(name, found, reference))
        if arguments.each:
            console.print(table_of_layers(name, found))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
