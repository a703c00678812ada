"""The Hessians of the original model, collected ahead of quantising, so that any number of quantizers can share them.

    00003-1.safetensors   what was collected for group 1 of block 3
    hidden.safetensors    the hidden states that enter the first unfinished block, and that block's number; empty in the
                          end

Every file is renamed into place when whole, and a stopped walk continues at its first unfinished block. They have the
bits of those that `blockwise` collects itself where layers are solved for the inputs of the original model. Knows no
quantizers.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.accumulator import packed, packed_size, unpacked
from jointq_cli.quantization.block import Block, Layer, Stream
from jointq_cli.quantization.collector import Collector
from jointq_cli.quantization.quantizers.statistics import HeldOut, Statistics
from jointq_cli.quantization.resumable_forward import stops
from jointq_cli.quantization.settings import LoopSettings
from jointq_cli.system.distributed import SINGLE_PROCESS, Team
from jointq_cli.system.files import write_atomically
from jointq_cli.system.tensor_files import read_rows, save_tensors


def bytes_needed(model: StreamedModel, plan: LoopSettings) -> int:
    """What they take on a disk at most: layers that share an input are counted one by one, for shapes do not tell."""
    linear = model.linear_layers()
    elements = sum(packed_size(linear[name].in_features) for name in plan.layers)
    return 8 * elements * (2 if plan.heldout else 1)


def collect_hessians(
    model: StreamedModel,
    windows: Tensor,
    plan: LoopSettings,
    hessians: "Hessians",
    on_block: Callable[[], None],
    pause: Callable[[], None],
    team: Team = SINGLE_PROCESS,
) -> None:
    """Walks through the original model once, and leaves the moments of every group's input in `hessians`.

    windows: (windows, tokens) int64. on_block is called after each block, pause after each batch, where it may raise.
    The windows are shared out between the processes of the team, whose leader writes. Raises ResourceError where they
    do not find the same position.
    """
    collector = Collector(plan, len(windows.split(plan.batch)), model.device, pause, team)
    start = team.require_equal(hessians.directory, "finished blocks", hessians.position())
    hidden = _entering(model, windows, plan, hessians, team)
    for index in range(start, len(model)):
        tensors = model.block_tensors(index)
        with model.block(index, tensors):
            block = Block(model, index, tensors, plan.layers)
            structure = block.structure(team.broadcast(hidden[: plan.batch].cpu()).to(model.device))
            stream = Stream(block, "original", hidden, plan.batch, collector.waiting(structure.groups, hidden))
            writers = structure.writers if plan.follows_residual else {}
            with stops([[layer.module for layer in group] for group in structure.groups], writers):
                for number in range(len(structure.groups)):
                    team.on_rank0(hessians.keep, index, number, collector.collect(structure, number, stream))
            hidden = stream.finish(pause)
        team.on_rank0(hessians.finish_block, index, team.gather_rows(hidden if index + 1 < len(model) else hidden[:0]))
        on_block()


def _entering(model: StreamedModel, windows: Tensor, plan: LoopSettings, hessians: "Hessians", team: Team) -> Tensor:
    """This process's hidden states (windows, tokens, hidden) at the first unfinished block."""
    own = team.part(len(windows), plan.batch)
    if not hessians.position():
        return model.embed_all(windows, plan.batch, own)
    model.record_calls(windows, plan.batch)
    return hessians.hidden(own).to(model.device)


class Hessians:
    """The directory of one walk, finished or under way."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._hidden = directory / "hidden.safetensors"

    def position(self) -> int:
        """The first unfinished block."""
        if not self._hidden.exists():
            return 0
        with safe_open(self._hidden, framework="pt") as file:
            return int(file.metadata()["block"])

    def hidden(self, own: slice) -> Tensor:
        """The hidden states of these windows at `position`. Only there once a block has been finished."""
        return read_rows(self._hidden, "hidden", own)

    def finish_block(self, index: int, hidden: Tensor) -> None:
        """Keeps the hidden states that enter the next block."""
        write_atomically(self._hidden, lambda path: save_tensors(path, {"hidden": hidden}, {"block": str(index + 1)}))

    def keep(self, block: int, group: int, statistics: Statistics) -> None:
        tensors = {"hessian": packed(statistics.hessian)}
        if statistics.heldout is not None:
            tensors["held_hessian"] = packed(statistics.heldout.hessian)
            tensors["held_share"] = torch.tensor(statistics.heldout.share, dtype=torch.float64)
        write_atomically(self._group(block, group), lambda path: save_tensors(path, tensors))

    def read(self, block: int, group: int, layer: Layer, device: torch.device) -> Statistics:
        """What was kept for a group of layers, of which `layer` is one."""
        size = layer.module.in_features
        tensors = load_file(self._group(block, group))
        hessian = unpacked(tensors["hessian"].to(device), size)
        if "held_hessian" not in tensors:
            return Statistics(hessian)
        held = unpacked(tensors["held_hessian"].to(device), size)
        return Statistics(hessian, heldout=HeldOut(held, tensors["held_share"].item()))

    def _group(self, block: int, group: int) -> Path:
        return self.directory / f"{block:05d}-{group}.safetensors"
