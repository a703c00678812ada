"""The kernels in plain torch: slow on a CPU, right everywhere. Knows no device and no library but torch."""

import torch
from torch import Tensor

from jointq_cli.kernels import Kernels


class ReferenceKernels(Kernels):
    """See `Kernels` for the contract."""

    @staticmethod
    def clip_search(values: Tensor, low: Tensor, shrink: Tensor, scales: Tensor, lowest: int, highest: int) -> Tensor:
        losses = torch.empty_like(scales)
        for k in range(scales.shape[1]):
            scale = scales[:, k, None]
            zero_point = torch.round(-(low[:, None] * shrink[k]) / scale).clamp_(0, highest)
            exact = values / scale
            rounded = torch.round(exact).clamp_(lowest - zero_point, highest - zero_point)
            losses[:, k] = rounded.sub_(exact).abs_().pow_(2.4).sum(dim=1)
        # Losses are in steps of each candidate; the ratio to the first gives them one unit without underflow.
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
            group = column_groups[j : j + 1]  # a slice, not a number: reading one would wait for the device
            s = scale.index_select(1, group)[:, 0]
            zero = zero_point.index_select(1, group)[:, 0].to(torch.float32)
            code = torch.round(work[:, j] / s).add_(zero).clamp_(lowest, highest)
            codes[:, j] = code.to(codes.dtype)
            error = (work[:, j] - (code - zero) * s) / upper[j, j]
            errors[:, j - block.start] = error
            rest = slice(j + 1, block.stop)
            work[:, rest] -= error[:, None] * upper[j, rest]
