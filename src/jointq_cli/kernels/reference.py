"""The kernels in plain torch: slow on a CPU, correct on every device."""

from typing import ClassVar

import torch
from torch import Tensor

from jointq_cli.kernels import (
    CANCELLED,
    COLUMN_SWEEPS,
    TOLERANCE,
    Box,
    Kernels,
    KLimits,
    Rounding,
    reference_k_flips,
)
from jointq_cli.kernels.reference_flips import TorchSteps, dots, nearest


class ReferenceKernels(Kernels):
    """See `Kernels` for the contract. A subclass may replace `steps` by faster ones."""

    steps: ClassVar[type[TorchSteps]] = TorchSteps

    @staticmethod
    def clip_search(values: Tensor, zero_points: Tensor, scales: Tensor, lowest: int, highest: int) -> Tensor:
        whole = torch.floor(zero_points)
        fractions = zero_points - whole
        losses = torch.empty_like(scales)
        for k in range(scales.shape[1]):
            zero = whole[:, k, None]
            exact = values / scales[:, k, None] + fractions[:, k, None]
            rounded = torch.round(exact).clamp_(lowest - zero, highest - zero)
            losses[:, k] = rounded.sub_(exact).abs_().pow_(2.4).sum(dim=1)
        # Each loss is in units of its candidate's scale; the ratio to the first scale makes them comparable and, unlike
        # the scale itself, does not underflow.
        losses *= (scales / scales[:, :1]).pow_(2.4)
        return torch.argmin(losses, dim=1)

    @staticmethod
    def quantize_columns(
        work: Tensor,
        codes: Tensor,
        errors: Tensor,
        upper: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        column_groups: Tensor,
        span: range,
        block: range,
        lowest: int,
        highest: int,
    ) -> None:
        for j in span:
            group = column_groups[j : j + 1]  # a slice, not a number: reading one would synchronise with the device
            s = scale.index_select(1, group)[:, 0]
            zero = zero_point.index_select(1, group)[:, 0]
            whole = torch.floor(zero)
            code = torch.round(work[:, j] / s + (zero - whole)).add_(whole).clamp_(lowest, highest)
            codes[:, j] = code.to(codes.dtype)
            error = (work[:, j] - (code - zero) * s) / upper[j, j]
            errors[:, j - block.start] = error
            rest = slice(j + 1, block.stop)
            work[:, rest] -= error[:, None] * upper[j, rest]

    @classmethod
    def weighted_clip(
        cls,
        values: Tensor,
        weights: Tensor,
        low: Tensor,
        widest: Tensor,
        levels: Tensor,
        scale: Tensor,
        box: Box,
        steps: int,
    ) -> None:
        shrink = torch.tensor([1.0 - 0.8 * k / steps for k in range(steps)], dtype=torch.float64)
        trials = widest[:, None] * shrink.to(widest)
        floor = torch.round(low / widest).clamp_(box.first, box.last - box.span)
        best = cls.steps.best_scale(values, weights, floor, trials, box)
        scale.copy_(trials.gather(1, best[:, None])[:, 0])
        levels.copy_(nearest(values, scale, floor, box))

    @classmethod
    def flip_search(
        cls,
        correlation: Tensor,
        metric: Tensor,
        products: Tensor,
        levels: Tensor,
        scale: Tensor,
        box: Box,
        rounding: Rounding,
        *,
        guarded: bool,
    ) -> tuple[Tensor, Tensor]:
        levels_before, reached_before = levels.clone(), products * scale.double()[:, None]
        taken, exact = cls.steps.descend_profiled(correlation, products, levels, metric, box)
        best = torch.where(exact > 0, rounded(exact, rounding).to(scale.dtype), scale)
        taken += cls.steps.descend_fixed(correlation, products, levels, metric, best, box)
        # The two f agree in many digits, so their difference comes from what changed: see `cpu_flips._fall`.
        reached = products * best.double()[:, None]
        change = levels * best.double()[:, None] - levels_before * scale.double()[:, None]
        fall = change.mul_(2.0 * correlation.double() - reached - reached_before).sum(dim=1)
        kept = fall > 0 if guarded else torch.ones_like(fall, dtype=torch.bool)
        scale.copy_(torch.where(kept, best, scale))
        levels.copy_(torch.where(kept[:, None], levels, levels_before))
        return torch.where(kept & (fall != 0), taken.clamp_min(1), 0), torch.where(kept, fall, 0.0)

    @classmethod
    def anneal(
        cls,
        correlation: Tensor,
        metric: Tensor,
        products: Tensor,
        levels: Tensor,
        scale: Tensor,
        box: Box,
        rounding: Rounding,
        *,
        temperature: float,
        noise: Tensor,
    ) -> None:
        cls.steps.anneal_fixed(correlation, products, levels, metric, scale, box, noise * temperature)
        q, o, e = dots(correlation, products, levels, metric.diagonal())
        reliable = o > CANCELLED * torch.finfo(levels.dtype).eps * e
        scale.copy_(torch.where(reliable & (q > 0), rounded(q / o, rounding).to(scale.dtype), scale))

    @classmethod
    def k_flip_search(
        cls,
        correlation: Tensor,
        metric: Tensor,
        products: Tensor,
        levels: Tensor,
        scales: Tensor,
        mins: Tensor,
        d: Tensor,
        dmin: Tensor,
        limits: KLimits,
    ) -> tuple[Tensor, Tensor]:
        return reference_k_flips.k_flip_search(
            cls.steps, correlation, metric, products, levels, scales, mins, d, dmin, limits
        )

    @staticmethod
    def column_flips(products: Tensor, metric: Tensor, coupling: Tensor, signs: Tensor, scale: Tensor) -> Tensor:
        change = torch.zeros_like(products)
        for c, (m, s, u) in enumerate(zip(products, signs, change, strict=True)):
            for _ in range(COLUMN_SWEEPS):
                moved = False
                for j in range(len(s)):
                    step = -2 * s[j] * scale[c]
                    energy = step * step * metric[j, j] * coupling[c, c]
                    if bool(2 * step * m[j] - energy > TOLERANCE * energy):
                        moved = True
                        s[j] = -s[j]
                        m -= step * coupling[c, c] * metric[j]
                        u += step * metric[j]
                if not moved:
                    break
            products[c + 1 :] -= coupling[c, c + 1 :, None] * u
        return change


def rounded(scale: Tensor, rounding: Rounding) -> Tensor:
    """`scale` (float64) > 0 rounded to the format in which it is stored: to nearest, ties to even, never 0."""
    exponent = torch.frexp(scale).exponent.long() - 1
    power = exponent.clamp_(min=rounding.min_exponent) - rounding.digits
    step = (power + 1023 << 52).view(torch.float64)  # 2^power, written as its bits
    return torch.round(scale / step).mul_(step).clamp_(min=rounding.least)
