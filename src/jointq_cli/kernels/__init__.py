"""The per-row loops that no matrix product can express, behind one contract.

Knows which implementation suits a device. `reference` is plain torch: the oracle of the tests, right on any device.
`cpu` is compiled by numba and `cuda` by Triton, each of which is imported (and compiles, or loads from its cache) only
when first asked for. Tensors in, tensors out; the caller owns every buffer that is written to.
"""

import importlib.util
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

TOLERANCE = 1e-5  # of a step's own energy s^2 R_jj: gains below it are rounding
CANCELLED = 8192  # units of rounding, of sum_j R_jj z_j^2: an energy z R z' below that is too inexact to divide by


@dataclass(frozen=True)
class Box:
    """What the levels z = code - zero_point of one group may be: from `first` to `last`, and at most `span` apart.

    So the zero-point need not be carried along: any window of `span` + 1 levels that covers them all will do.
    """

    first: int
    last: int
    span: int

    def most_steps(self, columns: int) -> int:
        """How many steps a search may take: a bound for arithmetic gone wrong, it ends long before."""
        return (self.span + 16) * columns


@dataclass(frozen=True)
class Rounding:
    """How scales are stored: digits of mantissa after the leading one, least normal exponent, least value allowed."""

    digits: int
    min_exponent: int
    least: float


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

    @staticmethod
    def weighted_clip(
        values: Tensor,
        weights: Tensor,
        low: Tensor,
        widest: Tensor,
        levels: Tensor,
        scale: Tensor,
        box: Box,
        steps: int,
    ) -> None:
        """Nearest levels at the scale of least sum_j weights_j (w_j - s z_j)^2 out of widest * (1 - 0.8 k / steps).

        The window of levels is the one whose lowest stands for about `low`. values (rows, d), weights (d,) >= 0, low
        (rows,) <= 0, widest (rows,) > 0; writes levels (rows, d) and scale (rows,). One dtype, all contiguous. The
        earliest of equals wins.
        """

    @staticmethod
    def flip_search(
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
        """JointQ's local search: levels z and scale s of one group of columns, for every row on its own.

        Minimises f(s, z) = s^2 z R z' - 2 s h z'. First with the scale profiled out (s = q / o is best for given z,
        q = h z', o = z R z', f = -q^2 / o): the best of all single steps of z_j by 1 towards what it lacks (the sign of
        h_j - s (z R)_j) and of z +- (1 ... 1) is taken until none gains. Levels with q <= 0, for which no scale is any
        good, begin at 0. No step leads to an o that is CANCELLED; where it is from the start, the scale that came in
        stays. Then s is rounded as it will be stored, and single steps go on at that scale. A step's gain
        counts less TOLERANCE of its own energy, and the first of equal gains wins. With `guarded` a row keeps what it
        came with unless f is less. Without, only levels enter; `scale` is what remains where every level is 0.

        correlation h (rows, d); metric R (d, d) symmetric, positive semidefinite; products (rows, d) = z R,
        overwritten; levels (rows, d) and scale (rows,) > 0, both updated in place. All contiguous and of one dtype,
        float32 or float64. Returns the steps taken (rows,) int64, 0 where nothing changed, and by how much f fell
        (rows,) float64.
        """

    @staticmethod
    def anneal(
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
        """Random steps that may raise f, to leave a local minimum of `flip_search`. Arguments as there.

        In step i the single step of largest gain + temperature * s^2 R_jj * noise[i, j] is taken if that sum is
        positive, at the scale that came in and, as there, towards what z_j lacks. At the end the best scale for the
        levels is rounded and stored, unless o is CANCELLED. noise (steps, d) of levels' dtype, the same for all rows,
        so that no row depends on which others there are.
        """


def for_device(device: torch.device) -> type[Kernels]:
    """The implementation for tensors on `device`."""
    # Here, not above: numba takes half a second to import, Triton no less, and `jointq --help` or a plain RTN needs
    # neither. Triton comes with torch where torch is built for CUDA, but not on every platform.
    if device.type == "cpu":
        from jointq_cli.kernels.cpu import CpuKernels

        return CpuKernels
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        from jointq_cli.kernels.cuda import CudaKernels

        return CudaKernels
    from jointq_cli.kernels.reference import ReferenceKernels

    return ReferenceKernels
