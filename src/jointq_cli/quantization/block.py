"""One decoder block, and the forward passes of the calibration windows through it.

A block has two sets of weights: "original", as stored in the checkpoint, and "quantized", in which every layer that has
been solved is replaced. Both share one module in memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from jointq_cli.errors import ModelError
from jointq_cli.models.layer_ref import LayerRef, layer_refs
from jointq_cli.models.stored_parts import Location
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.expert_unit import ExpertUnit, find_units, watching
from jointq_cli.quantization.hidden_states import Stream, WeightSet
from jointq_cli.quantization.layer_groups import Run, merged
from jointq_cli.quantization.resumable_forward import ModuleCall, ResumableForward, first_tensor, group_hooks

_PROBE_RMS = 0.1  # of the tokens that show a block's structure: far above the epsilon of its norms
_CLOSE = 0.02  # relative


class Block:
    """Block `index` of a model, loaded with `tensors` (by stored name), of which `replace` changes single ones."""

    def __init__(self, model: StreamedModel, index: int, tensors: dict[str, Tensor], names: frozenset[str]) -> None:
        self.model = model
        self.index = index
        self.tensors = tensors
        self._changed = set[str]()  # stored tensors of which several layers have parts, and that were copied
        self._linear = layer_refs(model.blocks[index], model.prefix(index))
        self.layers = [layer for name, layer in self._linear.items() if name in names]
        weights: dict[LayerRef, Tensor] = {layer: layer.module.get_parameter("weight") for layer in self.layers}
        self._weights: dict[WeightSet, dict[LayerRef, Tensor]] = {"original": weights, "quantized": dict(weights)}
        self._units: list[ExpertUnit] = []

    def run(self, hidden: Tensor) -> Tensor:
        """The forward pass of hidden states (batch, tokens, hidden), with the weights that are active while it runs."""
        return self.model.run(self.index, hidden)

    def activate(self, stream: Stream, layers: Iterable[LayerRef] | None = None) -> None:
        """Makes the weights of a stream those of some layers, by default of all."""
        weights = self._weights["original" if stream == "original" else "quantized"]
        for layer in self.layers if layers is None else layers:
            layer.module.weight = weights[layer]

    def weight(self, layer: LayerRef) -> Tensor:
        """A layer's weight (out, in) as stored in the checkpoint."""
        return layer.turned(self._location(layer).read(self.tensors).contiguous())

    def replace(self, layer: LayerRef, weight: Tensor) -> None:
        """weight: (out, in), dequantised to the dtype of the checkpoint."""
        turned, location = layer.turned(weight), self._location(layer)
        if location.whole:
            self.tensors[location.whole] = turned.cpu()
        else:
            for shared in set(location.tensors) - self._changed:  # the original weights are views of them
                self.tensors[shared] = self.tensors[shared].clone()
                self._changed.add(shared)
            location.write(turned.cpu(), self.tensors)
        parameter = nn.Parameter(turned.to(self.model.device, self.model.dtype), requires_grad=False)
        self._weights["quantized"][layer] = parameter

    def structure(self, hidden: Tensor) -> "BlockStructure":
        """Groups and writers, found by one forward pass of hidden states (batch, tokens, hidden).

        The hidden states are scaled down to a small rms per token. A block starts with a norm, so its layers receive
        the same inputs, while their outputs are not lost in the rounding of massive activations when they are added to
        the residual stream.
        """
        rms = hidden.float().square().mean(dim=-1, keepdim=True).sqrt().clamp_min(_PROBE_RMS)
        hidden = (hidden.float() * (_PROBE_RMS / rms)).to(hidden.dtype)
        units = list(find_units(self.model.blocks[self.index], self.model.prefix(self.index), self.layers))
        if units:
            with watching(units) as self._units:
                self.run(hidden)
        outputs: dict[nn.Module, Tensor] = {}
        modules = {layer.module for layer in self._linear.values() if layer.out_features == hidden.shape[-1]}
        handles = [
            module.register_forward_hook(lambda module, _, output: outputs.update({module: first_tensor(output)}))
            for module in modules | {unit.holder for unit in self._units}
        ]
        try:
            run, output = self._observed(hidden)
        finally:
            for handle in handles:
                handle.remove()
        return self.grouped([run], _writers(hidden, output, outputs))

    def runs_until_all_reached(self, batches: Iterable[Tensor]) -> list[Run]:
        """Of each batch of hidden states (batch, tokens, hidden), until every layer has been reached."""
        runs: list[Run] = []
        reached: set[str] = set()
        for hidden in batches:
            runs.append(self._observed(hidden)[0])
            reached.update(name for group in runs[-1] for name in group)
            if len(reached) == len(self.layers):
                break
        return runs

    def grouped(self, runs: Sequence[Run], writers: dict[nn.Module, float]) -> "BlockStructure":
        """The structure that these forward passes show. Raises ModelError where they contradict each other."""
        by_name = {layer.name: layer for layer in self.layers}
        groups = [[by_name.pop(name) for name in group] for group in merged(runs, list(by_name))]
        units = {number: unit for number, group in enumerate(groups) for unit in self._units if group[0] in unit}
        unreached: dict[int, list[LayerRef]] = {}
        for layer in by_name.values():
            unreached.setdefault(layer.in_features, []).append(layer)
        return BlockStructure(groups, writers, list(unreached.values()), units)

    def passive(self, groups: Run) -> "BlockStructure":
        """The structure where all groups are known and passes need not stop at them."""
        by_name = {layer.name: layer for layer in self.layers}
        return BlockStructure([], {}, [[by_name[name] for name in group] for group in groups])

    def _observed(self, hidden: Tensor) -> tuple[Run, Tensor]:
        """The order in which a forward pass of hidden states (batch, tokens, hidden) runs the layers; its output."""
        groups: list[tuple[object, list[str]]] = []

        def record_input(name: str, inputs: Tensor) -> None:
            if any(name in names for _, names in groups):
                return None  # called again: its statistics are those of the first call
            for tensor, names in groups:
                if tensor is inputs:
                    return names.append(name)
            groups.append((inputs, [name]))
            return None

        handles = [
            layer.module.register_forward_pre_hook(lambda _, args, name=layer.name: record_input(name, args[0]))
            for layer in self.layers
            if not any(layer in unit for unit in self._units)
        ]
        handles += [
            unit.module.register_forward_pre_hook(
                lambda *_, unit=unit: groups.append((unit, [layer.name for layer in unit]))
            )
            for unit in self._units
        ]
        try:
            output = self.run(hidden)
        finally:
            for handle in handles:
                handle.remove()
        return [names for _, names in groups], output

    def _location(self, layer: LayerRef) -> Location:
        return self.model.location(layer.weight_name)


