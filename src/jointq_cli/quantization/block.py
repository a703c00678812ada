"""One decoder block at work: with the weights it came with, and with those that replace them one after the other.

    original   the block as it was stored
    quantized  the block with every layer replaced that has been solved so far

Both share one module in memory, which wears the one or the other set of weights. Knows no statistics and no
quantizers; `passes` knows how a forward pass is stopped half-way.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from jointq_cli.errors import ModelError
from jointq_cli.formats.base import StoredWeight
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.resumable_forward import Pass

WeightSet = Literal["original", "quantized"]
_FAINT = 0.1  # rms of the tokens that a block is surveyed with: far above the epsilon of its norms
_CLOSE = 0.02  # relative


@dataclass(frozen=True)
class Layer:
    """A linear layer that is about to be quantised."""

    name: str
    block: int
    module: nn.Linear


class Block:
    """Block `index` of a model, loaded with `tensors` (stored names), which follow every replacement."""

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
        """The forward pass, with the weights that are worn while it runs."""
        return self.model.run(self.index, hidden)

    def activate(self, face: WeightSet) -> None:
        for layer, weight in zip(self.layers, self._weights[face], strict=True):
            layer.module.weight = weight

    def weight(self, layer: Layer) -> Tensor:
        """A layer's weight as it is stored."""
        return self.tensors[self._key(layer)]

    def replace(self, layer: Layer, weight: StoredWeight) -> None:
        stored = weight.dequantize(self.weight(layer).dtype)
        self.tensors[self._key(layer)] = stored.cpu()
        ready = nn.Parameter(stored.to(self.model.device, self.model.dtype), requires_grad=False)
        self._weights["quantized"][self.layers.index(layer)] = ready

    def structure(self, hidden: Tensor) -> "BlockStructure":
        """How the block is built, found out by one forward pass of hidden states (batch, tokens, hidden).

        No token is left louder than faint: a block starts with a norm, so its layers are given the same nevertheless,
        and what they add to the stream is not lost in the rounding of its massive activations.
        """
        loudness = hidden.float().square().mean(dim=-1, keepdim=True).sqrt().clamp_min(_FAINT)
        hidden = (hidden.float() * (_FAINT / loudness)).to(hidden.dtype)
        seen: list[tuple[Tensor, list[Layer]]] = []
        outputs: dict[nn.Linear, Tensor] = {}

        def note(layer: Layer, given: Tensor) -> None:
            if any(layer in group for _, group in seen):
                return None  # called again: its statistics are those of the first call
            for tensor, group in seen:
                if tensor is given:
                    return group.append(layer)
            seen.append((given, [layer]))
            return None

        handles = [
            layer.module.register_forward_pre_hook(lambda _, args, layer=layer: note(layer, args[0]))
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
        reached = {layer.name for _, group in seen for layer in group}
        idle = [layer.name for layer in self.layers if layer.name not in reached]
        if idle:
            raise ModelError(f"{idle[0]}: no token reaches this layer, so it cannot be calibrated; exclude it")
        return BlockStructure([group for _, group in seen], _writers(hidden, output, outputs))

    def _key(self, layer: Layer) -> str:
        return self.model.stored_name(f"{layer.name}.weight")


@dataclass(frozen=True)
class BlockStructure:
    """groups: the layers in the order they run, those that read the same tensor together.

    writers: the linear layers, selected or not, whose outputs are added to the residual stream, and how many times,
    the same for all. Empty where the block does more to the stream than that (a norm behind its layers, say).
    """

    groups: list[list[Layer]]
    writers: dict[nn.Linear, float]

    def writes(self, group: list[Layer]) -> float:
        """How many times the group's output is added to the residual stream; 0 if it is no single layer that writes."""
        return self.writers.get(group[0].module, 0.0) if len(group) == 1 else 0.0


def _writers(hidden: Tensor, output: Tensor, outputs: dict[nn.Linear, Tensor]) -> dict[nn.Linear, float]:
    """Explains what the block adds to `hidden` as a multiple of the sum of some `outputs`, all (batch, tokens, hidden).

    Empty where that cannot be done within a few times the rounding of bf16.
    """
    added = (output.float() - hidden.float()).flatten()
    known = {layer: given.float().flatten() for layer, given in outputs.items() if given.shape == hidden.shape}
    if not known:
        return {}
    columns = torch.stack(list(known.values()))
    gram, moments = (columns @ columns.T).double().cpu(), (columns @ added).double().cpu()
    fitted = dict(zip(known, (torch.linalg.pinv(gram, hermitian=True) @ moments).tolist(), strict=True))
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
class Seen:
    """What one batch shows at a group's input. `given`: what its layers are given, None if the batch does not reach
    them; `entered`, `written`: the hidden states that entered the block, and what was added to them since."""

    given: Tensor | None
    entered: Tensor
    written: Tensor | None

    @property
    def whole(self) -> bool:
        """Whether the layers are given every token of the batch."""
        return self.given is not None and self.given.shape[:-1].numel() == self.entered.shape[:-1].numel()

    def residual(self) -> Tensor:
        """The residual stream (batch, tokens, hidden) float32."""
        return self.entered.float() if self.written is None else self.entered.float() + self.written


class Stream:
    """Hidden states (windows, tokens, hidden) on their way through a block with one set of its weights, in batches."""

    def __init__(self, block: Block, face: WeightSet, hidden: Tensor, batch: int, waiting: int) -> None:
        """waiting: how many passes may wait between two groups; the rest starts anew."""
        self.block = block
        self.face = face
        self.hidden = hidden
        self._parts = hidden.split(batch) if len(hidden) else ()
        self._passes = [
            Pass(lambda part=part: block.run(part), suspendable=number < waiting)  # type: ignore[misc]
            for number, part in enumerate(self._parts)
        ]

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._parts)

    def at(self, group: int) -> Iterator[Seen]:
        """What is to be seen at a group's input, batch by batch."""
        for part, one in zip(self._parts, self._passes, strict=True):
            self.block.activate(self.face)
            given, written = one.input_of(group)
            yield Seen(given, part, written)

    def finish(self, pause: Callable[[], None]) -> Tensor:
        """The hidden states behind the block, in the memory of those that entered it."""
        for part, one in zip(self._parts, self._passes, strict=True):
            self.block.activate(self.face)
            part.copy_(one.output())
            pause()
        return self.hidden
