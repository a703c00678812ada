"""The quantised checkpoint: an ordinary Hugging Face directory, put together from finished blocks and audited.

One shard holds what belongs to no block, then one shard per block, as the engine finished them: no weight is copied
twice and none is held in memory beside its block.
"""

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
    """Compares every tensor of `result` with the source's, and every quantised one with what its codes say.

    stored_names: layer name -> name of its weight in the checkpoint. codes: directory of the layers' safetensors.
    """
    by_tensor = {stored_names[layer.name]: layer for layer in layers}
    common = [name for name in source.tensors if name in result.tensors]
    changed = [
        name
        for name in common
        if not (
            _says_its_codes(result, name, codes / f"{by_tensor[name].name}.safetensors")
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


def _says_its_codes(result: Checkpoint, name: str, codes: Path) -> bool:
    found = result.read([name])[name]
    return torch.equal(found, load_layer(codes).dequantize(found.dtype))


def _packed_bytes(result: Checkpoint, plain: list[str], layers: Iterable[LayerRecord]) -> int:
    kept = sum(result.tensors[name].nbytes for name in plain)
    packed = sum(layer.bits_per_weight * layer.out_features * layer.in_features / 8 for layer in layers)
    return kept + round(packed)
