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


def simply_rounded(weight: Tensor, grid: KGrid) -> KQuantWeight:
    """weight (out, in) float32. Without any search, which takes seconds: each block's range sets its scale and min."""
    rows = len(weight)
    blocks = weight.view(rows, -1, grid.blocks, grid.block)
    some = slice(None) if grid.has_mins else slice(0)
    least, greatest = blocks.amin(dim=-1).clamp_max(0), blocks.amax(dim=-1)
    widths = (greatest - least) / grid.last_code if grid.has_mins else torch.maximum(greatest, -least) / grid.zero
    d, sc = _units(widths, grid.scales[1])
    dmin, mn = _units(-least, grid.last_min) if grid.has_mins else (torch.zeros_like(d), torch.zeros_like(sc))
    codes = torch.round((blocks + (dmin * mn)[..., None]) / (d * sc)[..., None]) + grid.zero
    return KQuantWeight(
        codes=codes.nan_to_num(0.0).clamp(0, grid.last_code).to(torch.uint8).view(rows, -1),
        scales=sc.to(torch.int8).view(rows, -1),
        mins=mn.to(torch.uint8).view(rows, -1)[:, some],
        d=d.half().view(rows, -1),
        dmin=dmin.half().view(rows, -1)[:, some],
        grid=grid,
    )


def _units(wanted: Tensor, last: int) -> tuple[Tensor, Tensor]:
    unit = (wanted.amax(dim=-1, keepdim=True) / last).half().float().clamp_min(2.0**-24)
    return unit, torch.round(wanted / unit).clamp(0, last)
