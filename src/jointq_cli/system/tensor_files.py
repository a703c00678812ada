"""save_tensors, read_rows, file_hash, file_hashes: from checkpoint.py."""

import errno
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes one safetensors file. Equal tensors give equal bytes: safetensors orders them itself.

    metadata: one pair at most, since safetensors writes several in no fixed order. Raises OSError.
    """
    ready = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    try:
        save_file(ready, path, dict(metadata or {"format": "pt"}))
    except SafetensorError as error:
        # safetensors wraps the system's error in its text; give it back its number.
        found = re.search(r"os error (\d+)", str(error))
        raise OSError(int(found[1]) if found else errno.EIO, str(error), str(path)) from error
    path.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read


def read_rows(path: Path, name: str, rows: slice) -> torch.Tensor:
    """Some rows, or none, of one tensor of a safetensors file, copied off it."""
    with safe_open(path, framework="pt") as file:
        kept = file.get_slice(name)
        start, stop, _ = rows.indices(kept.get_shape()[0])
        found: torch.Tensor = kept[start:stop] if start < stop else kept[:1][:0]  # which refuses a slice of nothing
        return found.clone()


def file_hashes(root: Path, files: Iterable[Path]) -> dict[str, str]:
    """sha256 of each file's bytes by its path below `root`."""
    listed = list(files)
    with ThreadPoolExecutor() as pool:
        digests = pool.map(file_hash, listed)
        return {file.relative_to(root).as_posix(): digest for file, digest in zip(listed, digests, strict=True)}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
