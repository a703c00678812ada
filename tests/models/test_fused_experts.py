"""Fused experts become linear layers that compute the same, and are stored where the source has them."""

from pathlib import Path

import pytest
import torch
from loop_cases import CPU, quantize, windows
from tiny_models import EXPERTS, write_checkpoint
from transformers import AutoModelForCausalLM

from jointq_cli.formats.audit import audit
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.experts import Experts
from jointq_cli.models.forward import final_hidden
from jointq_cli.models.streamed import StreamedModel

FUSED = [family for family in EXPERTS if family != "llama_experts"]  # whose experts are a ModuleList


def logits(model: StreamedModel) -> torch.Tensor:
    hidden = final_hidden(model, windows(), batch=3)
    with model.outer():
        return model.logits(hidden)


def transformers_logits(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model(windows(), use_cache=False).logits


@pytest.mark.parametrize("family", FUSED)
@torch.no_grad()
def test_experts_are_quantised_one_by_one_and_stored_as_the_source_stores_them(family: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "source", family)
    names = ("gate_proj", "up_proj", "down_proj")
    model, workspace, records = quantize(directory, tmp_path / "work", keep=lambda name: name.endswith(names))
    assert any(isinstance(part, Experts) for part in model.module.modules())
    assert not model.whole_experts
    assert not [name for name, parameter in model.module.named_parameters() if name.endswith("experts.down_proj")]
    torch.testing.assert_close(logits(model), transformers_logits(directory), rtol=1e-5, atol=1e-5)

    quantized = Checkpoint(tmp_path / "work" / "checkpoint")
    reloaded = StreamedModel(quantized, CPU, torch.float32)
    expected = logits(reloaded)
    assert not torch.allclose(expected, logits(model), rtol=1e-3)
    torch.testing.assert_close(expected, transformers_logits(quantized.directory), rtol=1e-5, atol=1e-5)
    found = audit(model, quantized, records, workspace.directory / "layers")
    assert not found.changed + found.missing + found.unexpected
    assert found.quantized > 0
