"""The file of one stored weight: its tensors, and its kind in the metadata. A file without a kind is uniform."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from jointq_cli.errors import ModelError
from jointq_cli.formats import StoredWeight, UniformWeight
from jointq_cli.models.checkpoint import DTYPES
from jointq_cli.system.tensor_files import save_tensors

MOST_SETTINGS = 4  # elements of a tensor that holds settings, such as `format` of a uniform weight


def save_layer(path: Path, weight: StoredWeight) -> None:
    """Raises OSError."""
    # Uniform weights are written without a kind, with the same bytes as before there were others.
    save_tensors(path, weight.to_tensors(), None if weight.kind == UniformWeight.kind else {"kind": weight.kind})


def load_layer(path: Path) -> StoredWeight:
    """Raises ModelError, naming the file, where the kind is unknown or a tensor is missing."""
    return _load(path, lambda kind, file, name: file.get_tensor(name).clone())


def load_form(path: Path) -> StoredWeight:
    """The stored weight without its values: tensors are on the meta device, but for those with a handful of settings
    and the kind's `form_tensors`.

    Raises ModelError as `load_layer` does.
    """
    return _load(path, _shape_of)


def _shape_of(kind: type[StoredWeight], file: Any, name: str) -> Tensor:
    stored = file.get_slice(name)
    if name in kind.form_tensors or math.prod(stored.get_shape()) <= MOST_SETTINGS:
        settings: Tensor = file.get_tensor(name).clone()
        return settings
    return torch.empty(stored.get_shape(), dtype=DTYPES[stored.get_dtype()], device="meta")


def _load(path: Path, read: Callable[[type[StoredWeight], Any, str], Tensor]) -> StoredWeight:
    with safe_open(path, framework="pt") as file:
        kind = (file.metadata() or {}).get("kind", UniformWeight.kind)
        known = {form.kind: form for form in StoredWeight.__subclasses__()}
        if kind not in known:
            raise ModelError(f"{path}: a stored weight of kind {kind}; known are {', '.join(known)}")
        tensors = {name: read(known[kind], file, name) for name in file.keys()}  # noqa: SIM118
    try:
        return known[kind].from_tensors(tensors)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