@dataclass(frozen=True)
class BlockStructure:
    """groups: the layers in the order they run, those that read the same tensor together.

    writers: the linear layers, selected or not, and the modules with experts, whose outputs are added to the residual
    stream, and the factor of each, the same for all. Empty where the block does more to the stream than that, such as a
    norm after its layers.

    passive: further groups, at whose inputs no pass stops: layers that no token has reached (experts), those with as
    many columns together; or all, where their statistics are known.

    units: those of `groups`, by number, that are all layers of the experts of one module.
    """

    groups: list[list[LayerRef]]
    writers: dict[nn.Module, float]
    passive: list[list[LayerRef]]
    units: Mapping[int, ExpertUnit] = field(default_factory=dict)

    def hooks(self, writers: Mapping[nn.Module, float]) -> AbstractContextManager[None]:
        """Inside, passes stop at the groups, and add up the outputs of writers."""
        of_units = {number: unit.module for number, unit in self.units.items()}
        groups = [
            [] if number in of_units else [layer.module for layer in layers]
            for number, layers in enumerate(self.groups)
        ]
        return group_hooks(groups, writers, of_units)

    def write_factor(self, number: int) -> float:
        """The factor of a group's output in the residual stream; 0 unless the group is one layer that writes."""
        layers = self.groups[number]
        return self.writers.get(layers[0].module, 0.0) if len(layers) == 1 else 0.0


