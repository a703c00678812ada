"""The audit of a quantised checkpoint: its tensors against those of the source and against the stored layers."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from jointq_cli.formats.layer_file import load_layer
from jointq_cli.models.checkpoint import DTYPES, Checkpoint
from jointq_cli.models.layer_ref import LayerRef
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.records import Audit, LayerRecord


def audit(
    model: StreamedModel,
    result: Checkpoint,
    layers: list[LayerRecord],
    codes: Path,
    gains: Mapping[str, Tensor] = MappingProxyType({}),
) -> Audit:
    """Compares every tensor of `result` with that of the model that was quantised, and every quantised one with its
    dequantised layer file. codes: directory of the layer files. gains: what a refinement has made of tensors that are
    not quantised, by their stored names.
    """
    source, linear = model.checkpoint, model.linear_layers()
    quantized: dict[str, list[LayerRef]] = {}  # stored tensor -> the layers of which it holds all or a part
    for layer in layers:
        for name in model.location(linear[layer.name].weight_name).tensors:
            quantized.setdefault(name, []).append(linear[layer.name])
    common = [name for name in source.tensors if name in result.tensors]
    changed = [
        name
        for name in common
        if not (
            _is_dequantized(model, result, name, quantized[name], codes)
            if name in quantized
            else source.same_bytes(result, name)
            or (name in gains and _is_equal(result.read([name])[name], gains[name]))
        )
    ]
    refined = [name for name in gains if name not in changed and not source.same_bytes(result, name)]
    return Audit(
        identical=len([name for name in common if not (name in quantized or name in changed or name in refined)]),
        quantized=len([name for name in common if name in quantized]),
        refined=len(refined),
        missing=[name for name in source.tensors if name not in result.tensors],
        unexpected=[name for name in result.tensors if name not in source.tensors],
        changed=changed,
        source_bytes=source.weight_bytes,
        checkpoint_bytes=result.weight_bytes,
        packed_bytes=_packed_bytes(model, result, layers),
    )


def _is_dequantized(model: StreamedModel, result: Checkpoint, name: str, layers: list[LayerRef], codes: Path) -> bool:
    """Whether a tensor of `result` holds what these layers dequantise to, and in its other elements what the source's
    does."""
    found = result.read([name])[name]
    # A tensor that is one layer needs no look at the source's.
    expected = (
        torch.empty_like(found) if model.location(layers[0].weight_name).whole else model.checkpoint.read([name])[name]
    )
    for layer in layers:
        location = model.location(layer.weight_name)
        others = {stored: torch.empty(model.source.shapes[stored]) for stored in location.tensors}
        weight = load_layer(codes / f"{layer.name}.safetensors").dequantize(found.dtype)
        location.write(layer.turned(weight), {**others, name: expected})
    return _is_equal(found, expected)


def _is_equal(found: Tensor, expected: Tensor) -> bool:
    return expected.dtype == found.dtype and torch.equal(found, expected)


def _packed_bytes(model: StreamedModel, result: Checkpoint, layers: list[LayerRecord]) -> int:
    """Of the checkpoint with its quantised weights as they are stored."""
    size = sum(info.nbytes for name, info in result.tensors.items() if name in model.checkpoint.tensors)
    for layer in layers:
        info = result.tensors[model.stored_name(f"{layer.name}.weight")]
        size -= layer.out_features * layer.in_features * DTYPES[info.dtype].itemsize
    return size + round(sum(layer.bits_per_weight * layer.out_features * layer.in_features / 8 for layer in layers))
