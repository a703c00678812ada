"""How fast this machine multiplies, measured in a fraction of a second.

On a processor one thread is timed by its own clock, and the others are taken to be as fast: what other jobs have of the
machine is not held against it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

PATIENCE = 0.1  # seconds for each measurement
ROWS = 256
WIDEST = 1024  # larger products are not faster
TOGETHER = 0.7  # of what threads would do if they never waited for each other


@dataclass(frozen=True)
class Speeds:
    """Per second, with all threads: floating point operations of products in the dtype of the forward pass, in float32
    and in float64, and elements of a pointwise operation."""

    forward: float
    single: float
    double: float
    pointwise: float


def measure_speeds(device: torch.device, dtype: torch.dtype, hidden: int, width: int) -> Speeds:
    """hidden, width: of the model's products."""
    hidden, width = min(hidden, WIDEST), min(width, WIDEST)
    with _one_thread() as threads:
        workers = 1.0 if device.type == "cuda" or threads == 1 else TOGETHER * threads
        return Speeds(
            forward=workers * _products(device, dtype, hidden, width),
            single=workers * _products(device, torch.float32, hidden, width),
            double=workers * _products(device, torch.float64, hidden, width),
            pointwise=workers * _pointwise(device, dtype, width),
        )


@contextmanager
def _one_thread() -> Iterator[int]:
    """Inside, PyTorch computes on one thread: several would wait for each other, and that is no work. Yields how many
    there are outside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _products(device: torch.device, dtype: torch.dtype, hidden: int, width: int) -> float:
    rows = torch.ones(ROWS, hidden, device=device).to(dtype)
    columns = torch.ones(hidden, width, device=device).to(dtype)
    return 2 * ROWS * hidden * width / _seconds(device, lambda: rows @ columns)


def _pointwise(device: torch.device, dtype: torch.dtype, width: int) -> float:
    rows = torch.ones(ROWS, width, device=device).to(dtype)
    return rows.numel() / _seconds(device, lambda: torch.nn.functional.silu(rows))


def _seconds(device: torch.device, act: Callable[[], Tensor]) -> float:
    """Of the quickest `act` of some."""
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.thread_time
    act()
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < PATIENCE or best == float("inf"):
        start = clock()
        act()
        if on_gpu:
            torch.cuda.synchronize(device)
        best = min(best, max(clock() - start, 1e-9))
    return best
