"""Tiny models and random bases, for the tests of what a merge does to them."""

from pathlib import Path
from typing import Any

import torch
from tiny_models import write_checkpoint
from torch import Tensor

from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.forward import final_hidden
from jointq_cli.models.streamed import BlockwiseModel, StreamedModel
from jointq_cli.models.tensor_source import TensorSource
from jointq_cli.transforms.architectures import ArchitectureLayout, layout_of
from jointq_cli.transforms.basis import Basis, RotatedTensors

CPU = torch.device("cpu")
ADMITS_R1 = ["llama", "llama_tied", "llama_bias", "mistral", "qwen2", "qwen2_tied", "qwen3", "gemma", "phi3"]
HAS_POST_NORMS = ["gemma2", "gemma3", "olmo2"]
TIED = ["llama_tied", "qwen2_tied", "gemma"]
PARTS = ["r1", "r2", "value_scales", "mlp_scales", "r4"]
ABSORBED = PARTS[:-1]
PROBE = torch.randint(3, 256, (1, 24), generator=torch.Generator().manual_seed(1))


def original(root: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> StreamedModel:
    """A random model with gains that are no ones; the same for all tests that share `root`."""
    words = [family, str(dtype), *(f"{name}={value}" for name, value in changes.items())]
    directory = root / " ".join(words)
    if not directory.exists():
        write_checkpoint(directory, family, dtype=dtype, norm_spread=0.3, **changes)
    return StreamedModel(Checkpoint(directory), CPU, dtype)


def tiny_layout(model: StreamedModel) -> ArchitectureLayout:
    return layout_of(model, r1=False)


def parts_of(family: str) -> list[str]:
    return [part for part in PARTS if family in ADMITS_R1 or part != "r1"]


def haar(size: int, generator: torch.Generator) -> Tensor:
    """(size, size) float64: neither symmetric nor anything else that would hide a wrong transpose."""
    q: Tensor = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    return q


def random_basis(model: StreamedModel, parts: list[str]) -> Basis:
    """Scales and rotations that differ from block to block and from head to head."""
    layout, blocks = tiny_layout(model), len(model)
    heads = (blocks, layout.num_kv_heads, layout.head_dim)
    generator = torch.Generator().manual_seed(2)

    def scales(*shape: int) -> Tensor:
        return 4.0 ** (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5)

    turns = [haar(layout.head_dim, generator) for _ in range(blocks * layout.num_kv_heads)]
    made: dict[str, Any] = {
        "r1": haar(layout.hidden_size, generator),
        "r2": torch.stack(turns).reshape(*heads, layout.head_dim),
        "value_scales": scales(*heads),
        "mlp_scales": scales(blocks, layout.intermediate_size),
        "r4": True,
    }
    return Basis(**{part: made[part] for part in parts})


def in_basis(model: StreamedModel, basis: Basis, directory: Path) -> RotatedTensors:
    directory.mkdir()
    rotated = RotatedTensors(model, tiny_layout(model), basis, directory)
    rotated.write_companions()
    return rotated


def logits_of(source: TensorSource, ids: Tensor = PROBE) -> Tensor:
    """(windows, tokens, vocabulary) float32."""
    model = BlockwiseModel(source, CPU, torch.float32)
    hidden = final_hidden(model, ids, batch=len(ids))
    with model.outer():
        return model.logits(hidden)


def distance(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())
