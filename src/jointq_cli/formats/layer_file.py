"""The file of one stored weight: its tensors, and its kind in the metadata. A file without a kind is uniform."""

from pathlib import Path

from safetensors import safe_open

from jointq_cli.errors import ModelError
from jointq_cli.formats import StoredWeight, UniformWeight
from jointq_cli.system.tensor_files import save_tensors


def save_layer(path: Path, weight: StoredWeight) -> None:
    """Raises OSError."""
    uniform = weight.kind == UniformWeight.kind  # without a kind its file has the bytes that it always had
    save_tensors(path, weight.to_tensors(), None if uniform else {"kind": weight.kind})


def load_layer(path: Path) -> StoredWeight:
    """Raises ModelError, naming the file, where the kind is unknown or a tensor is missing."""
    with safe_open(path, framework="pt") as file:
        kind = (file.metadata() or {}).get("kind", UniformWeight.kind)
        known = {form.kind: form for form in StoredWeight.__subclasses__()}
        if kind not in known:
            raise ModelError(f"{path}: a stored weight of kind {kind}; known are {', '.join(known)}")
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    try:
        return known[kind].from_tensors(tensors)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
