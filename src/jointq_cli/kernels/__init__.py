"""The per-row loops that no matrix product can express, behind one contract.

Knows which implementation suits a device. `reference` is plain torch: the oracle of the tests, and what a
CUDA device runs. `cpu` is compiled by numba, which is imported (and compiles, or loads from its cache) only
when first asked for. Tensors in, tensors out; the caller owns every buffer that is written to.
"""

from typing import Protocol

import torch
from torch import Tensor


class Kernels(Protocol):
    """What a module of this package offers."""

    @staticmethod
    def clip_search(values: Tensor, low: Tensor, shrink: Tensor, scales: Tensor, lowest: int, highest: int) -> Tensor:
        """Which candidate grid rounds a group best: argmin over k of sum_j |w_j - nearest level|^2.4.

        Candidate k of a group has scales[:, k] and the zero-point that puts code `lowest` near shrink[k] *
        low. values (groups, columns) contiguous; low (groups,), 0 where the grid has no zero-point; shrink
        (candidates,); scales (groups, candidates); all float32. The earliest of equals wins. Returns
        (groups,) int64.
        """

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
        """GPTQ's inner loop: round the columns of `span` in turn, push each error on inside `block`.

        For j in span: a = nearest code of work[:, j]; e = (work[:, j] - value of a) / upper[j, j]; work[:, k]
        -= e * upper[j, k] for k in block after j. Writes codes[:, j], errors[:, j - block.start], work.

        work (rows, in) float32; codes (rows, in) uint8 or int8; errors (rows, >= len(block)) float32; upper
        (in, in) float32 row-major; scale float32, zero_point uint8 (rows, groups); column_groups (in,) int64.
        """


def for_device(device: torch.device) -> type[Kernels]:
    """The implementation for tensors on `device`."""
    if device.type == "cpu":
        # Here, not above: numba takes half a second to import, and `jointq --help` or a plain RTN needs none.
        from jointq_cli.kernels.cpu import CpuKernels

        return CpuKernels
    from jointq_cli.kernels.reference import ReferenceKernels

    return ReferenceKernels
