"""GPTQ's column loop on a K grid: scales are fitted to whole super-blocks, then their columns are rounded in turn.

A value is step z - offset. The offset is added to the weights beforehand, so that what is left is a grid without one;
the errors, which are all that propagates, are the same.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from jointq_cli import kernels
from jointq_cli.formats.k_quant import SUPER_BLOCK, KGrid, KQuantWeight
from jointq_cli.formats.k_rounding import KScales, fit_scales, in_blocks, stored


def quantize_on_k_grid(
    weight: Tensor,
    grid: KGrid,
    order: Tensor,
    upper: Tensor,
    importance: Tensor,
    blocks: Iterable[range],
    *,
    static: bool,
) -> KQuantWeight:
    """Algorithm 1 of GPTQ with scales that are fitted to errors weighted by `importance` (in,).

    weight (out, in) float32; order (in,) int64 of its columns, in which upper (in, in) float32 is. blocks: ranges of
    columns between two large updates, none across the end of a super-block. static: scales are fitted to the weights as
    they are; otherwise, with `order` the natural one, to what each super-block has become when its turn comes.
    """
    rows, columns = weight.shape
    work = weight.index_select(1, order)
    groups = order // grid.block
    step = torch.empty(rows, columns // grid.block, device=weight.device)
    zero = torch.full(step.shape, grid.zero, dtype=torch.uint8, device=weight.device)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    found: list[KScales] = []
    if static:
        scales, _ = fit_scales(*in_blocks(weight, importance, grid), grid)
        found.append(scales)
        step.copy_(scales.step.flatten(1))
        work += scales.offset.flatten(1)[:, groups]
    column_loop = kernels.for_device(weight.device).quantize_columns
    errors = torch.empty(rows, SUPER_BLOCK, device=weight.device)
    for block in blocks:
        if not static and block.start % SUPER_BLOCK == 0:
            span = slice(block.start, block.start + SUPER_BLOCK)
            scales, _ = fit_scales(*in_blocks(work[:, span], importance[span], grid), grid)
            found.append(scales)
            within = groups[span]
            step[:, within[0] : within[-1] + 1] = scales.step.flatten(1)
            work[:, span] += scales.offset.flatten(1).repeat_interleave(grid.block, dim=1)
        part = errors.flatten()[: rows * len(block)].view(rows, len(block))
        column_loop(work, codes, part, upper, step, zero, groups, block, block, 0, grid.last_code)
        rest = slice(block.stop, None)
        work[:, rest].addmm_(part, upper[block.start : block.stop, rest], alpha=-1.0)
    levels = torch.empty_like(codes).index_copy_(1, order, codes).to(torch.float32) - grid.zero
    return stored(KScales.joined(found), levels.view(rows, -1, grid.blocks, grid.block), grid)
