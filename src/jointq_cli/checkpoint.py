"""A Hugging Face checkpoint directory as tensors by name, read one block at a time and never whole.

Knows safetensors files, their index and the small files beside them. Knows nothing of modules, and loads no pickle.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from jointq_cli.errors import ModelError, NumericsError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# What belongs to a model beside its weights. A README is left out: it describes the original.
COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # safetensors' names


@dataclass(frozen=True)
class TensorInfo:
    """What a shard's header says of one tensor."""

    file: Path
    dtype: str  # safetensors' name, such as BF16
    shape: tuple[int, ...]


class Checkpoint:
    """A directory with config.json and safetensors weights.

    Opening reads the config and the shards' headers only. Raises ModelError when something is missing, half-downloaded
    or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = _read_config(directory)
        self.tensors = _read_headers(directory)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors in the dtype they are stored in, copied off the file.

        Raises ModelError for a name that is not there, NumericsError for one that holds NaN or Inf.
        """
        read: dict[str, torch.Tensor] = {}
        for file, wanted in self._by_file(names).items():
            with safe_open(file, framework="pt") as shard:
                for name in wanted:
                    # Off the memory map: a view into it is neither aligned as torch's own memory nor counted as ours.
                    tensor = shard.get_tensor(name).clone()
                    _check_finite(name, tensor, file)
                    read[name] = tensor
        return read

    def check_finite(self) -> None:
        """Reads every tensor once. Raises NumericsError for the first that holds NaN or Inf."""
        for name in self.tensors:
            self.read([name])

    @cached_property
    def content_hash(self) -> str:
        """sha256 over the config and every weight file: the model's identity, wherever it lies."""
        files = sorted({info.file for info in self.tensors.values()})
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(file_hash, [self.directory / "config.json", *files]))
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    @cached_property
    def dtype(self) -> torch.dtype:
        """The floating dtype that most of the weights are stored in."""
        sizes: Counter[str] = Counter()
        for info in self.tensors.values():
            if info.dtype in DTYPES:
                sizes[info.dtype] += math.prod(info.shape)
        return DTYPES[sizes.most_common(1)[0][0]] if sizes else torch.float32

    @cached_property
    def parameters(self) -> int:
        return sum(math.prod(info.shape) for info in self.tensors.values())

    @cached_property
    def weight_bytes(self) -> int:
        return sum(file.stat().st_size for file in {info.file for info in self.tensors.values()})

    def _by_file(self, names: Iterable[str]) -> dict[Path, list[str]]:
        by_file: dict[Path, list[str]] = {}
        for name in names:
            if name not in self.tensors:
                raise ModelError(f"{self.directory}: holds no tensor {name}, which its config.json asks for")
            by_file.setdefault(self.tensors[name].file, []).append(name)
        return by_file


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


def write_index(directory: Path, shards: list[Path]) -> None:
    """Writes the index over `shards`, files of `directory` named in the order of the model."""
    weight_map: dict[str, str] = {}
    total = 0
    for shard in shards:
        with safe_open(shard, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                weight_map[name] = shard.name
                total += opened.get_tensor(name).nbytes
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_companions(source: Path, target: Path, *, code: bool) -> None:
    """Copies config, generation config, tokenizer and the like; Python files only when remote code was allowed."""
    for pattern in (*COMPANIONS, "*.py") if code else COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.name != INDEX and file.is_file():
                shutil.copyfile(file, target / file.name)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not directory.is_dir():
        raise ModelError(f"model.path={directory}: no such directory")
    if not path.is_file():
        raise ModelError(f"{path}: missing, so this is no Hugging Face checkpoint")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return config


def _read_headers(directory: Path) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in _weight_files(directory):
        tensors.update(_read_header(file))
    return tensors


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index}: not a safetensors index ({error})") from error
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise ModelError(
                f"{index}: names {len(missing)} of {len(names)} shards that are not there, {missing[0]} first; "
                "half-downloaded?"
            )
        return [directory / name for name in names]
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if any((directory / name).exists() for name in PICKLES):
        raise ModelError(f"{directory}: has its weights as pickle only, which is never loaded; convert to safetensors")
    raise ModelError(f"{directory}: has neither {SINGLE} nor {INDEX}")


def _read_header(file: Path) -> dict[str, TensorInfo]:
    try:
        with safe_open(file, framework="pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
            return {name: TensorInfo(file, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: damaged or half-downloaded ({error})") from error


def _check_finite(name: str, tensor: torch.Tensor, file: Path) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise NumericsError(f"{file}: tensor {name} holds {bad} values that are NaN or Inf")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
