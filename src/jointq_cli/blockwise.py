"""The inner loop: statistics, solve, replace, propagate, one decoder block at a time.

    for block in walk(decoder blocks):
        for layers that share an input:
            moments of that input  ->  qep  ->  quantizer  ->  the quantised weight in the block
        hidden = block(hidden)

Two streams of hidden states run through every block, one through its original weights, one through the quantised ones.
`inputs` says which of them the layers are solved for, and QEP compares both. A stream that nobody needs for that is
only as long as one batch, which tells how far the two have drifted apart. Knows neither recipes nor terminals.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor, nn

from jointq_cli.block import Block, Layer, Seen, Stream, Survey
from jointq_cli.errors import ConfigError, NumericsError
from jointq_cli.grid import QuantizedWeight
from jointq_cli.model import StreamedModel
from jointq_cli.passes import stops
from jointq_cli.qep import Corrected, Correction, NoCorrection, Propagation
from jointq_cli.quantizers.base import Prepared, Quantizer
from jointq_cli.records import BlockRecord, LayerRecord
from jointq_cli.statistics import Accumulator, HeldOut, Statistics, TokenWeights, output_error, weight_error
from jointq_cli.workspace import Streams, Workspace


@dataclass(frozen=True)
class Plan:
    """What the loop does to every block."""

    quantizer: Quantizer
    qep: Propagation
    layers: frozenset[str]  # full names of the linear layers to quantise
    inputs: str  # "original" | "quantized": whose activations a layer is solved for
    weights: TokenWeights  # of the calibration tokens in the statistics
    batch: int  # windows per forward pass
    waiting: float  # bytes of activations that may wait in stopped forward passes

    @property
    def heldout(self) -> float:
        """The share of the windows that somebody wants to see apart."""
        return max(self.quantizer.heldout, self.qep.heldout)

    @property
    def follows_residual(self) -> bool:
        """Whether anybody asks what is in the residual stream."""
        return self.qep.follows_residual or self.weights.of_residual

    def check(self, windows: int) -> None:
        """Raises ConfigError where quantizer, qep and so many windows do not go together."""
        self.qep.check_inputs(self.inputs)
        if self.heldout and windows <= self.batch:
            raise ConfigError(
                f"calibration.num_samples={windows}: must be more than the {self.batch} windows of one forward pass, "
                "for whole passes are held out; lower runtime.batch_tokens"
            )
        if self.quantizer.heldout and self.qep.heldout and self.quantizer.heldout != self.qep.heldout:
            raise ConfigError(
                f"qep.heldout_share={self.qep.heldout:g}: must be the quantizer's {self.quantizer.heldout:g}, "
                "since both hold out the same tokens"
            )


def quantize_blocks(
    model: StreamedModel,
    windows: Tensor,
    plan: Plan,
    workspace: Workspace,
    on_layer: Callable[[LayerRecord], None],
    pause: Callable[[], None],
) -> None:
    """Quantises every block from the workspace's position on, and leaves all results in the workspace.

    windows: (windows, tokens) int64. on_layer is told of every layer of these blocks, pause is called wherever stopping
    loses nothing and may raise. Raises NumericsError, naming the layer, where a layer cannot be solved.
    """
    plan.check(len(windows))
    start = workspace.position()
    streams = _streams(model, windows, plan, workspace)
    loop = _Loop(model, plan, workspace, on_layer, pause)
    for index in range(start, len(model)):
        streams = loop.quantize_block(index, streams)


def _streams(model: StreamedModel, windows: Tensor, plan: Plan, workspace: Workspace) -> Streams:
    """What enters the first unfinished block."""
    if not workspace.position():
        hidden = model.embed_all(windows, plan.batch)
        first = hidden[: plan.batch]
        if plan.inputs == "original":
            return Streams(hidden, first.clone())
        return Streams((hidden if any(map(plan.qep.corrects, plan.layers)) else first).clone(), hidden)
    model.note_shapes(windows, plan.batch)
    kept = workspace.streams()
    return Streams(kept.original.to(model.device), kept.quantized.to(model.device))


@dataclass(frozen=True)
class _Loop:
    model: StreamedModel
    plan: Plan
    workspace: Workspace
    on_layer: Callable[[LayerRecord], None]
    pause: Callable[[], None]

    def quantize_block(self, index: int, streams: Streams) -> Streams:
        tensors = self.model.block_tensors(index)
        with self.model.block(index, tensors):
            block = Block(self.model, index, tensors, self.plan.layers)
            survey = block.survey(streams.quantized[: self.plan.batch])
            original, quantized = self._under_way(block, streams, survey.groups)
            writers = survey.writers if self.plan.follows_residual else {}
            with stops([[layer.module for layer in group] for group in survey.groups], writers):
                for number in range(len(survey.groups)):
                    self._quantize_group(block, survey, number, original, quantized)
            streams = Streams(original.finish(self.pause), quantized.finish(self.pause))
        record = BlockRecord(index, _drift(streams.first(self.plan.batch)))
        if index == len(self.model) - 1:  # nothing reads what was for calibration any more, but for gigabytes of disk
            streams = streams.first(self.plan.batch)
        self.workspace.finish_block(record, tensors, streams)
        return streams

    def _under_way(self, block: Block, streams: Streams, groups: list[list[Layer]]) -> tuple[Stream, Stream]:
        solved_for = [hidden for hidden in vars(streams).values() if len(hidden) > self.plan.batch]
        waiting = self._waiting(groups, streams.quantized) // max(1, len(solved_for))
        return (
            Stream(block, "original", streams.original, self.plan.batch, waiting),
            Stream(block, "quantized", streams.quantized, self.plan.batch, waiting),
        )

    def _waiting(self, groups: list[list[Layer]], hidden: Tensor) -> int:
        """How many passes may wait between two groups."""
        widest = max((group[0].module.in_features for group in groups), default=0)
        # What lies in a pass that waits: at most the stream, what was written into it, and an attention's queries, keys
        # and values (as much as two streams), beside what the layers are given. Not the scores of an eager attention.
        bytes_per_token = (4 * hidden.shape[-1] + widest) * hidden.element_size()
        affordable = self.plan.waiting / (self.plan.batch * hidden.shape[1] * bytes_per_token)
        return int(min(affordable, 2.0**31))  # it may be infinite

    def _quantize_group(self, block: Block, survey: Survey, number: int, original: Stream, quantized: Stream) -> None:
        group = survey.groups[number]
        given: _Given | None = None
        for layer in group:
            kept = self.workspace.layer(layer.name)
            if kept is None:
                given = given or self._prepare(group, self._collect(survey, number, original, quantized))
                kept = self._quantize_layer(layer, block.weight(layer), given)
                self.workspace.keep_layer(*kept)
            weight, record = kept
            block.replace(layer, weight)
            self.on_layer(record)
            self.pause()

    def _collect(self, survey: Survey, number: int, original: Stream, quantized: Stream) -> Statistics:
        """The moments of a group's input over all batches, and those of the held-out ones apart."""
        group = survey.groups[number]
        writes = survey.writes(group)
        crossed = any(self.plan.qep.corrects(layer.name) for layer in group)
        drifted = crossed and writes > 0 and self.plan.qep.follows_residual
        stream = original if self.plan.inputs == "original" else quantized
        held_from = self._held_from(len(stream))
        everything = self._accumulator(group, crossed, drifted)
        held = self._accumulator(group, crossed, drifted) if held_from < len(stream) else None
        wanted = original.at(number) if crossed else repeat(None, len(stream))
        for batch, (seen, other) in enumerate(zip(stream.at(number), wanted, strict=True)):
            if seen.given is not None:
                behind = self._behind(group[0], seen, writes)
                weights = self.plan.weights.of(seen.given, behind, tokens=seen.entered.shape[1])
                paired = other if other is not None and seen.whole and other.whole else None
                given = None if paired is None else paired.given
                lost = (paired.residual() - seen.residual()) / writes if drifted and paired is not None else None
                with _named(group[0]):
                    everything.add(seen.given, given, weights, lost)
                    if held is not None and batch >= held_from:
                        held.add(seen.given, given, weights, lost)
            self.pause()
        with _named(group[0]):
            heldout = _held_out(everything, held)
            return Statistics(everything.hessian(), everything.cross(), everything.drift(), heldout)

    def _behind(self, layer: Layer, seen: Seen, writes: float) -> Tensor | None:
        """The residual stream behind a layer that writes into it, where the weights of tokens depend on it."""
        if not (writes and self.plan.weights.of_residual) or seen.given is None:
            return None
        output = nn.functional.linear(seen.given, layer.module.weight, layer.module.bias)
        return seen.residual() + writes * output

    def _accumulator(self, group: list[Layer], crossed: bool, drifted: bool) -> Accumulator:
        module = group[0].module
        drift = module.out_features if drifted else 0
        return Accumulator(module.in_features, self.model.device, cross=crossed, drift=drift)

    def _held_from(self, batches: int) -> int:
        """The first of the batches that are held out, and some must be left to solve with; their number if none is."""
        share = self.plan.heldout
        return batches - min(max(1, round(share * batches)), batches - 1) if share else batches

    def _prepare(self, group: list[Layer], statistics: Statistics) -> "_Given":
        quantizer = self.plan.quantizer
        started = time.perf_counter()
        with _named(group[0]):
            prepared = quantizer.prepare(statistics.hessian, statistics.heldout)
            correction: Correction = NoCorrection()
            if statistics.cross is not None and not prepared.failed:
                correction = self.plan.qep.correction(statistics, quantizer.ridge(statistics.hessian))
        return _Given(statistics.hessian, prepared, correction, (time.perf_counter() - started) / len(group))

    def _quantize_layer(self, layer: Layer, stored: Tensor, given: "_Given") -> tuple[QuantizedWeight, LayerRecord]:
        weight = stored.to(self.model.device, torch.float32)
        started = time.perf_counter()
        with _named(layer):
            wanted = given.correction.apply(weight) if self.plan.qep.corrects(layer.name) else Corrected(weight)
            solution = self.plan.quantizer.quantize(wanted.weight, given.prepared, stored.dtype)
        seconds = given.seconds + time.perf_counter() - started
        quantized = solution.quantized
        as_stored = quantized.dequantize(stored.dtype).float()
        record = LayerRecord(
            name=layer.name,
            block=layer.block,
            kind=layer.name.rsplit(".", 1)[-1],
            out_features=weight.shape[0],
            in_features=weight.shape[1],
            bits=quantized.bits,
            group_size=quantized.group_size,
            bits_per_weight=quantized.bits_per_weight,
            output_error=output_error(wanted.weight, as_stored, given.hessian),
            weight_error=weight_error(wanted.weight, as_stored),
            damping=solution.damping,
            seconds=seconds,
            verdict=solution.verdict,
            notes={**solution.notes, **wanted.notes},
        )
        return quantized, record


@dataclass(frozen=True)
class _Given:
    """What the layers of a group have in common when they are solved."""

    hessian: Tensor
    prepared: Prepared
    correction: Correction
    seconds: float  # of all this, the share of one layer


def _held_out(everything: Accumulator, held: Accumulator | None) -> HeldOut | None:
    if held is None:
        return None
    if not 0 < held.tokens < everything.tokens:
        raise NumericsError(
            "all or none of its tokens are held out; use quantizer.lambda_mode=fixed_lambda, qep.perccorr_mode=fixed"
        )
    return HeldOut(held.hessian(), held.tokens / everything.tokens, held.cross(), held.drift())


def _drift(streams: Streams) -> float:
    """|quantised - original|^2 / |original|^2 of what leaves a block."""
    original, quantized = streams.original.float(), streams.quantized.float()
    signal = original.square().sum(dtype=torch.float64)
    error = (quantized - original).square().sum(dtype=torch.float64)
    return float(error / signal) if signal > 0 else 0.0


@contextmanager
def _named(layer: Layer) -> Iterator[None]:
    try:
        yield
    except NumericsError as error:
        raise NumericsError(f"{layer.name}: {error}") from error
