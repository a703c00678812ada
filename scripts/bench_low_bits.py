#!/usr/bin/env python
"""Quantizers of one and two bits on single layers: jointq's beside OneComp's own, error over bits per weight.

    python scripts/bench_low_bits.py --work DIR                                      # made-up layers, 512 and 1024 wide
    python scripts/bench_low_bits.py --work DIR --sizes '' --model MODEL --text c4.txt --heldout-text wiki.train.raw \
        --layers '\\.15\\.(self_attn.[qo]_proj|mlp.(gate|down)_proj)$'
    python scripts/bench_low_bits.py --work DIR --onecomp none

The made-up layers are those of bench_jointq_layer.py. OneComp runs in a virtual environment of its own, as in
bench_peers.py: DIR/venvs/onecomp. Every method sees the same weight and the same Hessian; errors are tr(E H E^T) /
tr(W H W^T) with the Hessian of other tokens. Bits per weight count all that is stored, scales in 16 bits. CPU seconds
are of one thread, and of the layer alone.
"""

import argparse
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_jointq_layer import gram, make_layer
from bench_kquants import read_inputs
from bench_peers import python_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from jointq_cli.models.sources import ModelSource, fetch
from jointq_cli.quantization.quantizers import DBF, GPTQ, Binary, JointQ, Quantizer
from jointq_cli.quantization.quantizers.statistics import output_error
from jointq_cli.stages.base import open_model
from jointq_cli.system.settings import Runtime


def vectors(p: int, m: int, count: float) -> float:
    """Bits per weight of so many numbers of 16 bits."""
    return 16 * count / (p * m)


def double_binary(bits: float, p: int, m: int) -> float:
    """All that OneComp's DBF stores at `target_bits`."""
    rank = min(int(bits * p * m / (p + m)), p, m)
    return rank * (p + m) / (p * m) + vectors(p, m, p + m + rank)


THEIRS: dict[str, Callable[[int, int], float]] = {
    "cq": lambda p, m: 1 + vectors(p, m, 2 * p),
    "arb": lambda p, m: 1 + vectors(p, m, 2 * p),
    "onebit": lambda p, m: 1 + vectors(p, m, p + m),
    "onebit-unbalanced": lambda p, m: 1 + vectors(p, m, p + m),
    "dbf-1.0": lambda p, m: double_binary(1.0, p, m),
    "dbf-1.0-unbalanced": lambda p, m: double_binary(1.0, p, m),
    "dbf-1.5": lambda p, m: double_binary(1.5, p, m),
    "dbf-2.0": lambda p, m: double_binary(2.0, p, m),
    "qbb-1": lambda p, m: 1 + vectors(p, m, m),
    "qbb-2": lambda p, m: 2 + vectors(p, m, 2 * m),
    "quip-2": lambda p, m: 2 + vectors(p, m, m + 1),
}
"""Bits per weight of OneComp's methods, for layers (p, m); the names are those of peers/low_bits_layers.py."""


def ours(p: int, m: int) -> dict[str, Quantizer]:
    group = 128 if m % 128 == 0 else 64
    return {
        "quantizer=cq (and arb)": Binary(group_size=None, offset=True),
        "quantizer=onebit": Binary(group_size=None, column_scale=True, rounds=0),
        "quantizer=onebit quantizer.rounds=1": Binary(group_size=None, column_scale=True, rounds=1),
        "quantizer=onebit quantizer.rounds=3": Binary(group_size=None, column_scale=True, rounds=3),
        f"jointq bits=1 half g{group}": JointQ(bits=1, group_size=group, zero_point="half"),
        f"jointq bits=1 half g{group} incoherent": JointQ(
            bits=1, group_size=group, zero_point="half", incoherence="input"
        ),
        "quantizer=dbf at dbf-1.0": DBF(bits=double_binary(1.0, p, m)),
        "quantizer=dbf at dbf-1.5": DBF(bits=double_binary(1.5, p, m)),
        "quantizer=dbf at dbf-2.0": DBF(bits=double_binary(2.0, p, m)),
        "quantizer=quip bits=2": GPTQ(bits=2, group_size=None, zero_point="half", incoherence="input"),
        "jointq bits=2 half per row incoherent": JointQ(
            bits=2, group_size=None, zero_point="half", incoherence="input"
        ),
        f"jointq bits=2 half g{group} incoherent": JointQ(
            bits=2, group_size=group, zero_point="half", incoherence="input"
        ),
    }


