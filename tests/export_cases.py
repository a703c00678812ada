"""Tiny quantised models for the tests of exporters."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_checkpoint

from jointq_cli.formats.export import QuantizedModel
from jointq_cli.formats.uniform import UniformWeight
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.quantizers import RTN
from jointq_cli.stages.export import model_to_quantize

Chosen = Callable[[str], RTN | None]  # the quantizer of a layer, None for one that stays as it is


def write_quantized(directory: Path, family: str, chosen: RTN | Chosen, **settings: object) -> QuantizedModel:
    """A tiny model of `family`, its decoder layers rounded, with its dequantised checkpoint in `directory`.

    settings: of `write_checkpoint`.
    """
    write_checkpoint(directory, family, **{"dtype": torch.bfloat16, **settings})
    return quantize_checkpoint(directory, chosen)


def quantize_checkpoint(directory: Path, chosen: RTN | Chosen) -> QuantizedModel:
    """Rounds the decoder layers of a checkpoint in its place."""
    quantizer_of = chosen if callable(chosen) else lambda name: chosen
    model = StreamedModel(Checkpoint(directory), torch.device("cpu"), torch.float32)
    layers = {name: quantizer_of(name) for name in model.linear_layers() if model.block_of(name) is not None}
    stored = {model.stored_name(f"{name}.weight"): rtn for name, rtn in layers.items() if rtn is not None}
    weights: dict[str, UniformWeight] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors = load_file(file)
        for name in stored.keys() & tensors.keys():
            rtn, weight = stored[name], tensors[name]
            assert rtn is not None
            prepared = rtn.prepare(torch.eye(weight.shape[1], dtype=torch.float64))
            found = rtn.quantize(weight.float(), prepared, weight.dtype).quantized
            assert isinstance(found, UniformWeight)
            weights[name] = found
            tensors[name] = found.dequantize(weight.dtype)
        save_file(tensors, file, {"format": "pt"})
    linear = model_to_quantize(model, {}).linear
    forms = {name: _form(weights[name]) for name in stored}
    return QuantizedModel(Checkpoint(directory), forms, linear, weights.__getitem__)


def _form(weight: UniformWeight) -> UniformWeight:
    """As exporters see it before they load it."""
    meta = {name: getattr(weight, name).to("meta") for name in ("codes", "scale", "zero_point")}
    permutation = None if weight.permutation is None else weight.permutation.to("meta")
    return replace(weight, permutation=permutation, **meta)
