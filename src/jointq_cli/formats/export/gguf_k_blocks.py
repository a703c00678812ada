"""Weights on K grids as llama.cpp's super-blocks of 256 columns: `block_q2_K` to `block_q6_K` of ggml-common.h.

Nothing is rounded: codes, sc, mn, d and dmin are put where ggml-quants.c's `dequantize_row_q*_K` finds them. Below,
a super-block has 256 codes; several of them share a byte, the first in its lowest bits.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from jointq_cli.formats.k_quant import SUPER_BLOCK, KQuantWeight


def encode_k_blocks(weight: KQuantWeight) -> np.ndarray:
    """(out, bytes of a row) uint8."""
    rows, columns = weight.shape
    shape = (rows, columns // SUPER_BLOCK)
    blocks = torch.cat([part.reshape(*shape, -1) for part in _ENCODERS[weight.grid.name](weight, shape)], dim=-1)
    return blocks.reshape(rows, -1).numpy()


_Shape = tuple[int, int]  # rows, super-blocks


def _q2_k(weight: KQuantWeight, shape: _Shape) -> list[Tensor]:
    scales = weight.scales.view(torch.uint8) | (weight.mins << 4)
    return [scales, _shared(weight.codes, shape, 128, 2), _bytes(weight.d), _bytes(weight.dmin)]


def _q3_k(weight: KQuantWeight, shape: _Shape) -> list[Tensor]:
    sc = weight.scales.view(torch.uint8).add(32).view(*shape, 16)  # 0 to 63
    low = (sc[..., :8] & 15) | ((sc[..., 8:] & 15) << 4)
    scales = torch.cat([low, _shared(sc >> 4, shape, 16, 2)], dim=-1)
    return [
        _shared(weight.codes >> 2, shape, 256, 1),
        _shared(weight.codes & 3, shape, 128, 2),
        scales,
        _bytes(weight.d),
    ]


def _q4_k(weight: KQuantWeight, shape: _Shape) -> list[Tensor]:
    return [_bytes(weight.d), _bytes(weight.dmin), _six_bits(weight, shape), _shared(weight.codes, shape, 64, 4)]


def _q5_k(weight: KQuantWeight, shape: _Shape) -> list[Tensor]:
    head = [_bytes(weight.d), _bytes(weight.dmin), _six_bits(weight, shape)]
    return [*head, _shared(weight.codes >> 4, shape, 256, 1), _shared(weight.codes & 15, shape, 64, 4)]


def _q6_k(weight: KQuantWeight, shape: _Shape) -> list[Tensor]:
    low, high = _shared(weight.codes & 15, shape, 128, 4), _shared(weight.codes >> 4, shape, 128, 2)
    return [low, high, weight.scales.view(torch.uint8), _bytes(weight.d)]


_ENCODERS: dict[str, Callable[[KQuantWeight, _Shape], list[Tensor]]] = {
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}


def _bytes(halves: Tensor) -> Tensor:
    """float16 numbers, one for each super-block."""
    return halves.contiguous().view(torch.uint8)


def _shared(values: Tensor, shape: _Shape, section: int, bits: int) -> Tensor:
    """values (out, in) uint8 below 2^bits, 8 / bits of them in a byte. A section of neighbours is cut into that many
    runs, whose first values share a byte, then the second ones, and so on."""
    together = 8 // bits
    runs = values.reshape(*shape, -1, together, section // together)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=values.device)[:, None]
    return (runs << shifts).sum(dim=-2, dtype=torch.uint8).flatten(2)


def _six_bits(weight: KQuantWeight, shape: _Shape) -> Tensor:
    """sc and mn of 8 blocks in 12 bytes, as `get_scale_min_k4` takes them apart."""
    sc, mn = (part.view(torch.uint8).view(*shape, 8) for part in (weight.scales, weight.mins))
    first = [part[..., :4] | (part[..., 4:] >> 4 << 6) for part in (sc, mn)]
    return torch.cat([*first, (sc[..., 4:] & 15) | (mn[..., 4:] << 4)], dim=-1)
