"""The mean squares of the inputs of layers, which a run keeps for importance matrices of other quantisers.

importance/00003-1.safetensors   those of group 1 of block 3, with the names of its layers
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from jointq_cli.system.files import write_atomically
from jointq_cli.system.tensor_files import save_tensors

_TENSOR, _ORIGIN = "mean_square", "origin"


@dataclass(frozen=True, eq=False)
class Importance:
    """mean_squares: (in,) float32 by layer, the diagonals of the Hessians that the run solved with, in which tokens
    count by their weights; zeros where no token reached the layer. windows, seqlen: of the calibration tokens."""

    mean_squares: Mapping[str, Tensor]
    windows: int
    seqlen: int


def save_importance(
    directory: Path, block: int, group: int, layers: Sequence[str], hessian: Tensor, windows: Sequence[int]
) -> None:
    """hessian (in, in): that these layers share. windows: the shape of the calibration tokens."""
    origin = {_ORIGIN: json.dumps({"layers": list(layers), "windows": list(windows)})}
    tensors = {_TENSOR: hessian.diagonal().float()}
    path = directory / f"{block:05d}-{group}.safetensors"
    write_atomically(path, lambda scratch: save_tensors(scratch, tensors, origin))


def load_importance(directory: Path) -> Importance:
    """Of all groups of a run; without layers where the directory has none."""
    found: dict[str, Tensor] = {}
    windows = seqlen = 0
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            origin = json.loads(file.metadata()[_ORIGIN])
            windows, seqlen = origin["windows"]
            found |= dict.fromkeys(origin["layers"], file.get_tensor(_TENSOR))
    return Importance(found, windows, seqlen)
