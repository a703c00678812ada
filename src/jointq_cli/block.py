"""One decoder block at work: with the weights it came with, and with those that replace them one after the other.

    original   the block as it was stored
    quantized  the block with every layer replaced that has been solved so far

Both share one module in memory, which wears the one or the other set of weights. Knows no statistics and no
quantizers; `passes` knows how a forward pass is stopped half-way.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from jointq_cli.errors import ModelError
from jointq_cli.grid import QuantizedWeight
from jointq_cli.model import StreamedModel
from jointq_cli.passes import Pass

Face = Literal["original", "quantized"]


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
        self._weights: dict[Face, list[Tensor]] = {
            "original": [layer.module.weight for layer in self.layers],
            "quantized": [layer.module.weight for layer in self.layers],
        }

    def run(self, hidden: Tensor) -> Tensor:
        """The forward pass, with the weights that are worn while it runs."""
        return self.model.run(self.index, hidden)

    def wear(self, face: Face) -> None:
        for layer, weight in zip(self.layers, self._weights[face], strict=True):
            layer.module.weight = weight

    def weight(self, layer: Layer) -> Tensor:
        """A layer's weight as it is stored."""
        return self.tensors[self._key(layer)]

    def replace(self, layer: Layer, weight: QuantizedWeight) -> None:
        stored = weight.dequantize(self.weight(layer).dtype)
        self.tensors[self._key(layer)] = stored.cpu()
        ready = nn.Parameter(stored.to(self.model.device, self.model.dtype), requires_grad=False)
        self._weights["quantized"][self.layers.index(layer)] = ready

    def input_groups(self, hidden: Tensor) -> list[list[Layer]]:
        """The layers in the order they run, those that read the same tensor together."""
        seen: list[tuple[Tensor, list[Layer]]] = []

        def note(layer: Layer, given: Tensor) -> None:
            for tensor, group in seen:
                if tensor is given:
                    return group.append(layer)
            seen.append((given, [layer]))
            return None

        handles = [
            layer.module.register_forward_pre_hook(lambda _, args, layer=layer: note(layer, args[0]))
            for layer in self.layers
        ]
        try:
            self.run(hidden)
        finally:
            for handle in handles:
                handle.remove()
        reached = {layer.name for _, group in seen for layer in group}
        idle = [layer.name for layer in self.layers if layer.name not in reached]
        if idle:
            raise ModelError(f"{idle[0]}: no token reaches this layer, so it cannot be calibrated; exclude it")
        return [group for _, group in seen]

    def _key(self, layer: Layer) -> str:
        return self.model.stored_name(f"{layer.name}.weight")


class Stream:
    """Hidden states (windows, tokens, hidden) on their way through a block with one set of its weights, in batches."""

    def __init__(self, block: Block, face: Face, hidden: Tensor, batch: int, waiting: int) -> None:
        """waiting: how many passes may wait between two groups; the rest starts anew."""
        self.block = block
        self.face = face
        self.hidden = hidden
        self._parts = hidden.split(batch)
        self._passes = [
            Pass(lambda part=part: block.run(part), waits=number < waiting)  # type: ignore[misc]
            for number, part in enumerate(self._parts)
        ]

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._parts)

    def inputs(self, group: int) -> Iterator[Tensor | None]:
        """What the layers of a group are given, batch by batch; None where a batch does not reach them."""
        for one in self._passes:
            self.block.wear(self.face)
            yield one.input_of(group)

    def finish(self, pause: Callable[[], None]) -> Tensor:
        """The hidden states behind the block, in the memory of those that entered it."""
        for part, one in zip(self._parts, self._passes, strict=True):
            self.block.wear(self.face)
            part.copy_(one.output())
            pause()
        return self.hidden
