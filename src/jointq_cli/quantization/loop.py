"""The inner loop: statistics, solve, replace, propagate, one decoder block at a time.

    for block in walk(decoder blocks):
        for layers that share an input:
            moments of that input  ->  qep  ->  quantizer  ->  the quantised weight in the block
        hidden = block(hidden)

Two streams of hidden states run through every block, one through its original weights, one through the quantised ones.
`inputs` says which of them the layers are solved for, and QEP compares both. A stream that nobody needs for that is
only as long as one batch, which tells how far the two have drifted apart; so are both where the moments have been
collected ahead (`hessians`). Knows neither recipes nor terminals.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from jointq_cli.formats.base import StoredWeight
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.block import Block, BlockStructure, Layer, Stream
from jointq_cli.quantization.collector import Collector, named
from jointq_cli.quantization.hessian_cache import Hessians
from jointq_cli.quantization.qep import Correction, NoCorrection
from jointq_cli.quantization.quantizers.base import Prepared
from jointq_cli.quantization.quantizers.statistics import Statistics
from jointq_cli.quantization.resumable_forward import stops
from jointq_cli.quantization.settings import LoopSettings
from jointq_cli.quantization.solver import Solver
from jointq_cli.quantization.workspace import Streams, Workspace
from jointq_cli.records import BlockRecord, LayerRecord
from jointq_cli.system.distributed import SINGLE_PROCESS, Team


def quantize_blocks(
    model: StreamedModel,
    windows: Tensor,
    plan: LoopSettings,
    workspace: Workspace,
    on_layer: Callable[[LayerRecord], None],
    pause: Callable[[], None],
    hessians: Hessians | None = None,
    team: Team = SINGLE_PROCESS,
) -> None:
    """Quantises every block from the workspace's position on, and leaves all results in the workspace.

    windows: (windows, tokens) int64. hessians: those of this model, windows and plan where they were collected ahead,
    which gives the same bits. on_layer is told of every layer of these blocks, pause is called wherever stopping loses
    nothing and may raise. The processes of a team share out windows and rows of layers; its leader writes, and what it
    finds finished is finished for all. Raises NumericsError, naming the layer, where a layer cannot be solved, and
    ResourceError where the processes do not find the same position.
    """
    plan.check(len(windows))
    start = team.require_equal(workspace.directory, "finished blocks", workspace.position())
    streams = _streams(model, windows if hessians is None else windows[: plan.batch], plan, workspace, team)
    collector = Collector(plan, len(windows.split(plan.batch)), model.device, pause, team)
    loop = _Loop(model, plan, workspace, on_layer, pause, hessians, collector, team)
    for index in range(start, len(model)):
        streams = loop.quantize_block(index, streams)


def _streams(model: StreamedModel, windows: Tensor, plan: LoopSettings, workspace: Workspace, team: Team) -> Streams:
    """This process's share of what enters the first unfinished block: of a stream that layers are solved for some of
    `windows`, of another one the first batch if it leads, and nothing if not."""
    own = team.part(len(windows), plan.batch)
    if not workspace.position():
        hidden = model.embed_all(windows, plan.batch, own)
        first = hidden[: plan.batch if team.rank == 0 else 0]
        if plan.inputs == "original":
            return Streams(hidden, first.clone())
        return Streams((hidden if any(map(plan.qep.corrects, plan.layers)) else first).clone(), hidden)
    model.record_calls(windows, plan.batch)
    kept = workspace.streams(lambda count: team.part(count, plan.batch))
    original, quantized = kept.original.to(model.device), kept.quantized.to(model.device)
    if plan.inputs == "original" and workspace.windows("original") != len(windows):
        # Begun with Hessians, or without, unlike now.
        original = _walked(model, windows, plan.batch, own, workspace.position())
    return Streams(original, quantized)


def _walked(model: StreamedModel, windows: Tensor, batch: int, own: slice, blocks: int) -> Tensor:
    """Hidden states (windows, tokens, hidden) of `own` behind the first `blocks` of the original model."""
    hidden = model.embed_all(windows, batch, own)
    for index in range(blocks):
        with model.block(index, model.block_tensors(index)):
            model.run_all(index, hidden, batch)
    return hidden


@dataclass(frozen=True)
class _Loop:
    model: StreamedModel
    plan: LoopSettings
    workspace: Workspace
    on_layer: Callable[[LayerRecord], None]
    pause: Callable[[], None]
    hessians: Hessians | None
    collector: Collector
    team: Team

    def quantize_block(self, index: int, streams: Streams) -> Streams:
        tensors = self.model.block_tensors(index)
        with self.model.block(index, tensors):
            block = Block(self.model, index, tensors, self.plan.layers)
            structure = block.structure(self._first_batch(vars(streams)[self.plan.inputs]))
            original, quantized = self._under_way(block, streams, structure.groups)
            writers = structure.writers if self.plan.follows_residual else {}
            with stops([[layer.module for layer in group] for group in structure.groups], writers):
                for number in range(len(structure.groups)):
                    self._quantize_group(block, structure, number, original, quantized)
            streams = Streams(original.finish(self.pause), quantized.finish(self.pause))
        first = streams.first(self.plan.batch if self.team.rank == 0 else 0)
        record = BlockRecord(index, _drift(first))  # the leader's is kept
        # Behind the last block nothing reads what was for calibration any more, but for gigabytes of disk.
        kept = first if index == len(self.model) - 1 else streams
        kept = Streams(self.team.gather_rows(kept.original), self.team.gather_rows(kept.quantized))
        self.team.on_rank0(self.workspace.finish_block, record, tensors, kept)
        return streams

    def _first_batch(self, hidden: Tensor) -> Tensor:
        """Of all processes, that all may find the same groups."""
        return self.team.broadcast(hidden[: self.plan.batch].cpu()).to(self.model.device)

    def _under_way(self, block: Block, streams: Streams, groups: list[list[Layer]]) -> tuple[Stream, Stream]:
        crossed = any(self.plan.qep.corrects(layer.name) for layer in block.layers)
        waiting = self.collector.waiting(groups, streams.quantized) // (2 if crossed else 1)
        return (
            Stream(block, "original", streams.original, self.plan.batch, waiting),
            Stream(block, "quantized", streams.quantized, self.plan.batch, waiting),
        )

    def _quantize_group(
        self, block: Block, structure: BlockStructure, number: int, original: Stream, quantized: Stream
    ) -> None:
        group = structure.groups[number]
        given: _Given | None = None
        finished = self.team.broadcast_from_rank0(self._finished, group)
        for layer in group:
            kept = finished.get(layer.name)
            if kept is None:
                given = given or self._prepare(group, self._statistics(structure, number, original, quantized))
                kept = self._quantize_layer(layer, block.weight(layer), given)
                self.team.on_rank0(self.workspace.keep_layer, *kept)
            weight, record = kept
            block.replace(layer, weight)
            self.on_layer(record)
            self.pause()

    def _finished(self, group: list[Layer]) -> dict[str, tuple[StoredWeight, LayerRecord]]:
        """The layers that an earlier run has kept."""
        found = {layer.name: self.workspace.layer(layer.name) for layer in group}
        return {name: kept for name, kept in found.items() if kept is not None}

    def _statistics(self, structure: BlockStructure, number: int, original: Stream, quantized: Stream) -> Statistics:
        layer = structure.groups[number][0]
        if self.hessians is not None:
            return self.hessians.read(layer.block, number, layer, self.model.device)
        if self.plan.inputs == "original":
            return self.collector.collect(structure, number, original)
        return self.collector.collect(structure, number, quantized, original)

    def _prepare(self, group: list[Layer], statistics: Statistics) -> "_Given":
        quantizer = self.plan.quantizer
        started = time.perf_counter()
        with named(group[0]):
            prepared = quantizer.prepare(statistics.hessian, statistics.heldout)
            correction: Correction = NoCorrection()
            if statistics.cross is not None and not prepared.failed:
                correction = self.plan.qep.correction(statistics, quantizer.ridge(statistics.hessian))
        return _Given(statistics.hessian, prepared, correction, (time.perf_counter() - started) / len(group))

    def _solver(self, layer: Layer, given: "_Given") -> Solver:
        correction = given.correction if self.plan.qep.corrects(layer.name) else NoCorrection()
        return Solver(self.plan.quantizer, given.prepared, correction, given.hessian, self.team)

    def _quantize_layer(self, layer: Layer, stored: Tensor, given: "_Given") -> tuple[StoredWeight, LayerRecord]:
        weight = stored.to(self.model.device, torch.float32)
        started = time.perf_counter()
        with named(layer):
            solved = self._solver(layer, given).solve(weight, stored.dtype)
        seconds = given.seconds + time.perf_counter() - started
        solution, quantized = solved.solution, solved.solution.quantized
        output_error, weight_error = solved.energies.relative()
        record = LayerRecord(
            name=layer.name,
            block=layer.block,
            kind=layer.name.rsplit(".", 1)[-1],
            out_features=weight.shape[0],
            in_features=weight.shape[1],
            output_error=output_error,
            weight_error=weight_error,
            damping=solution.damping,
            seconds=seconds,
            verdict=solution.verdict,
            notes={**solution.notes, **solved.notes},
            **quantized.record_fields(),
        )
        return quantized, record


@dataclass(frozen=True)
class _Given:
    """What the layers of a group have in common when they are solved."""

    hessian: Tensor
    prepared: Prepared
    correction: Correction
    seconds: float  # of all this, the share of one layer


def _drift(streams: Streams) -> float:
    """|quantised - original|^2 / |original|^2 of what leaves a block."""
    original, quantized = streams.original.float(), streams.quantized.float()
    signal = original.square().sum(dtype=torch.float64)
    error = (quantized - original).square().sum(dtype=torch.float64)
    return float(error / signal) if signal > 0 else 0.0
