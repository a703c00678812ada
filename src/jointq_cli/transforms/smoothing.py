"""The scales of SmoothQuant for the two places where a scale per channel commutes with what lies between two layers."""

import torch
from torch import Tensor

from jointq_cli.models.streamed import StreamedModel
from jointq_cli.transforms.activation_samples import Reservoir
from jointq_cli.transforms.architectures import Anatomy
from jointq_cli.transforms.settings import SmoothQuant

LEAST = 1e-5  # of either magnitude, as in SmoothQuant's code: dead channels keep finite scales


def value_scales(model: StreamedModel, anatomy: Anatomy, reservoir: Reservoir, smoothing: SmoothQuant) -> Tensor:
    """s (blocks, kv_heads, head_dim) float64 for what enters o_proj.

    The query heads of a group read the same values and share their scales: each magnitude is the largest of theirs.
    """
    shape = (anatomy.kv_heads, anatomy.heads // anatomy.kv_heads, anatomy.head_dim)
    scales = []
    for block in range(reservoir.blocks):
        activation = reservoir.read(block)["o_proj_max"].reshape(shape).amax(dim=1)
        weight = _largest_per_input(model, block, anatomy.family.o_proj).reshape(shape).amax(dim=1)
        scales.append(_scale(activation, weight, smoothing.alpha))
    return torch.stack(scales)


def mlp_scales(model: StreamedModel, anatomy: Anatomy, reservoir: Reservoir, smoothing: SmoothQuant) -> Tensor:
    """t (blocks, width) float64 for what enters down_proj."""
    return torch.stack(
        [
            _scale(
                reservoir.read(block)["down_proj_max"],
                _largest_per_input(model, block, anatomy.family.down_proj),
                smoothing.alpha,
            )
            for block in range(reservoir.blocks)
        ]
    )


def _scale(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """SmoothQuant (arXiv 2211.10438), eq. 4."""
    large, small = activation.double().clamp_min(LEAST), weight.double().clamp_min(LEAST)
    return (large.pow(alpha) / small.pow(1.0 - alpha)).clamp_min(LEAST)


def _largest_per_input(model: StreamedModel, block: int, layer: str) -> Tensor:
    stored = model.stored_name(f"{model.prefix(block)}{layer}.weight")
    return model.checkpoint.read([stored])[stored].abs().amax(dim=0).float()
