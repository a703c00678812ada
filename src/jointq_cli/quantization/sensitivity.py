"""What the loss rises by if one layer alone is quantised, for each of several ways to quantise it.

With the error E = W - W_q that a quantizer leaves for the inputs of the original model, the divergence of the model's
predictions grows by about half the mean over tokens of (g^T E x)^2, with the gradients g for sampled labels that
`gradients` has (the Fisher information of the weights in the direction E), or, less exactly, by tr(G E H E^T) / 2: see
`curvature`. What several layers do adds up, as long as it is small.

    00003.json           the losses of the layers of block 3
    hidden.safetensors   see hidden_states; without hidden states when all blocks are finished
    solved/              for the Fisher information: the candidates of all layers, until all losses are known
    fisher/              the pass of the gradients, likewise
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from jointq_cli.formats.base import StoredWeight
from jointq_cli.formats.layer_file import load_layer, save_layer
from jointq_cli.models.layer_ref import LayerRef, layer_refs
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.collector import naming
from jointq_cli.quantization.curvature import Kfac, loss_error
from jointq_cli.quantization.gradients import Gradients, LayerSums, collect_gradients
from jointq_cli.quantization.hessian_cache import Hessians
from jointq_cli.quantization.hidden_states import HiddenStateFile, Stream
from jointq_cli.quantization.qep import NoCorrection
from jointq_cli.quantization.quantizers.base import Prepared, Quantizer
from jointq_cli.quantization.quantizers.statistics import Statistics
from jointq_cli.quantization.settings import LoopSettings
from jointq_cli.quantization.solver import LayerSolution, Solver
from jointq_cli.quantization.walk import Group, walk
from jointq_cli.system.distributed import SINGLE_PROCESS, Team
from jointq_cli.system.files import write_atomically, write_text_atomically

Losses = dict[str, list[float]]  # of the candidates of each layer, nats per token


class LossFiles:
    """The directory of one walk, finished or not."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.hidden = HiddenStateFile(directory)
        self.fisher = directory / "fisher"
        self._solved = directory / "solved"

    def write_solved(self, layer: str, number: int, weight: StoredWeight) -> None:
        self._solved.mkdir(exist_ok=True)
        write_atomically(self._candidate(layer, number), lambda path: save_layer(path, weight))

    def read_solved(self, layer: str, number: int) -> StoredWeight:
        return load_layer(self._candidate(layer, number))

    def forget(self) -> None:
        """What is of no use once all losses are written."""
        for folder in (self._solved, self.fisher):
            shutil.rmtree(folder, ignore_errors=True)

    def _candidate(self, layer: str, number: int) -> Path:
        return self._solved / f"{layer}.{number}.safetensors"

    def write(self, block: int, losses: Losses) -> None:
        write_text_atomically(self.directory / f"{block:05d}.json", json.dumps(losses) + "\n")

    def written(self) -> int:
        """Of how many blocks."""
        return len(self._written())

    def read(self) -> Losses:
        """Of all layers."""
        blocks: list[Losses] = [json.loads(file.read_text(encoding="utf-8")) for file in self._written()]
        return {name: losses for block in blocks for name, losses in block.items()}

    def _written(self) -> list[Path]:
        """In the order of the blocks. The store adds a .json of its own."""
        return sorted(self.directory.glob("[0-9]*.json"))


Keep = Callable[[Group, LayerRef, Statistics, Sequence[LayerSolution]], None]


@dataclass(frozen=True)
class CandidateWalk:
    """Solves the candidates of all layers, block after block.

    windows: (windows, tokens) int64. settings: of layers that are solved for inputs of the original model. candidates:
    of each layer of these settings, by its name. gradients: where the curvature of the settings or the measure needs
    them. hessians: where they were collected ahead. pause: called where nothing is lost if it raises. The processes of
    a team share the windows and the rows of layers, and process 0 writes.
    """

    model: StreamedModel
    windows: Tensor
    settings: LoopSettings
    candidates: Mapping[str, Sequence[Quantizer]]
    gradients: Gradients | None
    hessians: Hessians | None
    files: LossFiles
    pause: Callable[[], None]
    team: Team = SINGLE_PROCESS

    def solve(self, keep: Keep) -> Iterator[int]:
        """Solves the unfinished blocks, calls `keep` with the solutions of each layer, and yields the index of each
        block after that. Raises what `quantize_blocks` raises."""
        hessians, pause = self.hessians, self.pause
        known = None if hessians is None else hessians.groups
        complete: dict[Stream, bool] = {"original": hessians is None}
        for block in walk(
            self.model,
            self.windows,
            self.settings,
            self.files.hidden,
            complete,
            0,
            pause,
            self.team,
            known,
            self.gradients,
        ):
            for group in block.groups():
                statistics = group.statistics() if hessians is None else hessians.read(group)
                for layer, solved in self._solved(group, statistics):
                    keep(group, layer, statistics, solved)
                    pause()
            yield block.index

    def _solved(self, group: Group, statistics: Statistics) -> Iterator[tuple[LayerRef, list[LayerSolution]]]:
        prepared: dict[str, Prepared] = {}
        for layer in group.layers:
            found = []
            with naming(layer):
                for quantizer in self.candidates[layer.name]:
                    key = quantizer.prepare_key
                    if key not in prepared:
                        prepared[key] = quantizer.prepare(statistics.hessian, statistics.heldout)
                    found.append(self._candidate(group, layer, statistics, quantizer, prepared[key]))
            yield layer, found

    def _candidate(
        self, group: Group, layer: LayerRef, statistics: Statistics, quantizer: Quantizer, prepared: Prepared
    ) -> LayerSolution:
        curvature, hessian, coupling = self.settings.curvature, statistics.hessian, None
        if self.gradients is not None and isinstance(curvature, Kfac):
            coupling = curvature.coupling(self.gradients.outputs(group.block.index, layer, hessian.device))
        stored = group.block.weight(layer)
        solver = Solver(quantizer, prepared, NoCorrection(), hessian, self.team, 0.0, statistics.tokens, coupling)
        return solver.solve(stored.to(hessian.device, torch.float32), stored.dtype)


