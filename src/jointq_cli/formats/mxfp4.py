"""MXFP4, in which gpt-oss is published (Open Compute Project, "Microscaling Formats (MX) Specification", 2023).

Of a parameter NAME (experts, in, out) the checkpoint has its values along `in`, 32 to a block:
    NAME_blocks  uint8 (experts, out, blocks, 16)  two values of 4 bits in a byte, the lower one first
    NAME_scales  uint8 (experts, out, blocks)      the exponent of a power of two, plus 127
"""

import torch
from torch import Tensor

WORD = "mxfp4"
BLOCKS, EXPONENTS = "_blocks", "_scales"
BYTES = 16  # of a block
_BIAS = 127
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1


def dequantized(blocks: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """The parameter (experts, in, out), one expert in float32 at a time. bfloat16 holds every value exactly."""
    values = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])
    experts, rows, count, _ = blocks.shape
    result = torch.empty(experts, count * 2 * BYTES, rows, dtype=dtype)
    for target, packed, exponent in zip(result, blocks, exponents, strict=True):
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
        scaled = torch.ldexp(values[codes.int()], exponent.int()[..., None] - _BIAS)
        target.copy_(scaled.flatten(1).T)
    return result
