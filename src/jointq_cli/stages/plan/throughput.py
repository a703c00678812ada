"""How fast this machine computes, measured in a fraction of a second.

On a CPU one thread is measured in its own CPU time, so that other jobs on the machine do not count, and the result is
extrapolated to all threads.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

MEASURED_SECONDS = 0.1  # of each operation
ROWS = 256  # of the left factor
WIDEST = 1024  # larger products are not faster
PARALLEL_EFFICIENCY = 0.7  # of several threads


@dataclass(frozen=True)
class Speeds:
    """Per second and with all threads: floating-point operations of matrix products, and elements of a pointwise
    operation."""

    forward: float  # products in the dtype of the forward pass
    single: float  # products in float32
    double: float  # products in float64
    pointwise: float


def measure_speeds(device: torch.device, dtype: torch.dtype, hidden: int, width: int) -> Speeds:
    """hidden, width: hidden size of the model and input size of its widest layer."""
    hidden, width = min(hidden, WIDEST), min(width, WIDEST)
    with _one_thread() as threads:
        workers = 1.0 if device.type == "cuda" or threads == 1 else PARALLEL_EFFICIENCY * threads
        return Speeds(
            forward=workers * _products(device, dtype, hidden, width),
            single=workers * _products(device, torch.float32, hidden, width),
            double=workers * _products(device, torch.float64, hidden, width),
            pointwise=workers * _pointwise(device, dtype, width),
        )


@contextmanager
def _one_thread() -> Iterator[int]:
    """Inside, PyTorch computes on one thread: with several, waiting would count as CPU time. Yields the number of
    threads outside."""
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


def _seconds(device: torch.device, operation: Callable[[], Tensor]) -> float:
    """Of the fastest of several calls."""
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.thread_time
    operation()
    best, first = float("inf"), time.perf_counter()
    while time.perf_counter() - first < MEASURED_SECONDS or best == float("inf"):
        start = clock()
        operation()
        if on_gpu:
            torch.cuda.synchronize(device)
        best = min(best, max(clock() - start, 1e-9))
    return best
