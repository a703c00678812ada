"""The hidden states that a walk through the blocks has reached, on disk, so that a stopped run continues from there."""

from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from jointq_cli.system.files import write_atomically
from jointq_cli.system.tensor_files import read_rows, save_tensors

WeightSet = Literal["original", "quantized"]
Stream = Literal["original", "quantized", "checkpoint"]
"""What hidden states have passed through: the weights of this name. Where the experts of "quantized" are given the
tokens that the original model's router sends them, "checkpoint" has the same weights and their own router, as the
checkpoint has."""
HiddenStates = dict[Stream, Tensor]  # (windows, tokens, hidden) each


class HiddenStateFile:
    """`hidden.safetensors` of a directory: what enters the first unfinished block, and how many blocks are finished.

    Writing it is the last step of a block.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._path = directory / "hidden.safetensors"

    def finished_blocks(self) -> int:
        if not self._path.exists():
            return 0
        with safe_open(self._path, framework="pt") as file:
            return int(file.metadata()["block"])

    def read(self, stream: Stream, windows: slice = slice(None)) -> Tensor:
        """(windows, tokens, hidden) in the dtype that the model computes in. Needs a finished block."""
        return read_rows(self._path, stream, windows)

    def read_as_checkpoint(self) -> Tensor:
        """What the checkpoint computes for these windows."""
        with safe_open(self._path, framework="pt") as file:
            names = file.keys()
        return self.read("checkpoint" if "checkpoint" in names else "quantized")

    def write(self, finished: int, hidden: HiddenStates) -> None:
        tensors = {str(stream): states for stream, states in hidden.items()}
        write_atomically(self._path, lambda path: save_tensors(path, tensors, {"block": str(finished)}))


def relative_error(hidden: HiddenStates) -> float:
    """|quantised - original|^2 / |original|^2."""
    original, quantized = hidden["original"].float(), hidden.get("checkpoint", hidden["quantized"]).float()
    signal = original.square().sum(dtype=torch.float64)
    error = (quantized - original).square().sum(dtype=torch.float64)
    return float(error / signal) if signal > 0 else 0.0
