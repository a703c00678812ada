"""The loops over rows that no matrix product can express, as one contract with an implementation per device.

`reference` is plain torch, correct on any device, and what the tests compare with. `cpu` is compiled by numba, `cuda`
by Triton; both are imported (and compiled, or loaded from a cache) on first use. `hadamard` is separate: Hadamard
matrices and products with them. Models, settings and files have no place here; the caller owns every buffer that is
written to.
"""

import importlib.util
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

TOLERANCE = 1e-5  # of a step's energy s^2 R_jj: smaller gains count as rounding errors
COLUMN_SWEEPS = 50  # of `column_flips` over one column, which mostly ends after three
K_ROUNDS = 8  # of `k_flip_search`, which mostly ends after two
CANCELLED = 8192  # machine epsilons of sum_j R_jj z_j^2: an energy z R z below that is too inexact to divide by


@dataclass(frozen=True)
class Box:
    """The constraint on the levels z = code - zero_point of one group: from `first` to `last`, at most `span` apart.

    It replaces the zero-point, which can be chosen afterwards: any window of `span` + 1 levels that covers them all.
    Levels are `first` plus integers: half-integers if that is one. Then none is 0, and first is -last.
    """

    first: float
    last: float
    span: float

    def most_steps(self, columns: int) -> int:
        """An upper bound on the steps of a search, which ends long before it unless its arithmetic goes wrong."""
        return (int(self.span) + 16) * columns

    @property
    def fraction(self) -> float:
        """Of levels: 0 or 0.5."""
        return self.first - math.floor(self.first)


@dataclass(frozen=True)
class Rounding:
    """The floating-point format of stored scales."""

    digits: int  # bits of the mantissa after the leading one
    min_exponent: int  # of normal numbers
    least: float  # the least value allowed


@dataclass(frozen=True)
class KLimits:
    """The values that the integers of one block of a K grid may have: levels z = code - zero from `first` to `last`,
    scales sc from `least_scale` to `last_scale` but for 0, mins mn from 0 to `last_min`."""

    first: int
    last: int
    least_scale: int
    last_scale: int
    last_min: int

    @property
    def box(self) -> Box:
        return Box(self.first, self.last, self.last - self.first)


