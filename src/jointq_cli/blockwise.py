"""The inner loop: statistics, solve, replace, propagate, one decoder block at a time.

    for block, hidden in walk(decoder blocks):
        for layers that share an input:
            Hessian of that input  ->  quantizer  ->  the quantised weight in the block
        hidden = block(hidden)

Knows neither recipes nor terminals. With `inputs: quantized` a layer sees what the quantised model before it produces,
its own block included, so each group of layers gets a pass of its own; with `inputs: original` one pass over the
original block serves all its layers, and the Hessians do not depend on the quantizer.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from jointq_cli.errors import ConfigError, ModelError, NumericsError
from jointq_cli.grid import QuantizedWeight
from jointq_cli.model import StreamedModel
from jointq_cli.quantizers.base import HeldOut, Prepared, Quantizer
from jointq_cli.records import LayerRecord
from jointq_cli.statistics import Hessian, output_error, weight_error
from jointq_cli.workspace import Streams, Workspace

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What the loop does to every block."""

    quantizer: Quantizer
    layers: frozenset[str]  # full names of the linear layers to quantise
    inputs: str  # "original" | "quantized": whose activations a layer is solved for
    batch: int  # windows per forward pass


@dataclass(frozen=True)
class Statistics:
    """What was collected of one input: the Hessian of all tokens, and of a part of them where one is asked for."""

    hessian: Tensor
    heldout: HeldOut | None


@dataclass(frozen=True)
class Layer:
    """A linear layer that is about to be quantised."""

    name: str
    block: int
    module: nn.Linear


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
    if plan.quantizer.heldout and len(windows) <= plan.batch:
        raise ConfigError(
            f"calibration.num_samples={len(windows)}: must be more than the {plan.batch} windows of one forward pass, "
            "for the quantizer holds whole passes out; lower runtime.batch_tokens"
        )
    start = workspace.position()
    streams = _streams(model, windows, plan, workspace)
    loop = _Loop(model, plan, workspace, on_layer, pause)
    for index in range(start, len(model)):
        streams = loop.quantize_block(index, streams)


def _streams(model: StreamedModel, windows: Tensor, plan: Plan, workspace: Workspace) -> Streams:
    """What enters the first unfinished block."""
    if not workspace.position():
        hidden = model.embed_all(windows, plan.batch)
        return Streams(hidden, hidden[: plan.batch].clone())
    model.note_shapes(windows, plan.batch)
    kept = workspace.streams()
    return Streams(kept.calibration.to(model.device), kept.probe.to(model.device))


