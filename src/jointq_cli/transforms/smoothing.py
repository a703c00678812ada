"""The scales of SmoothQuant for the two sites where a scale per channel commutes with what lies between two layers."""

import torch
from torch import Tensor

from jointq_cli.models.streamed import BlockwiseModel
from jointq_cli.transforms.activation_samples import ActivationSamples
from jointq_cli.transforms.architectures import ArchitectureLayout
from jointq_cli.transforms.settings import SmoothQuant

MIN_MAGNITUDE = 1e-5  # of activations, weights and scales, as in SmoothQuant's code: dead channels keep finite scales


def value_scales(
    model: BlockwiseModel, layout: ArchitectureLayout, samples: ActivationSamples, smoothing: SmoothQuant
) -> Tensor:
    """s (blocks, num_kv_heads, head_dim) float64 for the inputs of o_proj.

    The query heads of a group read the same values and share their scales: each magnitude is the largest of theirs.
    """
    shape = (layout.num_kv_heads, layout.num_heads // layout.num_kv_heads, layout.head_dim)
    scales = []
    for block in range(samples.blocks):
        activation = samples.read(block)["o_proj_max"].reshape(shape).amax(dim=1)
        weight = _largest_per_input(model, block, layout.family.o_proj).reshape(shape).amax(dim=1)
        scales.append(_scale(activation, weight, smoothing.alpha))
    return torch.stack(scales)


def mlp_scales(
    model: BlockwiseModel, layout: ArchitectureLayout, samples: ActivationSamples, smoothing: SmoothQuant
) -> Tensor:
    """t (blocks, intermediate_size) float64 for the inputs of down_proj."""
    scales = []
    for block in range(samples.blocks):
        weight = _largest_per_input(model, block, layout.family.down_proj)
        scales.append(_scale(samples.read(block)["down_proj_max"], weight, smoothing.alpha))
    return torch.stack(scales)


def _scale(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """max|x|^alpha / max|w|^(1 - alpha) per channel: SmoothQuant (arXiv 2211.10438), eq. 4."""
    activation, weight = (each.double().clamp_min(MIN_MAGNITUDE) for each in (activation, weight))
    return (activation.pow(alpha) / weight.pow(1.0 - alpha)).clamp_min(MIN_MAGNITUDE)


def _largest_per_input(model: BlockwiseModel, block: int, layer: str) -> Tensor:
    """max|w| of each column of a layer's weight, (in,) float32."""
    stored = model.stored_name(f"{model.prefix(block)}{layer}.weight")
    return model.source.read([stored])[stored].abs().amax(dim=0).float()
