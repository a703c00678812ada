"""From settings and activations to a basis: smoothing scales, then R1, then R2 of one block after the other.

Knows how the parts go together; `learning`, `smoothing` and `hadamard` know how each is made.
"""

import torch
from torch import Tensor

from jointq_cli.kernels.hadamard import construction, random_hadamard
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.records import RotationTraining
from jointq_cli.transforms.activation_samples import Reservoir
from jointq_cli.transforms.architectures import Anatomy
from jointq_cli.transforms.basis import Basis
from jointq_cli.transforms.learning import Watch, decibels, initial, learn_r1, learn_r2
from jointq_cli.transforms.settings import HadamardRotation, LearnedRotation, Rotation, Smoothing, SmoothQuant
from jointq_cli.transforms.smoothing import mlp_scales, value_scales


def find_basis(
    model: StreamedModel,
    anatomy: Anatomy,
    rotation: Rotation,
    smoothing: Smoothing,
    reservoir: Reservoir,
    watch: Watch,
) -> tuple[Basis, list[RotationTraining]]:
    """The basis that was asked for, and how what is learned of it was learned."""
    s = t = None
    if isinstance(smoothing, SmoothQuant):
        s = value_scales(model, anatomy, reservoir, smoothing) if "o_proj" in smoothing.places else None
        t = mlp_scales(model, anatomy, reservoir, smoothing) if "down_proj" in smoothing.places else None
    smooth = Basis(value_scales=s, mlp_scales=t, r4="R4" in rotation.parts)
    if isinstance(rotation, HadamardRotation):
        return _random(anatomy, rotation, smooth, len(model)), []
    if isinstance(rotation, LearnedRotation):
        return _learned(model, anatomy, rotation, smooth, reservoir, watch)
    return smooth, []


def constructions(anatomy: Anatomy, rotation: Rotation) -> list[str]:
    """Which Hadamard matrices a rotation is made of, or starts from."""
    sizes = {"R1": anatomy.hidden, "R2": anatomy.head_dim, "R4": anatomy.width}
    used = rotation.parts
    if isinstance(rotation, LearnedRotation) and "hadamard" not in rotation.init:
        used = [part for part in used if part == "R4"]
    return [f"{part}: {construction(sizes[part])}" for part in used]


def _random(anatomy: Anatomy, rotation: HadamardRotation, smooth: Basis, blocks: int) -> Basis:
    generator = torch.Generator().manual_seed(rotation.seed)
    r1 = random_hadamard(anatomy.hidden, generator) if rotation.r1 else None
    heads = range(blocks * anatomy.kv_heads if rotation.r2 else 0)
    turns = [random_hadamard(anatomy.head_dim, generator) for _ in heads]
    return Basis(r1, _per_head(turns, anatomy), smooth.value_scales, smooth.mlp_scales, smooth.r4)


def _per_head(turns: list[Tensor], anatomy: Anatomy) -> Tensor | None:
    if not turns:
        return None
    return torch.stack(turns).reshape(-1, anatomy.kv_heads, anatomy.head_dim, anatomy.head_dim)


def _learned(
    model: StreamedModel,
    anatomy: Anatomy,
    rotation: LearnedRotation,
    smooth: Basis,
    reservoir: Reservoir,
    watch: Watch,
) -> tuple[Basis, list[RotationTraining]]:
    generator = torch.Generator().manual_seed(rotation.seed)
    courses: list[RotationTraining] = []
    r1 = None
    if rotation.r1:
        residual = reservoir.residual()
        mean = residual.mean(dim=(0, 1), dtype=torch.float32)
        start = initial(anatomy.hidden, rotation.init, generator, mean)
        r1, course = learn_r1(residual, start, rotation, model.device, watch)
        courses.append(course)
        del residual
    turns: list[Tensor] = []
    if rotation.r2:
        with watch.bar("learn R2", len(model)) as bar:
            for block in range(len(model)):
                inputs = smooth.smoothed_values(reservoir.read(block)["o_proj"].float(), block)
                means = inputs.reshape(len(inputs), anatomy.kv_heads, -1, anatomy.head_dim).mean(dim=(0, 2))
                start = torch.stack([initial(anatomy.head_dim, rotation.init, generator, mean) for mean in means])
                name = f"R2 of block {block}"
                r2, course = learn_r2(name, inputs, start, rotation, model.device, watch.pause)
                bar.advance(status=f"SQNR {decibels(course.error_after):.1f} dB")
                courses.append(course)
                turns.extend(r2)
    basis = Basis(r1, _per_head(turns, anatomy), smooth.value_scales, smooth.mlp_scales, smooth.r4)
    return basis, courses
