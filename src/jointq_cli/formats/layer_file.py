"""save_layer, load_layer: from workspace.py."""

from pathlib import Path

from safetensors import safe_open

from jointq_cli.formats.uniform import QuantizedWeight
from jointq_cli.system.tensor_files import save_tensors


def save_layer(path: Path, weight: QuantizedWeight) -> None:
    save_tensors(path, weight.to_tensors())


def load_layer(path: Path) -> QuantizedWeight:
    with safe_open(path, framework="pt") as file:
        return QuantizedWeight.from_tensors({name: file.get_tensor(name).clone() for name in file.keys()})  # noqa: SIM118
