"""The audit of a quantised checkpoint: its tensors against those of the source and against the stored layers."""

from collections.abc import Iterable
from pathlib import Path

import torch

from jointq_cli.formats.layer_file import load_layer
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.layer_ref import LayerRef
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.records import Audit, LayerRecord


def audit(model: StreamedModel, result: Checkpoint, layers: Iterable[LayerRecord], codes: Path) -> Audit:
    """Compares every tensor of `result` with that of the model that was quantised, and every quantised one with its
    dequantised layer file. codes: directory of the layer files.
    """
    source, linear = model.checkpoint, model.linear_layers()
    by_tensor = {model.stored_name(linear[layer.name].weight_name): layer for layer in layers}
    common = [name for name in source.tensors if name in result.tensors]
    changed = [
        name
        for name in common
        if not (
            _is_dequantized(result, name, linear[by_tensor[name].name], codes)
            if name in by_tensor
            else source.same_bytes(result, name)
        )
    ]
    plain = [name for name in common if name not in by_tensor]
    return Audit(
        identical=len([name for name in plain if name not in changed]),
        quantized=len(by_tensor),
        missing=[name for name in source.tensors if name not in result.tensors],
        unexpected=[name for name in result.tensors if name not in source.tensors],
        changed=changed,
        source_bytes=source.weight_bytes,
        checkpoint_bytes=result.weight_bytes,
        packed_bytes=_packed_bytes(result, plain, by_tensor.values()),
    )


def _is_dequantized(result: Checkpoint, name: str, layer: LayerRef, codes: Path) -> bool:
    weight = result.read([name])[name]
    return torch.equal(layer.turned(weight), load_layer(codes / f"{layer.name}.safetensors").dequantize(weight.dtype))


def _packed_bytes(result: Checkpoint, plain: list[str], layers: Iterable[LayerRecord]) -> int:
    unchanged = sum(result.tensors[name].nbytes for name in plain)
    packed = sum(layer.bits_per_weight * layer.out_features * layer.in_features / 8 for layer in layers)
    return unchanged + round(packed)
