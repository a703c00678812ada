"""W ~ diag(a) S1 diag(d) S2 diag(b) as it is searched, and products of the same bits on any number of threads."""

from dataclasses import dataclass

import torch
from torch import Tensor

from jointq_cli.quantization.quantizers.jointq.scaled_layer import over_tiles


@dataclass(frozen=True)
class Factors:
    """left S1 (out, rank) and right S2 (rank, in) of 1 and -1, out_scale a (out,), rank_scale d (rank,), in_scale b
    (in,); all float32."""

    left: Tensor
    right: Tensor
    out_scale: Tensor
    rank_scale: Tensor
    in_scale: Tensor

    @property
    def scaled_left(self) -> Tensor:
        """diag(a) S1."""
        return self.left * self.out_scale[:, None]

    @property
    def scaled_right(self) -> Tensor:
        """S2 diag(b)."""
        return self.right * self.in_scale

    def values(self) -> Tensor:
        """(out, in)."""
        return product(self.scaled_left * self.rank_scale, self.scaled_right)


def product(one: Tensor, other: Tensor) -> Tensor:
    """one @ other, by tiles of rows."""
    return torch.cat(over_tiles(len(one), None, one.device, lambda tile: one[tile] @ other))


def rank_one_modulus(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """u (rows,) and v (columns,) not below 0, the best rank-one approximation u v' of |matrix|."""
    size = matrix.abs()
    right = size.sum(dim=0)
    for _ in range(3):  # from the column sums, which are near
        left = product(size, (right / right.norm().clamp_min(1e-30))[:, None])[:, 0]
        right = product(size.T, (left / left.norm().clamp_min(1e-30))[:, None])[:, 0]
    length = right.norm()
    return left / left.norm().clamp_min(1e-30) * length, right / length.clamp_min(1e-30)


def signs(matrix: Tensor) -> Tensor:
    return torch.where(matrix < 0, -1.0, 1.0)
