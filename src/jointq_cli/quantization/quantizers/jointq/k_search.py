"""JointQ's search on a K grid: levels, scales and mins of all blocks, and the units d and dmin of super-blocks.

The groups of the metric are super-blocks, since their blocks share d and dmin. A super-block starts with scales that
are best for errors weighted by the diagonal of S_t, and with levels rounded column by column, as GPTQ does, for these
scales. From there, and in each sweep, its blocks take turns (`Kernels.k_flip_search`), and then d and dmin are refitted
by least squares and rounded to float16; nothing that would raise the cost is kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from jointq_cli import kernels
from jointq_cli.formats.k_quant import SUPER_BLOCK, KGrid
from jointq_cli.formats.k_rounding import fit_scales, float16, in_blocks
from jointq_cli.kernels import TOLERANCE, KLimits
from jointq_cli.quantization.quantizers.cholesky import factorize
from jointq_cli.quantization.quantizers.jointq.descent import Descent, RowState
from jointq_cli.quantization.quantizers.jointq.metric import Metric

START_PASSES = 1  # over the blocks of a super-block, in its metric S_t
SWEEP_PASSES = 1
COLUMNS_AT_ONCE = 32  # whose errors are compensated one by one inside, and by a product beyond


@dataclass(frozen=True)
class KState(RowState):
    """levels (rows, in); sc and mn (rows, blocks), integers; d and dmin (rows, super-blocks), float16 numbers
    divided by a power of two."""

    sc: Tensor
    mn: Tensor
    d: Tensor
    dmin: Tensor

    def values(self, metric: Metric) -> Tensor:
        rows, columns = self.levels.shape
        blocks = self.sc.shape[1] // self.d.shape[1]
        step = self.sc * self.d.repeat_interleave(blocks, dim=1)
        offset = self.mn * self.dmin.repeat_interleave(blocks, dim=1)
        levels = self.levels.view(rows, self.sc.shape[1], -1)
        return (levels * step[..., None] - offset[..., None]).view(rows, columns)

    def super_block(self, t: int) -> "KState":
        """Of super-block t alone; copies."""
        blocks = self.sc.shape[1] // self.d.shape[1]
        columns, part = slice(t * SUPER_BLOCK, (t + 1) * SUPER_BLOCK), slice(t * blocks, (t + 1) * blocks)
        one = slice(t, t + 1)
        return KState(
            self.levels[:, columns].clone(),
            self.sc[:, part].clone(),
            self.mn[:, part].clone(),
            self.d[:, one].clone(),
            self.dmin[:, one].clone(),
        )

    def put_super_block(self, t: int, part: "KState") -> None:
        for name in ("levels", "sc", "mn", "d", "dmin"):
            found = getattr(part, name)
            width = found.shape[1]
            getattr(self, name)[:, t * width : (t + 1) * width] = found


@dataclass(frozen=True)
class KSearch(Descent[KState]):
    """See `Descent`. exponent: weights are divided by 2^exponent; groups of the metric have 256 columns."""

    metric: Metric
    grid: KGrid
    exponent: int

    def _start_group(self, state: KState, t: int, wanted: Tensor, metric: Tensor) -> Tensor:
        part = self._started(wanted, metric)
        error = wanted - part.values(self.metric)
        self._descend_blocks(part, error @ metric, metric, START_PASSES)
        state.put_super_block(t, part)
        return wanted - part.values(self.metric)

    def _sweep(self, target: Tensor, state: KState) -> tuple[Tensor, Tensor]:
        error = target - state.values(self.metric)
        steps = torch.zeros(len(target), dtype=torch.int64, device=target.device)
        decrease = torch.zeros(len(target), dtype=torch.float64, device=target.device)
        for t in range(self.metric.groups):
            span = self.metric.span(t)
            metric = self.metric.full[span, span].contiguous()
            part = state.super_block(t)
            taken, gained = self._descend_blocks(part, error @ self.metric.full[:, span], metric, SWEEP_PASSES)
            state.put_super_block(t, part)
            error[:, span] = target[:, span] - part.values(self.metric)
            steps += taken
            decrease += gained
        return steps, decrease

    def _started(self, wanted: Tensor, metric: Tensor) -> KState:
        """Scales for `wanted` (rows, 256) on their own, and levels rounded in turn, each error compensated later."""
        grid = self.grid
        scales, _ = fit_scales(*in_blocks(wanted, metric.diagonal(), grid), grid, self.exponent)
        step, offset = scales.step.flatten(1).float(), scales.offset.flatten(1)
        work = (wanted + offset.repeat_interleave(grid.block, dim=1)).float()
        codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
        order = torch.arange(SUPER_BLOCK, device=work.device)
        # A Schur complement of what has been factorised, but rounded, so that it may need damping.
        upper = factorize(metric.double(), order, 0.0, key="quantizer.regularization_lambda").upper
        zero = torch.full(step.shape, grid.zero, dtype=torch.uint8, device=work.device)
        groups = order // grid.block
        column_loop = kernels.for_device(work.device).quantize_columns
        for start in range(0, SUPER_BLOCK, COLUMNS_AT_ONCE):
            part = range(start, start + COLUMNS_AT_ONCE)
            errors = work.new_empty(len(work), len(part))
            column_loop(work, codes, errors, upper, step, zero, groups, part, part, 0, grid.last_code)
            work[:, part.stop :].addmm_(errors, upper[start : part.stop, part.stop :], alpha=-1.0)
        levels = codes.to(wanted.dtype) - grid.zero
        return KState(levels, scales.sc.flatten(1), scales.mn.flatten(1), scales.d.flatten(1), scales.dmin.flatten(1))

    def _descend_blocks(self, part: KState, gradient: Tensor, metric: Tensor, passes: int) -> tuple[Tensor, Tensor]:
        """Passes over the blocks of one super-block, in place. gradient (rows, 256) = (e H)[super-block], overwritten.

        Returns steps and decrease of the cost, both (rows,).
        """
        search = kernels.for_device(gradient.device).k_flip_search
        steps = torch.zeros(len(gradient), dtype=torch.int64, device=gradient.device)
        decrease = torch.zeros(len(gradient), dtype=torch.float64, device=gradient.device)
        for _ in range(passes):
            for number in range(self.grid.blocks):
                span = slice(number * self.grid.block, (number + 1) * self.grid.block)
                block = metric[span, span].contiguous()
                levels, sc, mn = (
                    part.levels[:, span].contiguous(),
                    part.sc[:, number].clone(),
                    part.mn[:, number].clone(),
                )
                d, dmin = part.d[:, 0].contiguous(), part.dmin[:, 0].contiguous()
                before = levels * (d * sc)[:, None] - (dmin * mn)[:, None]
                correlation = gradient[:, span] + before @ block
                taken, gained = search(correlation, block, levels @ block, levels, sc, mn, d, dmin, self._limits)
                after = levels * (d * sc)[:, None] - (dmin * mn)[:, None]
                gradient.addmm_(after - before, metric[span], alpha=-1.0)
                part.levels[:, span], part.sc[:, number], part.mn[:, number] = levels, sc, mn
                steps += taken
                decrease += gained
        gained = self._refit_units(part, gradient, metric)
        return steps + (gained > 0), decrease + gained

    def _refit_units(self, part: KState, gradient: Tensor, metric: Tensor) -> Tensor:
        """The d and dmin of one super-block that are best for its integers, in place where they lower the cost, by how
        much (rows,) is returned.

        A change of d by x and of dmin by y changes the values by x p - y m, with p = sc z and m = mn in each column.
        """
        rows, columns = part.levels.shape
        p = (part.levels.view(rows, -1, self.grid.block) * part.sc[..., None]).view(rows, columns)
        pushed = p @ metric
        o, q = _dot(pushed, p), _dot(gradient, p)
        solvable = o > 0
        if not self.grid.has_mins:
            d = self._rounded(part.d, torch.where(solvable, q / o, 0.0), solvable)
            x = _change(part.d, d)
            gain = x * (2.0 * q - x * o)
            kept = gain > TOLERANCE * part.d[:, 0].double().square() * o
            self._keep(kept, part.d, d)
            gradient.addcmul_(pushed, torch.where(kept, -x, 0.0).to(p.dtype)[:, None])
            return torch.where(kept, gain, 0.0)
        m = part.mn.repeat_interleave(self.grid.block, dim=1)
        shifted = m @ metric
        u, w, s = _dot(shifted, m), _dot(pushed, m), _dot(gradient, m)
        determinant = o * u - w * w
        both = determinant > 1e-6 * o * u
        x = torch.where(both, (q * u - w * s) / determinant, torch.where(solvable, q / o, 0.0))
        d = self._rounded(part.d, x, solvable)
        x = _change(part.d, d)
        dmin = self._rounded(part.dmin, torch.where(u > 0, (x * w - s) / u, 0.0), u > 0)
        y = _change(part.dmin, dmin)
        gain = x * (2.0 * q - x * o) + y * (2.0 * x * w - 2.0 * s - y * u)
        kept = gain > TOLERANCE * part.d[:, 0].double().square() * o
        self._keep(kept, part.d, d)
        self._keep(kept, part.dmin, dmin)
        gradient.addcmul_(pushed, torch.where(kept, -x, 0.0).to(p.dtype)[:, None])
        gradient.addcmul_(shifted, torch.where(kept, y, 0.0).to(p.dtype)[:, None])
        return torch.where(kept, gain, 0.0)

    def _rounded(self, unit: Tensor, change: Tensor, solvable: Tensor) -> Tensor:
        """unit (rows, 1) changed where it can be solved for, as it is stored."""
        moved = float16(unit + change.to(unit.dtype)[:, None], self.exponent)
        return torch.where(solvable[:, None] & torch.isfinite(moved), moved, unit)

    @staticmethod
    def _keep(kept: Tensor, unit: Tensor, new: Tensor) -> None:
        unit.copy_(torch.where(kept[:, None], new, unit))

    @property
    def _limits(self) -> KLimits:
        grid = self.grid
        least, last = grid.scales
        return KLimits(-grid.zero, grid.last_code - grid.zero, least or 1, last, grid.last_min)

    def _empty(self, target: Tensor) -> KState:
        rows, super_blocks = len(target), self.metric.groups
        blocks = super_blocks * self.grid.blocks
        shapes = (target.shape[1], blocks, blocks, super_blocks, super_blocks)
        return KState(*(target.new_empty(rows, width) for width in shapes))


def _change(before: Tensor, after: Tensor) -> Tensor:
    return (after.double() - before.double())[:, 0]


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """(rows,) float64."""
    return torch.sum(one * other, dim=1, dtype=torch.float64)