def measure_kfac(candidates: CandidateWalk, on_block: Callable[[], None]) -> None:
    """Fills the files from their first unfinished block on, with tr(G E H E^T) / 2. on_block is called after each."""
    gradients, windows = candidates.gradients, candidates.windows
    assert gradients is not None  # which this measure needs
    found: Losses = {}

    def keep(group: Group, layer: LayerRef, statistics: Statistics, solved: Sequence[LayerSolution]) -> None:
        outputs, tokens = gradients.outputs(group.block.index, layer, statistics.hessian.device), statistics.tokens
        share = 1.0 if tokens is None else tokens.counts[layer.name] / windows.numel()
        stored = group.block.weight(layer)
        weight = stored.to(statistics.hessian.device, torch.float32)
        errors = (weight - each.weight(stored.dtype).float() for each in solved)
        found[layer.name] = [0.5 * share * loss_error(outputs, error, statistics.hessian) for error in errors]

    for block in candidates.solve(keep):
        candidates.team.on_rank0(candidates.files.write, block, found)
        found.clear()
        on_block()


def measure_fisher(candidates: CandidateWalk, on_block: Callable[[], None]) -> None:
    """As `measure_kfac`, with half the mean over tokens of (g^T E x)^2.

    All candidates are solved and kept on disk, from the first block on; then the gradient passes from the last block
    down, with the errors of one block in memory. on_block is called after each block of either pass.
    """
    model, windows, files, team = candidates.model, candidates.windows, candidates.files, candidates.team

    def keep(group: Group, layer: LayerRef, statistics: Statistics, solved: Sequence[LayerSolution]) -> None:
        for number, each in enumerate(solved):
            team.on_rank0(files.write_solved, layer.name, number, each.solution.quantized)

    for _ in candidates.solve(keep):
        on_block()
    if team.require_equal(files.directory, "blocks with losses", files.written()) < len(model):
        team.on_rank0(partial(files.fisher.mkdir, exist_ok=True))
        found = Gradients(files.fisher)
        sums = partial(_FisherSums.of_block, model, candidates.candidates, files)
        settings = candidates.settings
        seed = settings.curvature.seeds.get("curvature.seed", 0)
        collect_gradients(model, windows, seed, settings.batch, found, on_block, candidates.pause, team, sums)
        team.on_rank0(_write_fisher, files, len(model), windows.numel())
    team.on_rank0(files.forget)


def _write_fisher(files: LossFiles, blocks: int, tokens: int) -> None:
    for block in range(blocks):
        sums = load_file(files.fisher / f"{block:05d}.safetensors")
        files.write(block, {name: (0.5 * found / tokens).tolist() for name, found in sums.items()})


class _FisherSums(LayerSums):
    """Sums over tokens of (g^T E x)^2. errors: E of the candidates of each layer, (out, in) float32."""

    def __init__(self, errors: Mapping[str, Sequence[Tensor]]) -> None:
        self._errors = errors
        self._sums = {
            name: torch.zeros(len(each), dtype=torch.float64, device=each[0].device) for name, each in errors.items()
        }

    @classmethod
    def of_block(
        cls,
        model: StreamedModel,
        candidates: Mapping[str, Sequence[Quantizer]],
        files: LossFiles,
        block: int,
        tensors: Mapping[str, Tensor],
    ) -> "_FisherSums":
        errors = {}
        for name, layer in layer_refs(model.blocks[block], model.prefix(block)).items():
            if name in candidates:
                stored = layer.turned(model.location(layer.weight_name).read(tensors).contiguous())
                solved = [files.read_solved(name, number) for number in range(len(candidates[name]))]
                errors[name] = [
                    (stored.float() - each.dequantize(stored.dtype).float()).to(model.device) for each in solved
                ]
        return cls(errors)

    def watch(self, layer: LayerRef, inputs: Tensor) -> Callable[[Tensor], None] | None:
        return partial(self._add, layer.name, inputs.detach()) if layer.name in self._errors else None

    def _add(self, name: str, inputs: Tensor, gradient: Tensor) -> None:
        x, g = (each.reshape(-1, each.shape[-1]).float() for each in (inputs, gradient))
        for number, error in enumerate(self._errors[name]):
            self._sums[name][number] += (g * (x @ error.T)).sum(dim=-1).square().sum(dtype=torch.float64)

    def tensors(self, windows: Sequence[int], team: Team) -> Iterator[tuple[str, Tensor]]:
        for name, found in self._sums.items():
            yield name, team.all_reduce_sum(found)
