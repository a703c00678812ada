"""Tiny quantised models for the tests of exporters."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from k_cases import simply_rounded
from safetensors.torch import load_file, save_file
from tiny_models import write_checkpoint
from torch import Tensor

from jointq_cli.formats.base import StoredWeight
from jointq_cli.formats.export import QuantizedModel
from jointq_cli.formats.k_quant import KGrid, KQuantWeight
from jointq_cli.formats.turned import TurnedWeight
from jointq_cli.formats.uniform import UniformWeight
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.quantizers import RTN
from jointq_cli.stages.export import model_to_quantize

Rounding = RTN | KGrid
Chosen = Callable[[str], Rounding | None]  # how a layer is rounded, None for one that stays as it is


def write_quantized(directory: Path, family: str, chosen: Rounding | Chosen, **settings: object) -> QuantizedModel:
    """A tiny model of `family`, its decoder layers rounded, with its dequantised checkpoint in `directory`.

    settings: of `write_checkpoint`.
    """
    write_checkpoint(directory, family, **{"dtype": torch.bfloat16, **settings})
    return quantize_checkpoint(directory, chosen)


def quantize_checkpoint(directory: Path, chosen: Rounding | Chosen) -> QuantizedModel:
    """Rounds the decoder layers of a checkpoint in its place."""
    quantizer_of = chosen if callable(chosen) else lambda name: chosen
    model = StreamedModel(Checkpoint(directory), torch.device("cpu"), torch.float32)
    layers = {name: quantizer_of(name) for name in model.linear_layers() if model.block_of(name) is not None}
    stored = {model.stored_name(f"{name}.weight"): how for name, how in layers.items() if how is not None}
    weights: dict[str, StoredWeight] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors = load_file(file)
        for name in stored.keys() & tensors.keys():
            weight = tensors[name]
            weights[name] = _rounded(weight, stored[name])
            tensors[name] = weights[name].dequantize(weight.dtype)
        save_file(tensors, file, {"format": "pt"})
    linear = model_to_quantize(model, {}).linear
    forms = {name: _form(weights[name]) for name in stored}
    return QuantizedModel(Checkpoint(directory), forms, linear, weights.__getitem__)


def _rounded(weight: Tensor, how: Rounding) -> StoredWeight:
    if isinstance(how, KGrid):
        return simply_rounded(weight.float(), how)
    prepared = how.prepare(torch.eye(weight.shape[1], dtype=torch.float64))
    return how.quantize(weight.float(), prepared, weight.dtype).quantized


def _form(weight: StoredWeight) -> StoredWeight:
    """As exporters see it before they load it."""
    if isinstance(weight, TurnedWeight):
        inner = _form(weight.inner)
        assert isinstance(inner, UniformWeight)
        return TurnedWeight(inner, weight.signs)
    if isinstance(weight, KQuantWeight):
        return KQuantWeight.empty(*weight.shape, weight.grid, torch.device("meta"))
    assert isinstance(weight, UniformWeight)
    parts = {name: getattr(weight, name) for name in ("codes", "scale", "zero_point", "permutation")}
    return replace(weight, **{name: None if part is None else part.to("meta") for name, part in parts.items()})
