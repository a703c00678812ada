"""Conversions of transformers as views of stored tensors, against what transformers computes."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_checkpoint
from torch import Tensor
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    PermuteForRope,
    Transpose,
    WeightConverter,
)

from jointq_cli.errors import ModelError
from jointq_cli.models import stored_parts
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.stored_parts import Location, View
from jointq_cli.models.streamed import StreamedModel

EACH, GATE, UP = "experts.*.down.weight", "experts.*.gate.weight", "experts.*.up.weight"


@pytest.mark.parametrize(
    ("sources", "targets", "operations", "count", "shape"),
    [
        ([EACH], ["down"], [MergeModulelist(dim=0)], 3, (4, 6)),
        ([GATE, UP], ["gate_up"], [MergeModulelist(dim=0), Concatenate(dim=1)], 3, (4, 6)),
        (["gate", "up"], ["gate_up"], [Concatenate(dim=1)], 1, (3, 4, 6)),
        (["gate", "up"], ["gate_up"], [Concatenate(dim=0)], 1, (4, 6)),
        (["gate_up"], ["gate_up"], [Transpose(1, 2)], 1, (3, 4, 6)),
        (["w13"], ["gate_up"], [Interleave(dim=1)], 1, (3, 4, 6)),
        (["qkv"], ["q", "k", "v"], [Chunk(dim=0)], 1, (9, 5)),
    ],
)
def test_parameters_are_read_from_and_written_to_where_they_are_stored(
    sources: list[str],
    targets: list[str],
    operations: list[ConversionOps],
    count: int,
    shape: tuple[int, ...],
) -> None:
    random = torch.Generator().manual_seed(0)
    tensors = {f"{each}{n}": torch.randn(shape, generator=random) for each in sources for n in range(count)}
    by_source = {each: [f"{each}{n}" for n in range(count)] for each in sources}
    expected = {each: [tensors[name] for name in names] for each, names in by_source.items()}
    for operation in operations:
        expected = operation.convert(expected, source_patterns=sources, target_patterns=targets)

    views = {each: [View(name, tensors[name], tensors[name]) for name in names] for each, names in by_source.items()}
    converted = stored_parts._converted(WeightConverter(sources, targets, operations), views, torch.Size())
    written: dict[str, Tensor] = {name: torch.zeros(shape) for name in tensors}
    for target, pieces in zip(targets, converted, strict=True):
        location = Location(tuple(tuple(view.part() for view in row) for row in pieces))
        assert torch.equal(location.read(tensors), expected[target])
        assert location.shape == tuple(expected[target].shape)
        location.write(expected[target], written)
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)


def test_a_conversion_that_is_no_view_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converter = partial(WeightConverter, "self_attn.q_proj.weight", "self_attn.q_proj.weight")
    rope = converter(operations=[PermuteForRope()])
    monkeypatch.setattr(stored_parts, "get_model_conversion_mapping", lambda module: [rope])
    with pytest.raises(ModelError, match=r"stores \S+self_attn.q_proj.weight in another layout .*PermuteForRope"):
        StreamedModel(Checkpoint(write_checkpoint(tmp_path)), torch.device("cpu"), torch.float32)


def test_an_expert_that_is_not_stored_is_missing(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path, "mixtral") / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of .* model.layers.1.mlp.experts.3.down_proj.weight first"):
        StreamedModel(Checkpoint(tmp_path), torch.device("cpu"), torch.float32)
