"""How much of the weights of a model's decoder blocks is quantised, and what is left out. Reads no weight.

Weights are the matrices: parameters of two dimensions or more, such as linear layers, fused experts and convolutions.
Vectors (norms, sinks) and biases do not count.
"""

import re
from collections import Counter
from collections.abc import Collection

from jointq_cli.models.checkpoint import DTYPES
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.records import Coverage, LayerRecord


def left_out(model: StreamedModel, selected: Collection[str]) -> dict[str, float]:
    """The kinds of weights that are not quantised, and the share of each in the weights of all blocks; the largest
    first. selected: names of the quantised layers. A kind is a name within its block, such as "mlp.experts.*.up_proj".
    """
    weights = _block_weights(model)
    sizes: Counter[str] = Counter()
    for name in _not_quantized(weights, selected):
        block = model.block_of(name)
        assert block is not None
        kind = re.sub(r"\.\d+\.", ".*.", name.removeprefix(model.prefix(block)).removesuffix(".weight"))
        sizes[kind] += weights[name]
    total = sum(weights.values())
    return {kind: size / total for kind, size in sizes.most_common()}


def coverage(model: StreamedModel, layers: list[LayerRecord], packed_bytes: int) -> Coverage:
    """packed_bytes: of the quantised checkpoint with its codes packed."""
    weights = _block_weights(model)
    others = _not_quantized(weights, {layer.name for layer in layers})
    stored = {name: model.checkpoint.tensors[model.stored_name(name)] for name in others if model.stores(name)}
    plain = sum(8 * weights[name] * DTYPES[info.dtype].itemsize for name, info in stored.items())
    quantized = sum(layer.bits_per_weight * layer.out_features * layer.in_features for layer in layers)
    names = left_out(model, {layer.name for layer in layers})
    return Coverage(
        share=1 - sum(names.values()),
        left_out=names,
        block_bits=(plain + quantized) / sum(weights.values()),
        checkpoint_bits=8 * packed_bytes / model.checkpoint.parameters,
    )


def _block_weights(model: StreamedModel) -> dict[str, int]:
    """The elements of each weight in the decoder blocks, by name."""
    return {
        name: parameter.numel()
        for name, parameter in model.module.named_parameters()
        if model.block_of(name) is not None
        and sum(size > 1 for size in parameter.shape) > 1
        and not name.endswith("bias")
    }


def _not_quantized(weights: dict[str, int], selected: Collection[str]) -> list[str]:
    return [name for name in weights if name.removesuffix(".weight") not in selected]
