#!/usr/bin/env python
"""JointQ against OneComp's JointQ and GPTQ on the same synthetic layers, in one process on one thread.

    python scripts/bench_jointq_layer.py                                  # 512 and 1024 wide, 4, 3 and 2 bits
    python scripts/bench_jointq_layer.py --sizes 2048 --bits 4 --only ours
    python scripts/bench_jointq_layer.py --sizes 512,1024,2048,4096 --output layers.jsonl   # half an hour or more

Prints output errors on the calibration tokens and on held-out ones, CPU seconds, and for JointQ the ratio of these to
the CPU seconds of the matrix products that it needs, timed in the same process at the same shapes.

OneComp's rows appear where it can be imported. It needs libraries that a layer does not need, so give it a virtual
environment of its own, with this project beside it:

    pip install torch==2.13.0 && pip install --no-deps --ignore-requires-python onecomp==1.4.0
    pip install 'transformers>=5.5' accelerate datasets safetensors scipy primefac ortools numba
    PYTHONPATH=src python scripts/bench_jointq_layer.py
"""

import argparse
import gc
import importlib.machinery
import importlib.util
import json
import logging
import os
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jointq_cli.quantization.quantizers import GPTQ, JointQ

GROUP = 128
Solve = Callable[[Tensor, Tensor, int], Tensor]  # weight (out, in), X^T X (in, in) float64, tokens -> dequantised


