#!/usr/bin/env python
"""Time GPTQ on one layer against the matrix products that it needs.

    python scripts/bench_gptq_layer.py                     # 4096 x 4096, W4 g128 asymmetric mse act_order
    python scripts/bench_gptq_layer.py --size 2048 --bits 3 --threads 1 --repeats 5

The products: a Cholesky factorisation and a triangular inverse in float64, and the float32 products of the
lazy batch updates, at the shapes that GPTQ uses. Products and GPTQ are timed alternately in one process, and the
minimum of each counts, so that a busy machine slows both alike. The layer is synthetic: correlated inputs
with a few loud channels.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jointq_cli.quantization.quantizers import GPTQ
from jointq_cli.quantization.quantizers.cholesky import invert_lower

GOAL = 3.0


def make_layer(size: int) -> tuple[Tensor, Tensor]:
    """weight (size, size) float32 and Hessian (size, size) float64 of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(2 * size, 64, generator=generator) @ torch.randn(64, size, generator=generator) / 4
    inputs = common + torch.randn(2 * size, size, generator=generator)
    inputs *= torch.exp(0.5 * torch.randn(size, generator=generator))
    inputs[:, :: max(1, size // 16)] *= 20
    weight = torch.randn(size, size, generator=generator) / size**0.5
    return weight, (inputs.T @ inputs).double() / len(inputs)


def propagate(weight: Tensor, upper: Tensor, block: int) -> None:
    """The products of the lazy batch updates only."""
    for stop in range(block, weight.shape[1], block):
        errors = weight[:, stop - block : stop].contiguous()
        weight[:, stop:].addmm_(errors, upper[stop - block : stop, stop:], alpha=-1e-6)


class Stopwatch:
    """The minimum of wall and CPU seconds of each named step."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}

    def time(self, name: str, step: Callable[..., Any], *arguments: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = step(*arguments)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.wall[name] = min(wall, self.wall.get(name, wall))
        self.cpu[name] = min(cpu, self.cpu.get(name, cpu))
        return result


PRODUCTS = ("Cholesky, float64", "triangular inverse, float64", "propagation, float32")
SOLVE = ("GPTQ.prepare", "GPTQ.quantize")


def measure(quantizer: GPTQ, size: int, repeats: int) -> Stopwatch:
    """Time the products and the quantizer alternately."""
    weight, hessian = make_layer(size)
    warm = make_layer(256)  # compiles, or loads, the kernels
    quantizer.quantize(warm[0], quantizer.prepare(warm[1]), torch.bfloat16)
    damped = hessian.clone()
    damped.diagonal().add_(0.01 * hessian.diagonal().mean())
    watch = Stopwatch()
    for _ in range(repeats):
        lower = watch.time(PRODUCTS[0], torch.linalg.cholesky, damped)
        watch.time(PRODUCTS[1], invert_lower, lower)
        upper, work = lower.mT.float().contiguous(), weight.clone()
        watch.time(PRODUCTS[2], propagate, work, upper, quantizer.block_size)
        prepared = watch.time(SOLVE[0], quantizer.prepare, hessian)
        watch.time(SOLVE[1], quantizer.quantize, weight, prepared, torch.bfloat16)
    return watch


def table(watch: Stopwatch) -> list[str]:
    """The figures as lines; the last is the ratio of the total time to that of the products."""
    lines = [f"{'':30s}{'wall s':>9s}{'CPU s':>9s}"]
    totals = {}
    for title, steps in (("products", PRODUCTS), ("GPTQ", SOLVE)):
        lines += [f"{step:30s}{watch.wall[step]:9.2f}{watch.cpu[step]:9.2f}" for step in steps]
        totals[title] = [sum(seconds[step] for step in steps) for seconds in (watch.wall, watch.cpu)]
        lines += [f"{title + ', sum':30s}{totals[title][0]:9.2f}{totals[title][1]:9.2f}"]
    wall, cpu = (whole / part for whole, part in zip(totals["GPTQ"], totals["products"], strict=True))
    return [*lines, f"{'ratio (goal: at most ' + format(GOAL, 'g') + ')':30s}{wall:9.2f}{cpu:9.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quantizer = GPTQ(arguments.bits, arguments.group_size)
    size = arguments.size
    print(f"{quantizer.describe()}, {size} x {size}, {arguments.threads} threads")
    print("\n".join(table(measure(quantizer, size, arguments.repeats))))


if __name__ == "__main__":
    main()
