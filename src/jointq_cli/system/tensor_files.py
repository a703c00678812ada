"""Writing safetensors files with reproducible bytes, and reading a few rows of one tensor."""

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes one safetensors file; tensors may be on any device. Equal tensors give equal bytes in any order of names.

    metadata: at most one pair, since safetensors writes several in no fixed order. Raises OSError.
    """
    ready = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    try:
        save_file(ready, path, dict(metadata or {"format": "pt"}))
    except SafetensorError as error:
        # safetensors puts the number of the system's error into its text only.
        found = re.search(r"os error (\d+)", str(error))
        raise OSError(int(found[1]) if found else errno.EIO, str(error), str(path)) from error
    path.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner can read


def read_rows(path: Path, name: str, rows: slice) -> torch.Tensor:
    """A slice of the first dimension of tensor `name`, possibly empty, as a copy in memory on the CPU."""
    with safe_open(path, framework="pt") as file:
        stored = file.get_slice(name)
        start, stop, _ = rows.indices(stored.get_shape()[0])
        found: torch.Tensor = stored[start:stop] if start < stop else stored[:1][:0]  # it refuses an empty slice
        return found.clone()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
