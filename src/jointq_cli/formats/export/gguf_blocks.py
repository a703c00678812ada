"""Weights as GGUF's blocks: 32 neighbouring columns of a row, with a float16 step d and, in Q4_1 and Q5_1, an offset m.

A value is d * q + m in Q4_1 and Q5_1, and d * (q - 8), d * (q - 16), d * q in Q4_0, Q5_0, Q8_0: ggml-common.h and
ggml-quants.c of llama.cpp. With d = scale, q follows from the codes, so nothing is rounded but m = -scale * zero_point.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize
from torch import Tensor

from jointq_cli.errors import ModelError
from jointq_cli.formats.export.gguf_k_blocks import encode_k_blocks
from jointq_cli.formats.k_quant import K_GRIDS, KQuantWeight
from jointq_cli.formats.k_rounding import round_to_k
from jointq_cli.formats.uniform import Grid, UniformWeight

BlockWeight = UniformWeight | KQuantWeight  # what GGUF has blocks for

BLOCK = 32  # columns
LEAST_BITS = 4  # of a grid that the narrowest kind stores without waste
ROWS = 4096  # of a plain tensor that are in memory as float32

# The largest error of a decoded weight, in steps. Half a unit in the last place of m, at most |m| / 2^11, is
# zero_point / 2^11 steps: measured over all float16 scales, 0.00730 and 0.01493.
TOLERANCE: Mapping[GGMLQuantizationType, float] = {
    GGMLQuantizationType.Q4_1: 0.0074,
    GGMLQuantizationType.Q5_1: 0.0152,
}


@dataclass(frozen=True)
class _Levels:
    """The q of a kind: `first` to `last`. offset: the q of the value 0, None where it is m that says it."""

    first: int
    last: int
    offset: int | None


_LEVELS = {
    GGMLQuantizationType.Q4_0: _Levels(0, 15, 8),
    GGMLQuantizationType.Q4_1: _Levels(0, 15, None),
    GGMLQuantizationType.Q5_0: _Levels(0, 31, 16),
    GGMLQuantizationType.Q5_1: _Levels(0, 31, None),
    GGMLQuantizationType.Q8_0: _Levels(-128, 127, 0),
}
_NATURAL = {  # by bits, symmetric
    (4, True): GGMLQuantizationType.Q4_0,
    (4, False): GGMLQuantizationType.Q4_1,
    (5, True): GGMLQuantizationType.Q5_0,
    (5, False): GGMLQuantizationType.Q5_1,
}


def natural_kind(form: BlockWeight) -> GGMLQuantizationType:
    """The smallest kind that holds the grid as it is."""
    if isinstance(form, KQuantWeight):
        return GGMLQuantizationType[form.label]
    return _NATURAL.get((form.bits, form.symmetric), GGMLQuantizationType.Q8_0)


def bits_of(kind: GGMLQuantizationType) -> float:
    """Bits per weight."""
    columns, size = GGML_QUANT_SIZES[kind]
    return 8 * size / columns


def check_kind(form: BlockWeight, kind: GGMLQuantizationType) -> str | None:
    """Why `kind` cannot hold a weight of this form; None where it can. Reads no tensor."""
    if isinstance(form, KQuantWeight):
        return (
            None
            if kind == natural_kind(form)
            else f"{kind.name} does not hold {form.label}; export=gguf without a type"
        )
    if form.group_size % BLOCK:
        if form.scale.shape[1] == 1:
            return f"in_features={form.shape[1]}: blocks have {BLOCK} columns"
        return f"group_size={form.group_size}: blocks have {BLOCK} columns; 32, 64, 128 or null"
    levels, box = _LEVELS[kind], Grid(form.bits, form.symmetric).box
    first, last = (0, box.span) if levels.offset is None else (box.first + levels.offset, box.last + levels.offset)
    if first < levels.first or last > levels.last:
        held = levels.last - levels.first + 1
        return f"{form.label} needs {last - first + 1} levels, and {kind.name} has {held}{_way_out(form, kind)}"
    if form.bits < LEAST_BITS:
        return f"{kind.name} holds {form.label} at {bits_of(kind):g} bits, nothing is gained; bits={LEAST_BITS}"
    return None


def _way_out(form: UniformWeight, kind: GGMLQuantizationType) -> str:
    """What to set where `kind` has too few levels."""
    natural = natural_kind(form)
    fits_symmetric = not form.symmetric and _NATURAL.get((form.bits, True), GGMLQuantizationType.Q8_0) == kind
    ways = ["quantizer.symmetric=true"] if fits_symmetric else []
    if natural != kind and check_kind(form, natural) is None:
        ways.append(f"type {natural.name.lower()}")
    return f"; {' or '.join(ways)}" if ways else ""


def encode_blocks(weight: BlockWeight, kind: GGMLQuantizationType) -> np.ndarray:
    """(out, bytes of a row) uint8, exact but for TOLERANCE. weight: one that `check_kind` lets pass, no permutation.

    Raises ModelError where a scale has no float16 of the same value.
    """
    if isinstance(weight, KQuantWeight):
        return encode_k_blocks(weight)
    assert weight.permutation is None
    rows = weight.shape[0]
    levels, zero_point = _LEVELS[kind], weight.unsigned_zero_point()
    step = _exact_float16(weight.scale)
    parts = [step]
    codes = weight.unsigned_codes().reshape(rows, -1, BLOCK)
    repeats = weight.group_size // BLOCK
    if levels.offset is None:
        parts.append(_float16(-weight.scale.float() * zero_point, "scale * zero_point"))
    else:  # in uint8, which wraps around: Q8_0's negative q are the bytes of an int8
        codes = codes - (zero_point - levels.offset).repeat_interleave(repeats, dim=1)[..., None]
    heads = torch.stack(parts, dim=-1).view(torch.uint8)  # (rows, groups, 2 or 4)
    blocks = [heads.repeat_interleave(repeats, dim=1)]
    if levels.last == 31:
        fifth = (codes >> 4).reshape(rows, -1, BLOCK // 8, 8)
        blocks.append((fifth << torch.arange(8, dtype=torch.uint8)).sum(dim=-1, dtype=torch.uint8))
    if kind == GGMLQuantizationType.Q8_0:
        blocks.append(codes)
    else:
        nibbles = codes & 15
        blocks.append(nibbles[..., : BLOCK // 2] | (nibbles[..., BLOCK // 2 :] << 4))
    return torch.cat(blocks, dim=-1).reshape(rows, -1).numpy()


def encode_plain(tensor: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """A tensor that is not quantised, as F32, F16, BF16, Q8_0 or Q6_K by rounding to nearest: (..., bytes of a row)
    uint8.

    Raises ModelError where a value is out of float16's range.
    """
    if kind == GGMLQuantizationType.Q8_0:
        return np.concatenate([quantize(part.float().numpy(), kind) for part in tensor.split(ROWS)])
    if kind == GGMLQuantizationType.Q6_K:
        return np.concatenate(
            [encode_k_blocks(round_to_k(part.float(), K_GRIDS["q6_k"])) for part in tensor.split(ROWS)]
        )
    if kind == GGMLQuantizationType.F16:
        tensor = _float16(tensor, "value")
    else:
        tensor = tensor.to({GGMLQuantizationType.F32: torch.float32, GGMLQuantizationType.BF16: torch.bfloat16}[kind])
    return tensor.contiguous().view(torch.uint8).numpy()


def _exact_float16(scale: Tensor) -> Tensor:
    half = _float16(scale, "scale")
    different = half.to(scale.dtype) != scale
    if different.any():
        found = f"scale {float(scale[different][0]):.9g}"
        raise ModelError(f"{found}: float16, which GGUF stores, rounds it; export=compressed-tensors keeps it")
    return half


def _float16(values: Tensor, name: str) -> Tensor:
    half = values.to(torch.float16)
    beyond = ~half.isfinite()
    if beyond.any():
        raise ModelError(f"{name} {float(values[beyond][0]):.6g}: out of the range of float16, which GGUF stores")
    return half
