"""The loop of `Kernels.column_flips`, compiled by numba. tolerance: TOLERANCE, an argument for numba's cache."""

from typing import Any

import numpy as np

from jointq_cli.kernels.compiled import compiled


@compiled
def column_flips(
    products: Any, metric: Any, coupling: Any, signs: Any, scale: Any, change: Any, tolerance: Any, sweeps: int
) -> None:
    columns, rank = products.shape
    two = np.float32(2)
    for c in range(columns):
        m, s, u = products[c], signs[c], change[c]
        for _ in range(sweeps):
            moved = False
            for j in range(rank):
                step = -two * s[j] * scale[c]
                energy = step * step * metric[j, j] * coupling[c, c]
                if two * step * m[j] - energy > tolerance * energy:
                    moved = True
                    s[j] = -s[j]
                    row, along = metric[j], step * coupling[c, c]
                    for i in range(rank):
                        m[i] -= along * row[i]
                        u[i] += step * row[i]
            if not moved:
                break
        for q in range(c + 1, columns):
            along = coupling[c, q]
            for i in range(rank):
                products[q, i] -= along * u[i]