def _writers(hidden: Tensor, output: Tensor, outputs: dict[nn.Module, Tensor]) -> dict[nn.Module, float]:
    """The layers, and their factor, whose `outputs` add up to what the block adds to `hidden`: a least-squares fit.

    All tensors (batch, tokens, hidden). Empty where the fit leaves more than a few times the rounding error of bf16.
    """
    added = (output.float() - hidden.float()).flatten()
    known = {layer: tensor.float().flatten() for layer, tensor in outputs.items() if tensor.shape == hidden.shape}
    if not known:
        return {}
    columns = torch.stack(list(known.values()))
    gram, products = (columns @ columns.T).double().cpu(), (columns @ added).double().cpu()
    fitted = dict(zip(known, (torch.linalg.pinv(gram, hermitian=True) @ products).tolist(), strict=True))
    factors = {layer: factor for layer, factor in fitted.items() if abs(factor) > 0.05}
    if not factors:
        return {}
    factor = sum(factors.values()) / len(factors)
    if abs(factor - 1.0) < _CLOSE:
        factor = 1.0
    rest = added - factor * torch.stack([known[layer] for layer in factors]).sum(dim=0)
    explained = torch.linalg.vector_norm(rest) <= _CLOSE * torch.linalg.vector_norm(added)
    return dict.fromkeys(factors, factor) if factor > 0 and bool(explained) else {}


@dataclass(frozen=True)
class GroupInput:
    """One batch at the input of a group of layers."""

    inputs: Tensor | None  # (..., in) of the group's layers; None if the batch does not reach them
    entered: Tensor  # the hidden states (batch, tokens, hidden) that entered the block
    written: Tensor | None  # the sum that the block's writers have added to them until then

    @property
    def has_all_tokens(self) -> bool:
        """Whether every token of the batch reaches the layers: not so for routed experts."""
        return self.inputs is not None and self.inputs.shape[:-1].numel() == self.entered.shape[:-1].numel()

    def residual(self) -> Tensor:
        """The residual stream (batch, tokens, hidden) float32."""
        return self.entered.float() if self.written is None else self.entered.float() + self.written


class BlockForward:
    """The forward passes of hidden states (windows, tokens, hidden) through a block with one weight set, in batches."""

    def __init__(self, block: Block, stream: Stream, hidden: Tensor, batch: int, suspendable: int) -> None:
        """suspendable: how many passes may be suspended between two groups; the others are restarted."""
        self.tokens = hidden.shape[1]  # of a window
        self._block = block
        self._stream = stream
        self._parts = hidden.split(batch) if len(hidden) else ()
        self._passes = [
            ResumableForward(lambda part=part: block.run(part), suspendable=number < suspendable)  # type: ignore[misc]
            for number, part in enumerate(self._parts)
        ]

    def inputs_of_group(self, number: int) -> Iterator[GroupInput]:
        """Batch by batch."""
        for part, forward in zip(self._parts, self._passes, strict=True):
            self._block.activate(self._stream)
            inputs, written = forward.input_of(number)
            yield GroupInput(inputs, part, written)

    def calls_of_group(self, number: int) -> Iterator[ModuleCall]:
        """Of the module of a group, batch by batch. Raises ModelError where a batch does not call it."""
        for forward in self._passes:
            self._block.activate(self._stream)
            call = forward.call_of(number)
            if call is None:
                raise ModelError("the experts of a block are not called for all tokens; exclude them")
            yield call

    def change_calls(self, number: int, changes: Sequence[Callable[[ModuleCall], ModuleCall]]) -> None:
        """Batch by batch; see `ResumableForward.change_call`."""
        for forward, change in zip(self._passes, changes, strict=True):
            forward.change_call(number, change)

    def finish(self, pause: Callable[[], None]) -> None:
        """Overwrites the hidden states with those that leave the block; calls `pause` after each batch."""
        for part, forward in zip(self._parts, self._passes, strict=True):
            self._block.activate(self._stream)
            part.copy_(forward.output())
            pause()
