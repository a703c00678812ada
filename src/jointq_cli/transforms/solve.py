"""Computes a basis from settings and activations: the smoothing scales, then R1, then R2 block by block."""

from dataclasses import replace

import torch

from jointq_cli.kernels.hadamard import construction, random_hadamard
from jointq_cli.models.streamed import BlockwiseModel
from jointq_cli.records import RotationTraining
from jointq_cli.transforms.activation_samples import ActivationSamples
from jointq_cli.transforms.architectures import ArchitectureLayout
from jointq_cli.transforms.basis import Basis
from jointq_cli.transforms.learning import Progress, initial_rotation, learn_r1, learn_r2, sqnr_db
from jointq_cli.transforms.settings import HadamardRotation, LearnedRotation, Rotation, Smoothing, SmoothQuant
from jointq_cli.transforms.smoothing import mlp_scales, value_scales


def solve_basis(
    model: BlockwiseModel,
    layout: ArchitectureLayout,
    rotation: Rotation,
    smoothing: Smoothing,
    samples: ActivationSamples,
    progress: Progress,
) -> tuple[Basis, list[RotationTraining]]:
    """The basis that the settings describe, and how its learned rotations were learned."""
    basis = Basis(r4="R4" in rotation.parts)
    if isinstance(smoothing, SmoothQuant):
        if smoothing.o_proj:
            basis = replace(basis, value_scales=value_scales(model, layout, samples, smoothing))
        if smoothing.down_proj:
            basis = replace(basis, mlp_scales=mlp_scales(model, layout, samples, smoothing))
    if isinstance(rotation, HadamardRotation):
        return _random(layout, rotation, basis, len(model)), []
    if isinstance(rotation, LearnedRotation):
        return _learned(model, layout, rotation, basis, samples, progress)
    return basis, []


def hadamard_constructions(layout: ArchitectureLayout, rotation: Rotation) -> list[str]:
    """The constructions of the Hadamard matrices that a rotation consists of, or starts from."""
    sizes = {"R1": layout.hidden_size, "R2": layout.head_dim, "R4": layout.intermediate_size}
    parts = rotation.parts
    if isinstance(rotation, LearnedRotation) and "hadamard" not in rotation.init:
        parts = [part for part in parts if part == "R4"]
    return [f"{part}: {construction(sizes[part])}" for part in parts]


def _random(layout: ArchitectureLayout, rotation: HadamardRotation, basis: Basis, blocks: int) -> Basis:
    generator = torch.Generator().manual_seed(rotation.seed)
    if rotation.r1:
        basis = replace(basis, r1=random_hadamard(layout.hidden_size, generator))
    if rotation.r2:
        heads = [random_hadamard(layout.head_dim, generator) for _ in range(blocks * layout.num_kv_heads)]
        basis = replace(basis, r2=torch.stack(heads).unflatten(0, (blocks, layout.num_kv_heads)))
    return basis


def _learned(
    model: BlockwiseModel,
    layout: ArchitectureLayout,
    rotation: LearnedRotation,
    basis: Basis,
    samples: ActivationSamples,
    progress: Progress,
) -> tuple[Basis, list[RotationTraining]]:
    generator = torch.Generator().manual_seed(rotation.seed)
    training: list[RotationTraining] = []
    if rotation.r1:
        residual = samples.residual()
        mean = residual.mean(dim=(0, 1), dtype=torch.float32)
        start = initial_rotation(layout.hidden_size, rotation.init, generator, mean)
        r1, record = learn_r1(residual, start, rotation, model.device, progress)
        basis = replace(basis, r1=r1)
        training.append(record)
        del residual
    if rotation.r2:
        blocks = []
        with progress.bar("learn R2", len(model)) as bar:
            for block in range(len(model)):
                inputs = basis.smooth_values(samples.read(block)["o_proj"].float(), block)
                means = inputs.reshape(len(inputs), layout.num_kv_heads, -1, layout.head_dim).mean(dim=(0, 2))
                heads = [initial_rotation(layout.head_dim, rotation.init, generator, mean) for mean in means]
                name = f"R2 of block {block}"
                r2, record = learn_r2(name, inputs, torch.stack(heads), rotation, model.device, progress.pause)
                bar.advance(status=f"SQNR {sqnr_db(record.error_after):.1f} dB")
                blocks.append(r2)
                training.append(record)
        basis = replace(basis, r2=torch.stack(blocks))
    return basis, training