class Kernels(Protocol):
    """The contract. Vectors are rows: z R z stands for z R z^T, and R is symmetric and positive semidefinite."""

    @staticmethod
    def clip_search(values: Tensor, zero_points: Tensor, scales: Tensor, lowest: int, highest: int) -> Tensor:
        """The candidate grid that rounds each group best: argmin over k of sum_j |w_j - nearest level|^2.4.

        The exponent and the search over shrunk ranges are those of GPTQ's released code (quant.py, `mse`). Candidate k
        of a group has scales[:, k] and zero_points[:, k]. The first of equals wins.

        values (groups, columns); zero_points and scales (groups, candidates); all float32 and contiguous. Returns
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
        """GPTQ's inner loop (arXiv 2210.17323, algorithm 1): rounds the columns of `span` in turn and compensates each
        error in the following columns of `block`.

        For j in span: a = nearest code of work[:, j]; e = (work[:, j] - value of a) / upper[j, j]; work[:, k] -= e *
        upper[j, k] for k in block after j. Writes codes[:, j], errors[:, j - block.start], work.

        work (rows, in) float32; codes (rows, in) uint8 or int8; errors (rows, >= len(block)) float32; upper (in, in)
        float32 row-major, the upper Cholesky factor of H^-1; scale and zero_point float32 (rows, groups);
        column_groups (in,) int64.
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
        """Chooses the scale s among widest * (1 - 0.8 k / steps), k < steps, with the least sum_j weights_j (w_j - s
        z_j)^2, z being the nearest levels; writes both.

        The lowest level of the window represents about `low`. The first of equals wins. values (rows, d), weights (d,)
        >= 0, low (rows,) <= 0, widest (rows,) > 0; writes levels (rows, d) and scale (rows,). One dtype, all
        contiguous.
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
        """JointQ's local search: levels z and scale s of one group of columns, for every row independently.

        Minimises f(s, z) = s^2 z R z - 2 s h z by coordinate descent, in two phases.

        1. With the scale profiled out: for given z the best scale is s = q / o with q = h z and o = z R z, and then
           f = -q^2 / o. Takes the best of all single steps of z_j by 1 along the sign of h_j - s (z R)_j, and of the
           steps z +- (1, ..., 1), until none gains. Levels with q <= 0, for which no positive scale helps, start at 0;
           half-integers, at -z.
           No step leads to an o below CANCELLED; a row that starts there keeps its input scale.
        2. At the scale rounded as it will be stored: single steps, until none gains.

        TOLERANCE of its energy is subtracted from a step's gain, and the first of equal gains wins. With `guarded`, a
        row keeps its input unless f falls. Without, the input scale remains only where phase 1 finds none, as for
        levels that are all 0.

        correlation h (rows, d); metric R (d, d); products (rows, d) = z R, overwritten; levels (rows, d) and scale
        (rows,) > 0, both updated in place. All contiguous and of one dtype, float32 or float64. Returns the number of
        steps (rows,) int64, 0 where nothing changed, and by how much f fell (rows,) float64.
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

        Iteration i takes the single step with the largest gain + temperature * s^2 R_jj * noise[i, j], if that sum is
        positive, at the input scale and in the same direction as there. At the end the best scale for the levels is
        rounded and written, unless o is below CANCELLED. noise (steps, d) of levels' dtype, the same for all rows, so
        that a row's result does not depend on the other rows.
        """

    @staticmethod
    def k_flip_search(
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
        """The local search in one block of a K grid, for every row independently.

        Minimises f = y R y - 2 h y with y = d sc z - dmin mn by turns: steps of z_j by 1, as in phase 2 of
        `flip_search`; then the sc and mn that are best for these levels, of the integers next to the least-squares
        solution; until neither gains, at most K_ROUNDS times. f never rises.

        correlation h (rows, c); metric R (c, c); products (rows, c) = z R, overwritten; levels z (rows, c), scales sc
        and mins mn (rows,), integers, updated in place; d and dmin (rows,) > 0. All contiguous and of one dtype,
        float32 or float64. Returns the number of steps (rows,) int64, and by how much f fell (rows,) float64.
        """

    @staticmethod
    def column_flips(products: Tensor, metric: Tensor, coupling: Tensor, signs: Tensor, scale: Tensor) -> Tensor:
        """Flips of signs in one column after the other, of a sum over columns l and m of b_l b_m H_lm s_l G s_m - 2 b_l
        s_l h_l: those which lower it, until none does, at most COLUMN_SWEEPS times over a column.

        A flip of s_lj changes the column b_l s_l by t = -2 b_l s_lj in row j, and the sum by t^2 G_jj H_ll - 2 t M_lj
        with M = h - H (b s) G, half of the negative gradient. It must gain TOLERANCE of t^2 G_jj H_ll.

        products M (columns, rank), updated; metric G (rank, rank) symmetric; coupling H (columns, columns); signs s
        (columns, rank) of 1 and -1, updated in place; scale b (columns,) >= 0. float32, contiguous. Returns U (columns,
        rank), the change of the columns times G: others outside of these have M less their H times U.
        """


def for_device(device: torch.device) -> type[Kernels]:
    """The implementation for tensors on `device`."""
    # Imported here: numba and Triton take half a second each, and `jointq --help` or a plain RTN needs neither. Triton
    # comes with the CUDA builds of torch, but not on every platform.
    if device.type == "cpu":
        from jointq_cli.kernels.cpu import CpuKernels

        return CpuKernels
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        from jointq_cli.kernels.cuda import CudaKernels

        return CudaKernels
    from jointq_cli.kernels.reference import ReferenceKernels

    return ReferenceKernels
