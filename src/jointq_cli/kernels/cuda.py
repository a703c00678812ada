"""The kernels for CUDA devices: JointQ's loops as Triton programs, everything else in plain torch.

Launches the programs of `cuda_flips`. Imported only when a tensor is on a CUDA device and Triton is installed.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from jointq_cli.kernels import CANCELLED, Box, cuda_flips
from jointq_cli.kernels.cpu import CpuKernels
from jointq_cli.kernels.reference import ReferenceKernels
from jointq_cli.kernels.reference_flips import TorchSteps

_MAX_COLUMNS = 1 << 14  # columns: their levels, products and gains must fit into a program's registers


class TritonSteps(TorchSteps):
    """See `TorchSteps`, which also handles the groups that are too wide for a program."""

    @staticmethod
    def descend_profiled(h: Tensor, v: Tensor, z: Tensor, metric: Tensor, box: Box) -> tuple[Tensor, Tensor]:
        if h.shape[1] > _MAX_COLUMNS:
            return TorchSteps.descend_profiled(h, v, z, metric, box)
        taken = torch.empty(len(h), dtype=torch.int64, device=h.device)
        scale = torch.empty_like(taken, dtype=torch.float64)
        r, sums = metric.diagonal().contiguous(), metric.sum(dim=0)
        cancelled = CANCELLED * torch.finfo(h.dtype).eps
        most = box.most_steps(h.shape[1])
        flip = -1.0 if box.fraction else 0.0
        _launch(
            cuda_flips.profiled, h, v, z, metric, r, sums, scale, taken,
            most=most, cancelled=cancelled, flip=flip, **_window(box),
        )  # fmt: skip
        return taken, scale

    @staticmethod
    def descend_fixed(h: Tensor, v: Tensor, z: Tensor, metric: Tensor, s: Tensor, box: Box) -> Tensor:
        if h.shape[1] > _MAX_COLUMNS:
            return TorchSteps.descend_fixed(h, v, z, metric, s, box)
        taken = torch.empty(len(h), dtype=torch.int64, device=h.device)
        r, most = metric.diagonal().contiguous(), box.most_steps(h.shape[1])
        _launch(cuda_flips.fixed, h, v, z, metric, r, s, r, taken, most, wanders=False, **_window(box))
        return taken

    @staticmethod
    def anneal_fixed(h: Tensor, v: Tensor, z: Tensor, metric: Tensor, s: Tensor, box: Box, bonus: Tensor) -> None:
        if h.shape[1] > _MAX_COLUMNS:
            return TorchSteps.anneal_fixed(h, v, z, metric, s, box, bonus)
        taken = torch.empty(len(h), dtype=torch.int64, device=h.device)
        r = metric.diagonal().contiguous()
        _launch(cuda_flips.fixed, h, v, z, metric, r, s, bonus, taken, len(bonus), wanders=True, **_window(box))

    @staticmethod
    def best_scale(values: Tensor, weights: Tensor, floor: Tensor, trials: Tensor, box: Box) -> Tensor:
        if values.shape[1] > _MAX_COLUMNS:
            return TorchSteps.best_scale(values, weights, floor, trials, box)
        best = torch.empty(len(values), dtype=torch.int64, device=values.device)
        _launch(
            cuda_flips.best_trial, values, weights, floor, trials, best,
            span=box.span, fraction=box.fraction, trials=trials.shape[1],
        )  # fmt: skip
        return best


class CudaKernels(ReferenceKernels):
    """See `Kernels` for the contract."""

    steps: ClassVar[type[TorchSteps]] = TritonSteps

    @staticmethod
    def column_flips(products: Tensor, metric: Tensor, coupling: Tensor, signs: Tensor, scale: Tensor) -> Tensor:
        """On the CPU: columns wait for each other, and a flip is less work than launching it."""
        given = [products, signs]
        moved = [tensor.cpu() for tensor in given]
        change = CpuKernels.column_flips(moved[0], metric.cpu(), coupling.cpu(), moved[1], scale.cpu())
        for tensor, result in zip(given, moved, strict=True):
            tensor.copy_(result)
        return change.to(products.device)


def _window(box: Box) -> Mapping[str, float]:
    return {"first": box.first, "last": box.last, "span": box.span}


def _launch(program: Any, rows: Tensor, *arguments: Any, **constants: Any) -> None:
    """Runs one program for each of `rows` (rows, d), with a warp per 256 columns; block sizes are powers of two."""
    count, columns = rows.shape
    block = 1 << (columns - 1).bit_length()
    warps = max(1, min(32, block // 256))
    with torch.cuda.device_of(rows):  # no effect on a tensor that is not on a GPU, as in Triton's interpreter
        program[(count,)](
            rows, *arguments, d=columns, block=block, num_warps=warps, enable_fp_fusion=False, **constants
        )
