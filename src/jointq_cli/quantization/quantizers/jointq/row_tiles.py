"""A layer's rows in tiles that are solved one by one, in parallel on a CPU.

Knows rows and threads; knows nothing of what is done to a tile. On a CPU each tile is one thread's: torch's own threads
would make a product's bits depend on how many there are.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

_CPU_ROWS = 256  # errors of a tile stay in cache


def over_tiles(rows: int, batch_size: int | None, device: torch.device, solve: Callable[[slice], T]) -> list[T]:
    """What `solve` gives for slices of at most `batch_size` rows that cover them all, in order.

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
        torch.set_num_threads(threads)  # what a pool's thread sets, all threads that are yet to come inherit
