"""The Hessians of the original model, collected once for any number of quantizers.

    00003-1.safetensors   the statistics of group 1 of block 3, with the names of its layers
    hidden.safetensors    see hidden_states; without hidden states when all blocks are finished

They have the bits of those that the loop collects where layers are solved for inputs of the original model.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.accumulator import packed, packed_size, unpacked
from jointq_cli.quantization.gradients import Gradients
from jointq_cli.quantization.hidden_states import HiddenStateFile
from jointq_cli.quantization.layer_groups import Run
from jointq_cli.quantization.quantizers.statistics import ExpertTokens, HeldOut, Statistics
from jointq_cli.quantization.settings import LoopSettings
from jointq_cli.quantization.walk import BlockVisit, Group, walk
from jointq_cli.system.distributed import SINGLE_PROCESS, Team
from jointq_cli.system.files import write_atomically
from jointq_cli.system.tensor_files import save_tensors

_LAYERS = "layers"  # key of the metadata


def bytes_needed(model: StreamedModel, settings: LoopSettings) -> int:
    """Their size on disk at most: every layer is counted, because shapes do not show which layers share an input."""
    linear = model.linear_layers()
    elements = sum(packed_size(linear[name].in_features) for name in settings.layers)
    return 8 * elements * (2 if settings.heldout else 1)


def collect_hessians(
    model: StreamedModel,
    windows: Tensor,
    settings: LoopSettings,
    hessians: "Hessians",
    on_block: Callable[[], None],
    pause: Callable[[], None],
    team: Team = SINGLE_PROCESS,
    gradients: Gradients | None = None,
) -> None:
    """Fills `hessians` from its first unfinished block on, in one walk through the original model.

    windows: (windows, tokens) int64. gradients: by which tokens are weighted too. on_block is called after each block,
    pause after each batch, where it may raise. The processes of a team share the windows, and process 0 writes. Raises
    ResourceError where they find different numbers of finished blocks.
    """
    for block in walk(model, windows, settings, hessians.hidden, {"original": True}, 0, pause, team, None, gradients):
        _collect_block(block, hessians, team)
        on_block()


def _collect_block(block: BlockVisit, hessians: "Hessians", team: Team) -> None:
    for group in block.groups():
        team.on_rank0(hessians.write, group, group.statistics())


class Hessians:
    """The directory of one walk, finished or not."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.hidden = HiddenStateFile(directory)

    def write(self, group: Group, statistics: Statistics) -> None:
        tensors = {"hessian": packed(statistics.hessian)}
        if statistics.heldout is not None:
            tensors["held_hessian"] = packed(statistics.heldout.hessian)
            tensors["held_share"] = torch.tensor(statistics.heldout.share, dtype=torch.float64)
        if statistics.tokens is not None:
            counts = [statistics.tokens.counts[layer.name] for layer in group.layers]
            tensors["tokens"] = torch.tensor(counts)
            tensors["block_share"] = torch.tensor(statistics.tokens.block_share, dtype=torch.float64)
        layers = {_LAYERS: json.dumps([layer.name for layer in group.layers])}
        write_atomically(self._path(group.block.index, group.number), lambda path: save_tensors(path, tensors, layers))

    def groups(self, block: int) -> Run:
        """The names of the layers of each group of a block."""
        groups: Run = []
        while (path := self._path(block, len(groups))).exists():
            with safe_open(path, framework="pt") as file:
                groups.append(json.loads(file.metadata()[_LAYERS]))
        return groups

    def read(self, group: Group) -> Statistics:
        """On the device of the group's block."""
        size, device = group.layers[0].in_features, group.block.model.device
        tensors = load_file(self._path(group.block.index, group.number))
        hessian = unpacked(tensors["hessian"].to(device), size)
        heldout = tokens = None
        if "held_hessian" in tensors:
            held = unpacked(tensors["held_hessian"].to(device), size)
            heldout = HeldOut(held, tensors["held_share"].item())
        if "tokens" in tensors:
            names = [layer.name for layer in group.layers]
            counts = dict(zip(names, map(int, tensors["tokens"]), strict=True))
            tokens = ExpertTokens(counts, tensors["block_share"].item())
        return Statistics(hessian, heldout=heldout, tokens=tokens)

    def _path(self, block: int, group: int) -> Path:
        return self.directory / f"{block:05d}-{group}.safetensors"
