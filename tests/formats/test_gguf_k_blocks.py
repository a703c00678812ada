"""Super-blocks of K-quants: decoded by the gguf package and by llama.cpp itself."""

import numpy as np
import pytest
import torch
from ggml_library import decoded
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from k_cases import random_k_weight

from jointq_cli.formats.export.gguf_k_blocks import encode_k_blocks
from jointq_cli.formats.k_quant import K_GRIDS, KGrid

every_grid = pytest.mark.parametrize("grid", K_GRIDS.values(), ids=lambda grid: grid.label)


@every_grid
def test_the_gguf_package_and_llama_cpp_decode_the_same_values(grid: KGrid) -> None:
    """To the bit: products have at most 24 significant bits, so that only the subtraction of a min rounds."""
    for seed in range(3):
        weight = random_k_weight(grid, rows=64, seed=seed)
        blocks = encode_k_blocks(weight)
        assert blocks.dtype == np.uint8
        assert blocks.shape == (64, 3 * grid.stored_bytes)
        expected = weight.dequantize(torch.float32).numpy()
        assert np.array_equal(dequantize(blocks, Kind[grid.label]), expected)
        assert np.array_equal(decoded(blocks, Kind[grid.label]), expected)


@every_grid
def test_every_byte_of_a_block_comes_back(grid: KGrid) -> None:
    """A change of any one part changes the bytes: nothing is dropped, and nothing is stored twice."""
    weight = random_k_weight(grid, rows=5, columns=256)
    blocks = encode_k_blocks(weight)
    flipped = np.zeros_like(blocks)
    for name in ("codes", "scales", "mins", "d", "dmin"):
        part = getattr(weight, name)
        bits = {"codes": grid.bits, "scales": {"q2_k": 4, "q6_k": 8}.get(grid.name, 6), "mins": 4 + 2 * (grid.bits > 2)}
        for bit in range(bits.get(name, 16)):
            kind = torch.int16 if part.dtype == torch.float16 else torch.uint8
            changed = part.view(kind) ^ ((1 << bit) - (1 << 16 if bit == 15 else 0))
            if grid.name == "q3_k" and name == "scales":  # stored plus 32
                changed = ((part + 32).view(torch.uint8) ^ (1 << bit)) - 32
            again = encode_k_blocks(type(weight)(**{**vars(weight), name: changed.view(part.dtype)}))
            assert not (flipped & (again ^ blocks)).any()
            flipped |= again ^ blocks
    assert (flipped == 255).all()
