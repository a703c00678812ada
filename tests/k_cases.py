"""Weights on K grids for tests."""

import torch
from torch import Tensor

from jointq_cli.formats.k_quant import SUPER_BLOCK, KGrid, KQuantWeight


def random_k_weight(grid: KGrid, rows: int = 24, columns: int = 768, seed: int = 0) -> KQuantWeight:
    """Every code, sc and mn with its extreme values; d and dmin are any finite float16 numbers, subnormal, negative
    and 0 among them."""
    generator = torch.Generator().manual_seed(seed)

    def integers(least: int, last: int, shape: tuple[int, int]) -> Tensor:
        found = torch.randint(least, last + 1, shape, generator=generator)
        found[0], found[1] = least, last
        return found

    def halves(shape: tuple[int, int]) -> Tensor:
        found = torch.randint(0, 1 << 16, shape, generator=generator).to(torch.uint16).view(torch.float16)
        found[2], found[3], found[4] = 2.0**-24, -65504.0, 0.0
        return torch.where(found.isfinite(), found, 1.0)

    least, last = grid.scales
    blocks, super_blocks = columns // grid.block, columns // SUPER_BLOCK
    some = slice(None) if grid.has_mins else slice(0)
    return KQuantWeight(
        codes=integers(0, grid.last_code, (rows, columns)).to(torch.uint8),
        scales=integers(least, last, (rows, blocks)).to(torch.int8),
        mins=integers(0, grid.last_min, (rows, blocks)).to(torch.uint8)[:, some],
        d=halves((rows, super_blocks)),
        dmin=halves((rows, super_blocks))[:, some],
        grid=grid,
    )
