"""The quantising loop: one decoder block at a time, calibrate, solve, replace, propagate.

    for groups of layers that share an input, in the order they run:
        Hessian of that input  ->  QEP  ->  quantizer  ->  the dequantised weight in the block

Of a group, layers whose quantizers prepare that input alike share what comes of it.

The hidden states of the calibration windows pass through every block with its original and with its quantised weights:
all of them where statistics depend on them, otherwise the first batch, for the error that is recorded for each block.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jointq_cli.formats.base import StoredWeight
from jointq_cli.models.layer_ref import LayerRef
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.collector import naming
from jointq_cli.quantization.curvature import Kfac
from jointq_cli.quantization.expert_unit import has_routed_units
from jointq_cli.quantization.gradients import Gradients
from jointq_cli.quantization.hessian_cache import Hessians
from jointq_cli.quantization.hidden_states import HiddenStates, Stream, relative_error
from jointq_cli.quantization.importance import save_importance
from jointq_cli.quantization.qep import Correction, NoCorrection
from jointq_cli.quantization.quantizers.base import Quantizer
from jointq_cli.quantization.quantizers.statistics import ExpertTokens, Statistics
from jointq_cli.quantization.settings import LoopSettings
from jointq_cli.quantization.solver import LayerSolution, Solver
from jointq_cli.quantization.walk import BlockVisit, Group, walk
from jointq_cli.quantization.workspace import Workspace
from jointq_cli.records import NO_TOKEN, BlockRecord, LayerRecord
from jointq_cli.system.distributed import SINGLE_PROCESS, Team


def quantize_blocks(
    model: StreamedModel,
    windows: Tensor,
    settings: LoopSettings,
    workspace: Workspace,
    on_layer: Callable[[LayerRecord], None],
    pause: Callable[[], None],
    hessians: Hessians | None = None,
    team: Team = SINGLE_PROCESS,
    gradients: Gradients | None = None,
) -> None:
    """Quantises every unfinished block of the workspace, and writes all results there.

    windows: (windows, tokens) int64. hessians: the cached ones of this model, windows and settings, which give the same
    bits. gradients: those that `settings.curvature` needs. on_layer is called with every layer of these blocks; pause
    is called where nothing is lost if it raises. The processes of a team share the windows and the rows of layers.
    Process 0 writes, and what it finds finished is finished for all. Raises NumericsError, with the layer's name, where
    a layer cannot be solved, and ResourceError where processes find different numbers of finished blocks.
    """
    loop = _Loop(settings, workspace, windows.shape, on_layer, pause, hessians, team, gradients)
    collects = hessians is None
    complete: dict[Stream, bool] = {
        "original": collects and (settings.solved_for == "original" or settings.corrects),
        "quantized": collects and settings.solved_for == "quantized",
    }
    if settings.follows_original and has_routed_units(model, settings.layers):
        complete["checkpoint"] = False
    known = None if hessians is None else hessians.groups
    for block in walk(
        model, windows, settings, workspace.hidden, complete, settings.batch, pause, team, known, gradients
    ):
        loop.quantize_block(block)


@dataclass(frozen=True)
class _Loop:
    settings: LoopSettings
    workspace: Workspace
    windows: Sequence[int]  # their shape
    on_layer: Callable[[LayerRecord], None]
    pause: Callable[[], None]
    hessians: Hessians | None
    team: Team
    gradients: Gradients | None

    def quantize_block(self, block: BlockVisit) -> None:
        for group in block.groups():
            self._quantize_group(group)
        self.team.on_rank0(self._write_block, block)

    def _write_block(self, block: BlockVisit) -> None:
        first: HiddenStates = {stream: states[: self.settings.batch] for stream, states in block.hidden.items()}
        self.workspace.write_block(BlockRecord(block.index, relative_error(first)), block.tensors)

    def _quantize_group(self, group: Group) -> None:
        finished = self.team.broadcast_from_rank0(self._finished, group)
        statistics: Statistics | None = None
        parts = self._prepared_alike(group.layers)
        for layers in parts:
            solver: Solver | None = None
            for layer in layers:
                stored = group.block.weight(layer)
                if layer.name in finished:
                    quantized, record = finished[layer.name]
                    weight = quantized.dequantize(stored.dtype)
                else:
                    if solver is None:
                        statistics = statistics or self._statistics(group)
                        solver = self._prepare(layers, statistics)
                        if layers is parts[-1]:
                            statistics = None  # which may be large
                    solved, record = self._solve(group.block.index, layer, stored, solver)
                    self.team.on_rank0(self.workspace.write_layer, solved.solution.quantized, record)
                    weight = solved.weight(stored.dtype)
                group.block.replace(layer, weight)
                self.on_layer(record)
                self.pause()

    def _prepared_alike(self, layers: Sequence[LayerRef]) -> list[list[LayerRef]]:
        """Those with equal `prepare_key` together."""
        parts: dict[str, list[LayerRef]] = {}
        for layer in layers:
            parts.setdefault(self.settings.quantizer_for(layer.name).prepare_key, []).append(layer)
        return list(parts.values())

    def _finished(self, group: Group) -> dict[str, tuple[StoredWeight, LayerRecord]]:
        """The layers that an earlier run has solved."""
        found = {layer.name: self.workspace.layer(layer.name) for layer in group.layers}
        return {name: kept for name, kept in found.items() if kept is not None}

    def _statistics(self, group: Group) -> Statistics:
        found = group.statistics() if self.hessians is None else self.hessians.read(group)
        names, folder = [layer.name for layer in group.layers], self.workspace.importance
        self.team.on_rank0(save_importance, folder, group.block.index, group.number, names, found.hessian, self.windows)
        return found

    def _prepare(self, layers: Sequence[LayerRef], statistics: Statistics) -> Solver:
        """layers: of one input, prepared alike."""
        quantizer = self._quantizer(layers[0], statistics.hessian, statistics.tokens)
        started = time.perf_counter()
        with naming(layers[0]):
            prepared = quantizer.prepare(statistics.hessian, statistics.heldout)
            correction: Correction = NoCorrection()
            if statistics.cross is not None and not prepared.failed:
                correction = self.settings.qep.correction(statistics, quantizer.ridge(statistics.hessian))
        seconds = (time.perf_counter() - started) / len(layers)
        return Solver(quantizer, prepared, correction, statistics.hessian, self.team, seconds, statistics.tokens)

    def _quantizer(self, layer: LayerRef, hessian: Tensor, experts: ExpertTokens | None) -> Quantizer:
        quantizer = self.settings.quantizer_for(layer.name)
        if not self.settings.corrects:
            return quantizer
        tokens = math.prod(self.windows) if experts is None else experts.counts[layer.name]
        return quantizer.for_corrected(len(hessian), tokens)

    def _solve(self, block: int, layer: LayerRef, stored: Tensor, solver: Solver) -> tuple[LayerSolution, LayerRecord]:
        """stored: the layer's weight (out, in) as in the checkpoint."""
        solver = replace(solver, quantizer=self._quantizer(layer, solver.hessian, solver.tokens))
        if not self.settings.qep.corrects(layer.name):
            solver = replace(solver, correction=NoCorrection())
        curvature = self.settings.curvature
        if self.gradients is not None and isinstance(curvature, Kfac):
            outputs = self.gradients.outputs(block, layer, solver.hessian.device)
            solver = replace(solver, coupling=curvature.coupling(outputs, curvature.rounds))
        weight = stored.to(solver.hessian.device, torch.float32)
        started = time.perf_counter()
        with naming(layer):
            solved = solver.solve(weight, stored.dtype)
        seconds = solver.preparation_seconds + time.perf_counter() - started
        solution, quantized = solved.solution, solved.solution.quantized
        tokens = None if solver.tokens is None else solver.tokens.counts[layer.name]
        output_error, weight_error = solved.energies.relative()
        record = LayerRecord(
            name=layer.name,
            block=block,
            kind=layer.name.rsplit(".", 1)[-1],
            out_features=weight.shape[0],
            in_features=weight.shape[1],
            output_error=output_error,
            weight_error=weight_error,
            damping=solution.damping,
            seconds=seconds,
            verdict=NO_TOKEN if tokens == 0 and solution.verdict == "ok" else solution.verdict,
            notes={**solution.notes, **solved.notes},
            tokens=tokens,
            block_share=0.0 if solver.tokens is None else solver.tokens.block_share,
            **quantized.record_fields(),
        )
        return solved, record
