"""The sizes of a model: its blocks, their linear layers, and its parameters outside of blocks. Reads no weight."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from jointq_cli.models.coverage import left_out
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.expert_unit import model_units
from jointq_cli.quantization.quantizers.base import Quantizer


@dataclass(frozen=True)
class InputGroup:
    """Linear layers of one block with the same input, judged by their names: in each attention or MLP module the last
    layer reads what the others have computed, and the others share an input."""

    in_features: int
    out_features: tuple[int, ...]
    quantizers: tuple[Quantizer, ...]  # of each layer
    writes: bool  # whether their outputs are added to the residual stream
    share: float = 1.0  # of the tokens that reach them: of an expert, those that a router sends there on average
    reads_tokens: bool = False  # of an expert: those that enter it
    experts: int = 0  # that receive tokens together with theirs; 0 for layers of no expert

    @property
    def weights(self) -> int:
        return self.in_features * sum(self.out_features)


@dataclass(frozen=True)
class Shapes:
    """Counts of elements, not of bytes."""

    blocks: int
    hidden: int
    vocabulary: int
    heads: int
    largest_block: int  # parameters
    in_blocks: int  # parameters of all blocks
    outside: int  # parameters as stored: a tied head counts once
    is_tied: bool
    inputs: tuple[InputGroup, ...]  # of the layers to quantise, in all blocks
    idle: float  # parameters of all blocks that a token does not pass through, on average: of experts
    left_out: Mapping[str, float]  # kinds of weights that are not quantised: shares of the weights of all blocks

    @property
    def widest(self) -> int:
        return max(one.in_features for one in self.inputs)

    @property
    def selected(self) -> int:
        """The number of weights to quantise."""
        return sum(one.weights for one in self.inputs)

    @property
    def heldout(self) -> bool:
        """Whether a quantizer needs a held-out set."""
        return any(quantizer.heldout for one in self.inputs for quantizer in one.quantizers)

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden


def shapes_of(model: StreamedModel, selected: Mapping[str, Quantizer]) -> Shapes:
    """selected: the layers to quantise by full name, in the order of the model, each with its quantizer."""
    config: Any = model.module.config.get_text_config()  # of a model with vision as well
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in model.blocks]
    head = next(layer for layer in model.linear_layers().values() if layer.module is _head(model))
    return Shapes(
        blocks=len(model),
        hidden=int(getattr(config, "hidden_size", model.module.get_input_embeddings().weight.shape[1])),
        vocabulary=int(_head(model).weight.shape[0]),
        heads=int(getattr(config, "num_attention_heads", 1)),
        largest_block=max(sizes),
        in_blocks=sum(sizes),
        outside=model.checkpoint.parameters - sum(sizes),
        is_tied=not model.stores(head.weight_name),
        inputs=(inputs := tuple(_inputs(model, selected))),
        idle=sum((1 - one.share) * one.weights for one in inputs),
        left_out=left_out(model, selected),
    )


def _head(model: StreamedModel) -> Any:
    return model.module.get_output_embeddings()


def _inputs(model: StreamedModel, selected: Mapping[str, Quantizer]) -> Iterable[InputGroup]:
    linear = model.linear_layers()
    experts = {layer.name: len(unit.layers) for unit in model_units(model, selected) for layer in unit}
    for _, names in groupby(selected, key=lambda name: name.rpartition(".")[0]):
        *readers, last = names
        count = experts.get(last, 0)
        share = min(1.0, _experts_per_token(model, count) / count) if count else 1.0
        for layers, writes in ((readers, False), ([last], True)):
            if layers:
                yield InputGroup(
                    in_features=linear[layers[0]].in_features,
                    out_features=tuple(linear[name].out_features for name in layers),
                    quantizers=tuple(selected[name] for name in layers),
                    writes=writes and not count,
                    share=share,
                    reads_tokens=count > 0 and not writes,
                    experts=count,
                )


def _experts_per_token(model: StreamedModel, experts: int) -> int:
    """As the config says, or all where it does not."""
    config: Any = model.module.config.get_text_config()
    names = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "top_k_experts")
    return next((int(found) for name in names if isinstance(found := getattr(config, name, None), int)), experts)
