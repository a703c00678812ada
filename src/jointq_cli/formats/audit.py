"""The audit of a quantised checkpoint: its tensors against those of the source and against the stored layers."""

from collections.abc import Iterable
from pathlib import Path

import torch

from jointq_cli.formats.layer_file import load_layer
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.records import Audit, LayerRecord


def audit(
    source: Checkpoint,
    result: Checkpoint,
    stored_names: dict[str, str],
    layers: Iterable[LayerRecord],
    codes: Path,
) -> Audit:
    """Compares every tensor of `result` with the source's, and every quantised one with its dequantised layer file.

    stored_names: layer name -> name of its weight in the checkpoint. codes: directory of the layer files.
    """
    by_tensor = {stored_names[layer.name]: layer for layer in layers}
    common = [name for name in source.tensors if name in result.tensors]
    changed = [
        name
        for name in common
        if not (
            _is_dequantized(result, name, codes / f"{by_tensor[name].name}.safetensors")
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


def _is_dequantized(result: Checkpoint, name: str, codes: Path) -> bool:
    weight = result.read([name])[name]
    return torch.equal(weight, load_layer(codes).dequantize(weight.dtype))


def _packed_bytes(result: Checkpoint, plain: list[str], layers: Iterable[LayerRecord]) -> int:
    unchanged = sum(result.tensors[name].nbytes for name in plain)
    packed = sum(layer.bits_per_weight * layer.out_features * layer.in_features / 8 for layer in layers)
    return unchanged + round(packed)
