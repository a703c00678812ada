"""A plain JointQ, layers with correlated inputs, and the error that the tests of JointQ measure."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from jointq_cli.formats.uniform import UniformWeight
from jointq_cli.quantization.quantizers import JointQ, Quantizer, Solution

PLAIN = JointQ(
    bits=3,
    group_size=16,
    regularization_lambda=0.0,
    regularization_floor=0.0,
    lambda_list=[0.001, 0.1, 0.5],
    annealing_temperature=0.2,
    ils_num_iterations=2,
    ils_num_clones=3,
)

STARTS = ["enable_schur", "enable_clip_optimize", "enable_clip_optimize_ep", "enable_gptq"]


def jointq(**options: Any) -> JointQ:
    return dataclasses.replace(PLAIN, **options)


def starting(*names: str, **options: Any) -> JointQ:
    """With these starts and no others."""
    return jointq(**{name: name in names for name in STARTS}, **options)


def layer(
    out_features: int, in_features: int, seed: int = 0, tokens: int | None = None, spread: float = 1.0
) -> tuple[Tensor, Tensor]:
    """weight (out, in) float32, the Hessian (in, in) float64 of correlated inputs whose loudness spans 10^spread."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(in_features, in_features, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens or 4 * in_features, in_features, generator=generator, dtype=torch.float64)
    inputs = inputs @ (mixing + 3 * torch.eye(in_features)) * torch.logspace(0, -spread, in_features).roll(7)
    return torch.randn(out_features, in_features, generator=generator), inputs.T @ inputs / len(inputs)


def solve(quantizer: Quantizer, weight: Tensor, hessian: Tensor, dtype: torch.dtype = torch.float32) -> Solution:
    return quantizer.quantize(weight, quantizer.prepare(hessian), dtype)


def costs(quantized: UniformWeight | Solution, weight: Tensor, hessian: Tensor) -> Tensor:
    """e H e' per row, (out,) float64."""
    result = quantized.quantized if isinstance(quantized, Solution) else quantized
    error = weight.double() - result.dequantize(torch.float64)
    return ((error @ hessian) * error).sum(1)


def regularized(hessian: Tensor, strength: float) -> Tensor:
    """H_l of the plain settings: H + lambda diag(H)."""
    return hessian + strength * torch.diag(hessian.diagonal())


def same(one: UniformWeight, other: UniformWeight, rows: Tensor | slice = slice(None)) -> bool:
    """Whether `other` is to the bit what these rows of `one` are."""
    mine, theirs = one.to_tensors(), other.to_tensors()
    return all(torch.equal(mine[name][rows], theirs[name]) for name in ("codes", "scale", "zero_point"))
