"""One decoder block, and the forward passes of the calibration windows through it.

A block has two sets of weights: "original", as stored in the checkpoint, and "quantized", in which every layer that has
been solved is replaced. Both share one module in memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jointq_cli.errors import ModelError
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.hidden_states import WeightSet
from jointq_cli.quantization.resumable_forward import ResumableForward

_PROBE_RMS = 0.1  # of the tokens that show a block's structure: far above the epsilon of its norms
_CLOSE = 0.02  # relative


@dataclass(frozen=True)
class Layer:
    """A linear layer to quantise."""

    name: str
    block: int
    module: nn.Linear


class Block:
    """Block `index` of a model, loaded with `tensors` (by stored name), of which `replace` changes single ones."""

    def __init__(self, model: StreamedModel, index: int, tensors: dict[str, Tensor], names: frozenset[str]) -> None:
        self.model = model
        self.index = index
        self.tensors = tensors
        prefix = model.prefix(index)
        self.layers = [
            Layer(prefix + name, index, module)
            for name, module in model.blocks[index].named_modules()
            if prefix + name in names and isinstance(module, nn.Linear)
        ]
        self._weights: dict[WeightSet, list[Tensor]] = {
            "original": [layer.module.weight for layer in self.layers],
            "quantized": [layer.module.weight for layer in self.layers],
        }

    def run(self, hidden: Tensor) -> Tensor:
        """The forward pass of hidden states (batch, tokens, hidden), with the weights that are active while it runs."""
        return self.model.run(self.index, hidden)

    def activate(self, weights: WeightSet) -> None:
        for layer, weight in zip(self.layers, self._weights[weights], strict=True):
            layer.module.weight = weight

    def weight(self, layer: Layer) -> Tensor:
        """A layer's weight (out, in) as stored in the checkpoint."""
        return self.tensors[self._key(layer)]

    def replace(self, layer: Layer, weight: Tensor) -> None:
        """weight: (out, in), dequantised to the dtype of the checkpoint."""
        self.tensors[self._key(layer)] = weight.cpu()
        parameter = nn.Parameter(weight.to(self.model.device, self.model.dtype), requires_grad=False)
        self._weights["quantized"][self.layers.index(layer)] = parameter

    def structure(self, hidden: Tensor) -> "BlockStructure":
        """Groups and writers, found by one forward pass of hidden states (batch, tokens, hidden).

        The hidden states are scaled down to a small rms per token. A block starts with a norm, so its layers receive
        the same inputs, while their outputs are not lost in the rounding of massive activations when they are added to
        the residual stream. Raises ModelError where a layer does not run.
        """
        rms = hidden.float().square().mean(dim=-1, keepdim=True).sqrt().clamp_min(_PROBE_RMS)
        hidden = (hidden.float() * (_PROBE_RMS / rms)).to(hidden.dtype)
        groups: list[tuple[Tensor, list[Layer]]] = []
        outputs: dict[nn.Linear, Tensor] = {}

        def record_input(layer: Layer, inputs: Tensor) -> None:
            if any(layer in layers for _, layers in groups):
                return None  # called again: its statistics are those of the first call
            for tensor, layers in groups:
                if tensor is inputs:
                    return layers.append(layer)
            groups.append((inputs, [layer]))
            return None

        handles = [
            layer.module.register_forward_pre_hook(lambda _, args, layer=layer: record_input(layer, args[0]))
            for layer in self.layers
        ]
        handles += [
            module.register_forward_hook(lambda module, args, output: outputs.update({module: output}))
            for module in self.model.blocks[self.index].modules()
            if isinstance(module, nn.Linear) and module.out_features == hidden.shape[-1]
        ]
        try:
            output = self.run(hidden)
        finally:
            for handle in handles:
                handle.remove()
        reached = {layer.name for _, layers in groups for layer in layers}
        idle = [layer.name for layer in self.layers if layer.name not in reached]
        if idle:
            raise ModelError(f"{idle[0]}: no token reaches this layer, so it cannot be calibrated; exclude it")
        return BlockStructure([layers for _, layers in groups], _writers(hidden, output, outputs))

    def _key(self, layer: Layer) -> str:
        return self.model.stored_name(f"{layer.name}.weight")


@dataclass(frozen=True)
class BlockStructure:
    """groups: the layers in the order they run, those that read the same tensor together.

    writers: the linear layers, selected or not, whose outputs are added to the residual stream, and the factor of each,
    the same for all. Empty where the block does more to the stream than that, such as a norm after its layers.
    """

    groups: list[list[Layer]]
    writers: dict[nn.Linear, float]

    def write_factor(self, number: int) -> float:
        """The factor of a group's output in the residual stream; 0 unless the group is one layer that writes."""
        layers = self.groups[number]
        return self.writers.get(layers[0].module, 0.0) if len(layers) == 1 else 0.0


def _writers(hidden: Tensor, output: Tensor, outputs: dict[nn.Linear, Tensor]) -> dict[nn.Linear, float]:
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

    def __init__(self, block: Block, weights: WeightSet, hidden: Tensor, batch: int, suspendable: int) -> None:
        """suspendable: how many passes may be suspended between two groups; the others are restarted."""
        self._block = block
        self._weights = weights
        self._parts = hidden.split(batch) if len(hidden) else ()
        self._passes = [
            ResumableForward(lambda part=part: block.run(part), suspendable=number < suspendable)  # type: ignore[misc]
            for number, part in enumerate(self._parts)
        ]

    def inputs_of_group(self, number: int) -> Iterator[GroupInput]:
        """Batch by batch."""
        for part, forward in zip(self._parts, self._passes, strict=True):
            self._block.activate(self._weights)
            inputs, written = forward.input_of(number)
            yield GroupInput(inputs, part, written)

    def finish(self, pause: Callable[[], None]) -> None:
        """Overwrites the hidden states with those that leave the block; calls `pause` after each batch."""
        for part, forward in zip(self._parts, self._passes, strict=True):
            self._block.activate(self._weights)
            part.copy_(forward.output())
            pause()
