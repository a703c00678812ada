"""A layer's rows in tiles, which a CPU solves in parallel.

On a CPU each tile is solved by one thread: with torch's own threads the bits of a product would depend on their number.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

_CPU_ROWS = 256  # the errors of a tile fit in cache


def over_tiles(rows: int, batch_size: int | None, device: torch.device, solve: Callable[[slice], T]) -> list[T]:
    """The results of `solve` on consecutive slices of at most `batch_size` rows.

    batch_size None: all rows at once on a GPU, tiles of 256 on a CPU.
    """
    size = batch_size or (_CPU_ROWS if device.type == "cpu" else rows)
    tiles = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    if device.type != "cpu":
        return [solve(tile) for tile in tiles]
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(solve, tiles))
    finally:
        torch.set_num_threads(threads)  # new threads inherit what the pool's threads have set