def make_layer(size: int, out_features: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """weight (out, in) and two samples (tokens, in): power-law spectrum, unequal gains, a few loud, biased channels."""
    generator = torch.Generator().manual_seed(size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    basis, _ = torch.linalg.qr(normal(size, size))
    spectrum = 1.0 / (torch.arange(size, dtype=torch.float64) + 1.0)
    root = basis * (spectrum * (size / spectrum.sum())).sqrt()
    gain = torch.exp(0.3 * normal(size))
    loud = torch.randperm(size, generator=generator)[: max(4, size // 256)]
    gain[loud] *= 15.0
    mean = torch.zeros(size, dtype=torch.float64)
    mean[loud] = 0.5 * gain[loud] * torch.sign(normal(len(loud)))

    def sample() -> Tensor:
        common, noise = normal(tokens, size), normal(tokens, size)
        return ((common @ root.T + 0.22 * noise) * gain + mean).float()

    calibration, heldout = sample(), sample()
    weight = normal(out_features, size)
    spread = sum(normal(out_features, size).square() for _ in range(6)) / 6  # Student's t with 6 degrees of freedom
    weight = weight / torch.as_tensor(spread).sqrt() / size**0.5 * torch.exp(0.25 * normal(out_features, 1))
    weight[:, loud] *= 0.5
    return weight.float(), calibration, heldout


def gram(inputs: Tensor) -> Tensor:
    return inputs.double().T @ inputs.double()


def relative_error(weight: Tensor, quantized: Tensor, matrix: Tensor) -> float:
    error, signal = quantized.double() - weight.double(), weight.double()
    return float(((error @ matrix) * error).sum() / ((signal @ matrix) * signal).sum())


def ours(bits: int) -> dict[str, Solve]:
    def with_(**changes: Any) -> Solve:
        def solve(weight: Tensor, matrix: Tensor, tokens: int) -> Tensor:
            quantizer = JointQ(bits=bits, group_size=GROUP, **changes)
            prepared = quantizer.prepare(matrix / tokens)
            return quantizer.quantize(weight, prepared, torch.float16).quantized.dequantize(torch.float32)

        return solve

    def gptq(weight: Tensor, matrix: Tensor, tokens: int) -> Tensor:
        quantizer = GPTQ(bits, GROUP)
        prepared = quantizer.prepare(matrix / tokens)
        return quantizer.quantize(weight, prepared, torch.float16).quantized.dequantize(torch.float32)

    return {
        "GPTQ": gptq,
        "JointQ, start only": with_(max_sweeps=0, annealing_sweeps=0),
        "JointQ": with_(),
        "JointQ, 20 annealing sweeps": with_(annealing_sweeps=20),
    }


def onecomp(bits: int) -> dict[str, Solve]:
    """OneComp's quantizers, called as its runner calls them; empty where it is not installed."""
    if importlib.util.find_spec("onecomp") is None:
        return {}
    _stub_lm_eval()
    from onecomp.quantizer.gptq import GPTQ as TheirGPTQ
    from onecomp.quantizer.jointq import JointQ as TheirJointQ

    def jointq(**changes: Any) -> Solve:
        def solve(weight: Tensor, matrix: Tensor, tokens: int) -> Tensor:
            quantizer = TheirJointQ(bits=bits, group_size=GROUP, device=torch.device("cpu"), **changes)
            quantizer.validate_params()
            result = quantizer.quantize_layer(_linear(weight), matrix_XX=matrix, dim_n=tokens)
            return torch.as_tensor(result.compute_dequantized_weight())

        return solve

    def gptq(weight: Tensor, matrix: Tensor, tokens: int) -> Tensor:
        quantizer = TheirGPTQ(wbits=bits, groupsize=GROUP, bitpack_on_quantize=False, sym=False, actorder=True)
        quantizer.validate_params()
        result = quantizer.quantize_layer(_linear(weight), None, hessian=((2.0 / tokens) * matrix).float())
        return torch.as_tensor(result.compute_dequantized_weight())

    return {
        "OneComp GPTQ": gptq,
        "OneComp JointQ": jointq(),
        "OneComp JointQ, EP start": jointq(enable_clip_optimize_ep=True),
    }


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    return linear


def _stub_lm_eval() -> None:
    """onecomp imports lm_eval, which is large and has nothing to do with a layer."""
    for name in ("lm_eval", "lm_eval.evaluator", "lm_eval.models", "lm_eval.models.huggingface"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules.setdefault(name, module)
    sys.modules["lm_eval"].evaluator = sys.modules["lm_eval.evaluator"]  # type: ignore[attr-defined]
    sys.modules["lm_eval.models.huggingface"].HFLM = object  # type: ignore[attr-defined]
    logging.disable(logging.WARNING)


def product_seconds(size: int, out_features: int, sweeps: int) -> float:
    """CPU seconds of the products that JointQ's default needs.

    Cholesky and inverse in float64; for the start, one propagation; for each sweep, one product of the errors with the
    metric; one for the final cost and one for tr(W H W').
    """
    matrix = torch.eye(size, dtype=torch.float64) * 2 + 0.5
    rows, metric = torch.randn(out_features, size), torch.randn(size, size)
    started = time.process_time()
    lower = torch.linalg.cholesky(matrix)
    torch.linalg.solve_triangular(lower, torch.eye(size, dtype=torch.float64), upper=False)
    fixed = time.process_time() - started
    started = time.process_time()
    for tile in rows.split(256):
        for group in range(0, size, GROUP):
            tile @ metric[:, group : group + GROUP]
    return fixed + (0.5 + sweeps + 2) * (time.process_time() - started)


def measure(size: int, bits_list: list[int], out_features: int, tokens: int, only: str) -> Iterator[dict[str, Any]]:
    weight, calibration, heldout = make_layer(size, out_features, tokens)
    matrix, judge = gram(calibration), gram(heldout)
    del calibration, heldout
    for bits in bits_list:
        for name, solve in {**({} if only == "ours" else onecomp(bits)), **ours(bits)}.items():
            started = time.process_time()
            quantized = solve(weight, matrix, tokens)
            seconds = time.process_time() - started
            row = {
                "size": size, "out_features": out_features, "bits": bits, "method": name, "cpu_seconds": seconds,
                "error": relative_error(weight, quantized, matrix),
                "heldout_error": relative_error(weight, quantized, judge),
            }  # fmt: skip
            if name == "JointQ":
                sweeps = JointQ().max_sweeps + JointQ().annealing_sweeps
                row["times_products"] = seconds / product_seconds(size, out_features, sweeps)
            yield row
            gc.collect()


def line(row: dict[str, Any], reference: dict[str, Any] | None) -> str:
    against = ("", "")
    if reference:
        against = (
            f"{row['heldout_error'] / reference['heldout_error']:.2f} x",
            f"{row['cpu_seconds'] / reference['cpu_seconds']:.3f} x",
        )
    products = f"{row['times_products']:.1f}" if "times_products" in row else ""
    return (
        f"{row['size']:>5} {row['bits']:>4}  {row['method']:<28}{row['error']:>9.5f}{row['heldout_error']:>10.5f}"
        f"{against[0]:>8}{row['cpu_seconds']:>9.2f}{against[1]:>9}{products:>10}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="512,1024")
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--out-features", type=int, default=None, help="default: as wide as in_features")
    parser.add_argument("--only", choices=("all", "ours"), default="all")
    parser.add_argument("--output", type=Path, default=None, help="append rows as JSON lines")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for _ in measure(256, [4], 64, 512, "ours"):  # compiles, or loads, the kernels
        pass
    print(
        f"{'size':>5} {'bits':>4}  {'method':<28}{'E_y':>9}{'held-out':>10}{'':>8}{'CPU s':>9}{'':>9}{'products':>10}"
    )
    reference: dict[str, Any] | None = None
    for size in map(int, arguments.sizes.split(",")):
        out_features = arguments.out_features or size
        for row in measure(
            size, [int(bits) for bits in arguments.bits.split(",")], out_features, 4 * size, arguments.only
        ):
            reference = row if row["method"] == "OneComp JointQ" else reference
            same = reference is not None and (reference["size"], reference["bits"]) == (row["size"], row["bits"])
            print(line(row, reference if same else None), flush=True)
            if arguments.output:
                with arguments.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + os.linesep)


if __name__ == "__main__":
    main()