@dataclass(frozen=True)
class _Loop:
    model: StreamedModel
    plan: Plan
    workspace: Workspace
    on_layer: Callable[[LayerRecord], None]
    pause: Callable[[], None]

    def quantize_block(self, index: int, streams: Streams) -> Streams:
        tensors = self.model.block_tensors(index)
        with self.model.block(index, tensors) as block:
            groups = self._input_groups(index, block, streams.calibration[: self.plan.batch])
            after = self._solve_on_quantized if self.plan.inputs == "quantized" else self._solve_on_original
            streams = after(index, groups, tensors, streams)
        if index == len(self.model) - 1:  # nothing reads the calibration stream any more, but for gigabytes of disk
            streams = Streams(streams.calibration[:0], streams.probe)
        self.workspace.finish_block(index, tensors, streams)
        return streams

    def _solve_on_quantized(
        self, index: int, groups: list[list[Layer]], tensors: dict[str, Tensor], streams: Streams
    ) -> Streams:
        for group in groups:
            statistics = None
            if not self._finished(group):
                [statistics] = self._collect(index, [group], streams.calibration, stop=True)
            self._quantize_group(group, statistics, tensors)
        hidden = self.model.run_all(index, streams.calibration, self.plan.batch, self.pause)
        return Streams(hidden, hidden[: self.plan.batch])

    def _solve_on_original(
        self, index: int, groups: list[list[Layer]], tensors: dict[str, Tensor], streams: Streams
    ) -> Streams:
        statistics = self._collect(index, groups, streams.calibration, stop=False)
        while groups:  # each Hessian is freed when its group is done
            self._quantize_group(groups.pop(0), statistics.pop(0), tensors)
        return Streams(streams.calibration, self.model.run_all(index, streams.probe, self.plan.batch, self.pause))

    def _input_groups(self, index: int, block: nn.Module, hidden: Tensor) -> list[list[Layer]]:
        """The block's selected layers in the order they run, those that read the same tensor together."""
        prefix = self.model.prefix(index)
        layers = [
            Layer(prefix + name, index, module)
            for name, module in block.named_modules()
            if prefix + name in self.plan.layers and isinstance(module, nn.Linear)
        ]
        seen: list[tuple[Tensor, list[Layer]]] = []

        def note(layer: Layer, given: Tensor) -> None:
            for tensor, group in seen:
                if tensor is given:
                    return group.append(layer)
            seen.append((given, [layer]))
            return None

        self._run_hooked(index, hidden, {layer: note for layer in layers})
        reached = {layer.name for _, group in seen for layer in group}
        idle = [layer.name for layer in layers if layer.name not in reached]
        if idle:
            raise ModelError(f"{idle[0]}: no token reaches this layer, so it cannot be calibrated; exclude it")
        return [group for _, group in seen]

    def _collect(self, index: int, groups: list[list[Layer]], hidden: Tensor, *, stop: bool) -> list[Statistics]:
        """Statistics of the groups' inputs. `hidden` becomes the block's output, unless it may `stop` at the inputs."""
        parts = hidden.split(self.plan.batch)
        share = self.plan.quantizer.heldout
        # Some must be left to solve with.
        held_parts = min(max(1, round(share * len(parts))), len(parts) - 1) if share else 0
        held_from = len(parts) - held_parts
        everything, held = self._hessians(groups), self._hessians(groups if share else [])

        def add(layer: Layer, given: Tensor) -> None:
            everything[layer].add(given)
            if number >= held_from:
                held[layer].add(given)
            if stop:
                raise _InputSeen

        for number, part in enumerate(parts):  # noqa: B007 - `add` reads it
            output = self._run_hooked(index, part, dict.fromkeys(everything, add))
            if not stop and output is not None:
                part.copy_(output)
            self.pause()
        return [Statistics(everything[group[0]].finish(), _held_out(group[0], everything, held)) for group in groups]

    def _hessians(self, groups: list[list[Layer]]) -> dict[Layer, Hessian]:
        return {group[0]: Hessian(group[0].module.in_features, self.model.device) for group in groups}

    def _run_hooked(
        self, index: int, hidden: Tensor, hooks: dict[Layer, Callable[[Layer, Tensor], None]]
    ) -> Tensor | None:
        """Runs the block and hands each hooked layer's input to its hook; None if a hook stopped the run."""
        handles = [
            layer.module.register_forward_pre_hook(lambda _, args, layer=layer, hook=hook: hook(layer, args[0]))
            for layer, hook in hooks.items()
        ]
        try:
            return self.model.run(index, hidden)
        except _InputSeen:
            return None
        finally:
            for handle in handles:
                handle.remove()

    def _finished(self, group: list[Layer]) -> bool:
        return all(self.workspace.has_layer(layer.name) for layer in group)

    def _quantize_group(self, group: list[Layer], statistics: Statistics | None, tensors: dict[str, Tensor]) -> None:
        prepared: Prepared | None = None
        share = 0.0  # of the preparation, in each layer's seconds
        for layer in group:
            kept = self.workspace.layer(layer.name)
            if kept is None:
                assert statistics is not None  # collected, since the group is not finished
                if prepared is None:
                    started = time.perf_counter()
                    prepared = self._named(layer, lambda: self._prepare(statistics))
                    share = (time.perf_counter() - started) / len(group)
                kept = self._quantize_layer(layer, prepared, statistics.hessian, tensors[self._key(layer)], share)
                self.workspace.keep_layer(*kept)
            weight, record = kept
            self._replace(layer, weight, tensors)
            self.on_layer(record)
            self.pause()

    def _prepare(self, statistics: Statistics) -> Prepared:
        return self.plan.quantizer.prepare(statistics.hessian, statistics.heldout)

    def _quantize_layer(
        self, layer: Layer, prepared: Prepared, hessian: Tensor, stored: Tensor, share: float
    ) -> tuple[QuantizedWeight, LayerRecord]:
        weight = stored.to(self.model.device, torch.float32)
        started = time.perf_counter()
        solution = self._named(layer, lambda: self.plan.quantizer.quantize(weight, prepared, stored.dtype))
        seconds = share + time.perf_counter() - started
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
            output_error=output_error(weight, as_stored, hessian),
            weight_error=weight_error(weight, as_stored),
            damping=solution.damping,
            seconds=seconds,
            verdict=solution.verdict,
            notes=dict(solution.notes),
        )
        return quantized, record

    def _replace(self, layer: Layer, weight: QuantizedWeight, tensors: dict[str, Tensor]) -> None:
        key = self._key(layer)
        stored = weight.dequantize(tensors[key].dtype)
        tensors[key] = stored.cpu()
        layer.module.weight = nn.Parameter(stored.to(self.model.device, self.model.dtype), requires_grad=False)

    def _key(self, layer: Layer) -> str:
        return self.model.stored_name(f"{layer.name}.weight")

    def _named(self, layer: Layer, solve: Callable[[], T]) -> T:
        try:
            return solve()
        except NumericsError as error:
            raise NumericsError(f"{layer.name}: {error}") from error


def _held_out(layer: Layer, everything: dict[Layer, Hessian], held: dict[Layer, Hessian]) -> HeldOut | None:
    if layer not in held:
        return None
    if not 0 < held[layer].tokens < everything[layer].tokens:
        raise NumericsError(f"{layer.name}: all or none of its tokens are held out; use lambda_mode=fixed_lambda")
    share = held[layer].tokens / everything[layer].tokens
    return HeldOut(held[layer].finish(), share)


class _InputSeen(Exception):
    """Ends a forward pass whose only purpose was a layer's input."""
