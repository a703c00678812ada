"""Gradients block by block: those of plain autograd over the whole model, in parts, resumed, and of experts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loop_cases import CPU, file_hashes
from tiny_models import write_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization import gradients as module
from jointq_cli.quantization.gradients import Gradients, collect_gradients, output_groups

TOKENS = torch.randint(3, 256, (5, 12), generator=torch.Generator().manual_seed(1))


class Stop(Exception):
    pass


def opened(directory: Path) -> tuple[StreamedModel, frozenset[str]]:
    model = StreamedModel(Checkpoint(directory), CPU, torch.float32)
    return model, frozenset(name for name in model.linear_layers() if model.block_of(name) is not None)


def collected(directory: Path, place: Path, batch: int = 2, pause: Callable[[], None] = lambda: None) -> Gradients:
    place.mkdir(exist_ok=True)
    model, _ = opened(directory)
    with torch.no_grad():
        collect_gradients(model, TOKENS, 7, batch, Gradients(place), lambda: None, pause)
    return Gradients(place)


def by_autograd(directory: Path) -> dict[str, Tensor]:
    """The gradient of each linear layer's output (windows, tokens, out)."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    logits = model(TOKENS).logits
    draws = torch.rand(TOKENS.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    cumulated = logits.detach().double().softmax(-1).cumsum(-1)
    labels = (cumulated < draws[..., None]).sum(-1)
    found: dict[str, Tensor] = {}
    for name in opened(directory)[1]:
        layer = model.get_submodule(name)
        layer.register_forward_hook(
            lambda _, args, output, name=name: output.register_hook(lambda g: found.update({name: g})) and None
        )
    torch.nn.functional.cross_entropy(model(TOKENS).logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    return found


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
def test_are_those_of_autograd_over_the_whole_model(tmp_path: Path, family: str) -> None:
    directory = write_checkpoint(tmp_path / "model", family)
    expected, model = by_autograd(directory), opened(directory)[0]
    gradients = collected(directory, tmp_path / "found")
    for name, layer in model.linear_layers().items():
        if name in expected:
            flat = expected[name].flatten(0, 1)
            [found] = gradients.outputs(model.block_of(name) or 0, layer, CPU)
            torch.testing.assert_close(found.float(), flat.T @ flat / len(flat), rtol=1e-3, atol=1e-9)
            energy = gradients.energies(model.block_of(name) or 0, name)
            torch.testing.assert_close(energy, expected[name].square().sum(-1), rtol=1e-3, atol=1e-9)


def test_wide_layers_keep_diagonal_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_checkpoint(tmp_path / "model", "llama")
    model, layer = opened(directory)[0], "model.layers.1.mlp.up_proj"
    [whole] = collected(directory, tmp_path / "whole").outputs(1, model.linear_layers()[layer], CPU)
    monkeypatch.setattr(module, "MOST_OUTPUTS", 50)
    parts = collected(directory, tmp_path / "parts").outputs(1, model.linear_layers()[layer], CPU)
    assert [len(part) for part in parts] == [42, 43, 43]
    for part, span in zip(parts, output_groups(len(whole)), strict=True):
        torch.testing.assert_close(part, whole[span, span], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("stop", [2, 5, 9, 11, 14])  # in the forward pass, at the head, in a block
def test_continue_with_the_same_bits(tmp_path: Path, stop: int) -> None:
    directory = write_checkpoint(tmp_path / "model", "llama")
    left = [stop]

    def pause() -> None:
        left[0] -= 1
        if not left[0]:
            raise Stop

    with pytest.raises(Stop):
        collected(directory, tmp_path / "stopped", pause=pause)
    assert left == [0]
    collected(directory, tmp_path / "stopped")
    collected(directory, tmp_path / "whole")
    assert file_hashes(tmp_path / "stopped") == file_hashes(tmp_path / "whole")
    assert not list((tmp_path / "whole").glob("entering-*"))


def test_an_expert_that_no_token_reaches_has_none(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", "granitemoe")
    model, layers = opened(directory)
    gradients = collected(directory, tmp_path / "found")
    reached = [bool(gradients.outputs(model.block_of(name) or 0, model.linear_layers()[name], CPU)) for name in layers]
    full = {name for name in layers if gradients.energies(model.block_of(name) or 0, name) is not None}
    assert any(reached)
    assert "model.layers.0.self_attn.q_proj" in full
    assert not any("experts" in name for name in full)
