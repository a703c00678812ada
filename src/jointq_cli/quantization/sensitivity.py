"""What the loss rises by if one layer alone is quantised, for each of several ways to quantise it.

With the error E = W - W_q that a quantizer leaves for the inputs of the original model, the divergence of the model's
predictions grows by about tr(G E H E^T) / 2 nats per token: see `curvature`. What several layers do adds up, as long as
it is small.

    00003.json           the losses of the layers of block 3
    hidden.safetensors   see hidden_states; without hidden states when all blocks are finished
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from jointq_cli.models.layer_ref import LayerRef
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.collector import naming
from jointq_cli.quantization.curvature import Kfac, loss_error
from jointq_cli.quantization.gradients import Gradients
from jointq_cli.quantization.hessian_cache import Hessians
from jointq_cli.quantization.hidden_states import HiddenStateFile, Stream
from jointq_cli.quantization.qep import NoCorrection
from jointq_cli.quantization.quantizers.base import Prepared, Quantizer
from jointq_cli.quantization.quantizers.statistics import Statistics
from jointq_cli.quantization.settings import LoopSettings
from jointq_cli.quantization.solver import Solver
from jointq_cli.quantization.walk import Group, walk
from jointq_cli.system.distributed import SINGLE_PROCESS, Team
from jointq_cli.system.files import write_text_atomically

Losses = dict[str, list[float]]  # of the candidates of each layer, nats per token


class LossFiles:
    """The directory of one walk, finished or not."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.hidden = HiddenStateFile(directory)

    def write(self, block: int, losses: Losses) -> None:
        write_text_atomically(self.directory / f"{block:05d}.json", json.dumps(losses) + "\n")

    def read(self) -> Losses:
        """Of all layers."""
        files = sorted(self.directory.glob("*.json"))
        blocks: list[Losses] = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        return {name: losses for block in blocks for name, losses in block.items()}


def measure_losses(
    model: StreamedModel,
    windows: Tensor,
    settings: LoopSettings,
    candidates: Mapping[str, Sequence[Quantizer]],
    gradients: Gradients,
    hessians: Hessians | None,
    files: LossFiles,
    on_block: Callable[[], None],
    pause: Callable[[], None],
    team: Team = SINGLE_PROCESS,
) -> None:
    """Fills `files` from their first unfinished block on.

    windows: (windows, tokens) int64. settings: of layers that are solved for inputs of the original model, with the
    curvature of `gradients`. candidates: of each layer of these settings, by its name. hessians: where they were
    collected ahead. on_block is called after each block, pause where nothing is lost if it raises. The processes of a
    team share the windows and the rows of layers, and process 0 writes. Raises what `quantize_blocks` raises.
    """
    known = None if hessians is None else hessians.groups
    complete: dict[Stream, bool] = {"original": hessians is None}
    losses = _Candidates(settings, candidates, gradients, windows.numel(), team)
    for block in walk(model, windows, settings, files.hidden, complete, 0, pause, team, known, gradients):
        found: Losses = {}
        for group in block.groups():
            statistics = group.statistics() if hessians is None else hessians.read(group)
            for name, each in losses.of(group, statistics):
                found[name] = each
                pause()
        team.on_rank0(files.write, block.index, found)
        on_block()


@dataclass(frozen=True)
class _Candidates:
    settings: LoopSettings
    quantizers: Mapping[str, Sequence[Quantizer]]
    gradients: Gradients
    tokens: int  # of calibration
    team: Team

    def of(self, group: Group, statistics: Statistics) -> Iterator[tuple[str, list[float]]]:
        """The losses of the candidates of each layer of a group, with its name."""
        prepared: dict[str, Prepared] = {}
        for layer in group.layers:
            found = []
            with naming(layer):
                for quantizer in self.quantizers[layer.name]:
                    key = quantizer.prepare_key
                    if key not in prepared:
                        prepared[key] = quantizer.prepare(statistics.hessian, statistics.heldout)
                    found.append(self._loss(group, layer, statistics, quantizer, prepared[key]))
            yield layer.name, found

    def _loss(
        self, group: Group, layer: LayerRef, statistics: Statistics, quantizer: Quantizer, prepared: Prepared
    ) -> float:
        curvature, hessian, tokens = self.settings.curvature, statistics.hessian, statistics.tokens
        assert isinstance(curvature, Kfac)  # which `gradients` are of
        outputs = self.gradients.outputs(group.block.index, layer, hessian.device)
        stored = group.block.weight(layer)
        weight = stored.to(hessian.device, torch.float32)
        coupling = curvature.coupling(outputs)
        solver = Solver(quantizer, prepared, NoCorrection(), hessian, self.team, 0.0, tokens, coupling)
        error = weight - solver.solve(weight, stored.dtype).weight(stored.dtype).float()
        share = 1.0 if tokens is None else tokens.counts[layer.name] / self.tokens
        return 0.5 * share * loss_error(outputs, error, hessian)
