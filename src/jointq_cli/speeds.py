"""How fast this machine multiplies, measured in a fraction of a second.

In seconds of the processor, times the threads there are: what other jobs take is not held against the machine.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PATIENCE = 0.1  # seconds for each measurement
ROWS = 512


@dataclass(frozen=True)
class Speeds:
    """Per second: floating point operations of products in the dtype of the forward pass, in float32 and in float64,
    and elements of a pointwise operation on one thread."""

    forward: float
    single: float
    double: float
    pointwise: float


def measure_speeds(device: torch.device, dtype: torch.dtype, hidden: int, width: int) -> Speeds:
    """hidden, width: of the products, as the model has them."""
    return Speeds(
        forward=_products(device, dtype, hidden, width),
        single=_products(device, torch.float32, hidden, width),
        double=_products(device, torch.float64, hidden, width),
        pointwise=_pointwise(device, dtype, width),
    )


def _products(device: torch.device, dtype: torch.dtype, hidden: int, width: int) -> float:
    rows = torch.ones(ROWS, hidden, device=device).to(dtype)
    columns = torch.ones(hidden, width, device=device).to(dtype)
    return 2 * ROWS * hidden * width / _seconds(device, lambda: rows @ columns)


def _pointwise(device: torch.device, dtype: torch.dtype, width: int) -> float:
    rows = torch.ones(ROWS, width, device=device).to(dtype)
    return rows.numel() / _seconds(device, lambda: torch.nn.functional.silu(rows))


def _seconds(device: torch.device, act: Callable[[], Tensor]) -> float:
    """Of one `act` where nothing else runs."""
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    act()
    count, began, start = 0, time.perf_counter(), clock()
    while time.perf_counter() - began < PATIENCE or not count:
        act()
        if on_gpu:
            torch.cuda.synchronize(device)
        count += 1
    return max(clock() - start, 1e-6) / count / (1 if on_gpu else torch.get_num_threads())