@dataclass(frozen=True)
class Row:
    method: str
    bits: float
    error: float
    seconds: float


def layers(given: argparse.Namespace) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """name, weight (out, in), and two Hessians (in, in) float64: of the tokens that quantizers see, and of others."""
    for size in map(int, filter(None, given.sizes.split(","))):
        weight, seen, unseen = make_layer(size, size, 4 * size)
        yield f"made-up-{size}", weight, gram(seen) / len(seen), gram(unseen) / len(unseen)
    if given.model is None:
        return
    torch.set_grad_enabled(False)
    checkpoint = fetch(ModelSource(given.model), lambda place: place)
    model = open_model(checkpoint, Runtime(), torch.device("cpu"), trust_remote_code=False)
    names = [
        name for name in model.linear_layers() if re.search(given.layers, name) and model.block_of(name) is not None
    ]
    for each in read_inputs(model, names, given):
        for name, weight in each.weights.items():
            yield name, weight, each.seen, each.unseen


def by_jointq(quantizer: Quantizer, weight: Tensor, hessian: Tensor) -> tuple[Tensor, float, float]:
    """The dequantised weight, bits per weight and CPU seconds."""
    started = time.process_time()
    found = quantizer.quantize(weight, quantizer.prepare(hessian), torch.float16).quantized
    return found.dequantize(torch.float32), found.bits_per_weight, time.process_time() - started


def rows(folder: Path, name: str, theirs: list[str]) -> Iterator[Row]:
    layer = load_file(folder / f"{name}.safetensors")
    weight, heldout = layer["weight"], layer["heldout"]
    for method in theirs:
        path = folder / "onecomp" / method / f"{name}.safetensors"
        if path.exists():
            with safe_open(path, framework="pt") as file:
                found, seconds = file.get_tensor("weight"), float(file.metadata()["cpu_seconds"])
            bits = THEIRS[method](weight.shape[0], weight.shape[1])
            yield Row(f"OneComp {method}", bits, output_error(weight, found, heldout), seconds)
    for method, quantizer in ours(weight.shape[0], weight.shape[1]).items():
        found, bits, seconds = by_jointq(quantizer, weight, layer["hessian"])
        yield Row(method, bits, output_error(weight, found, heldout), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="layers, virtual environment, results")
    parser.add_argument("--sizes", default="512,1024", help="of made-up layers")
    parser.add_argument("--onecomp", default=",".join(THEIRS), help="its methods, or none; default: %(default)s")
    parser.add_argument("--model", default=None, help="as model.path; default: none")
    parser.add_argument("--layers", default=".", help="regular expression in the names of the model's layers")
    parser.add_argument("--text", default=None, help="for calibration; default: pydoc")
    parser.add_argument("--heldout-text", default=None, help="default: another part of pydoc")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--heldout-windows", type=int, default=12)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--weighting", default="residual", help="of tokens")
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = given.work / "layers"
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for name, weight, hessian, heldout in layers(given):
        names.append(name)
        save_file(
            {"weight": weight.contiguous(), "hessian": hessian, "heldout": heldout}, folder / f"{name}.safetensors"
        )
    theirs = [] if given.onecomp == "none" else given.onecomp.split(",")
    if theirs:
        python = python_of("onecomp", given.work, 3600)
        driver = Path(__file__).parent / "peers" / "low_bits_layers.py"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        subprocess.run([python, str(driver), str(folder.resolve()), *theirs], check=True, env=environment)
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    for quantizer in ours(16, 128).values():  # compiles, or loads, the kernels
        if not isinstance(quantizer, DBF):
            by_jointq(quantizer, weight, torch.eye(128, dtype=torch.float64))
    by_jointq(DBF(bits=3.0), weight, torch.eye(128, dtype=torch.float64))
    for name in names:
        print(f"\n{name}\n\n| method | bits per weight | held-out error | CPU s |\n|---|---|---|---|", flush=True)
        for row in rows(folder, name, theirs):
            print(f"| {row.method} | {row.bits:.3f} | {row.error:.4f} | {row.seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
