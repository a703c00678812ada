"""Fused experts become linear layers that compute the same, and are stored where the source has them."""

from pathlib import Path

import pytest
import torch
from loop_cases import CPU, quantize, windows
from safetensors.torch import load_file, save_file
from tiny_models import EXPERTS, write_checkpoint
from torch import nn
from transformers import AutoModelForCausalLM

from jointq_cli.formats.audit import audit
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.experts import Experts, split_experts
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


def is_of_experts(name: str) -> bool:
    return ".experts." in name or "_linear." in name  # the latter in JetMoE


@pytest.mark.parametrize("family", FUSED)
@torch.no_grad()
def test_experts_are_quantised_one_by_one_and_stored_as_the_source_stores_them(family: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "source", family)
    model, workspace, records = quantize(directory, tmp_path / "work", keep=is_of_experts)
    assert len(records) >= 2 * 2
    assert not model.unsplit_experts
    assert not [
        name for name, parameter in model.module.named_parameters() if parameter.dim() == 3 and is_of_experts(name)
    ]
    torch.testing.assert_close(logits(model), transformers_logits(directory), rtol=1e-5, atol=1e-5)

    quantized = Checkpoint(tmp_path / "work" / "checkpoint")
    reloaded = StreamedModel(quantized, CPU, torch.float32)
    expected = logits(reloaded)
    assert not torch.allclose(expected, logits(model), rtol=1e-3)
    torch.testing.assert_close(expected, transformers_logits(quantized.directory), rtol=1e-5, atol=1e-5)
    found = audit(model, quantized, records, workspace.directory / "layers")
    assert not found.changed + found.missing + found.unexpected
    assert found.quantized > 0


class OtherExperts(nn.Module):
    """Has the parameters of Mixtral's, and computes something else."""

    def __init__(self, act_fn: nn.Module, factor: float) -> None:
        super().__init__()
        self.num_experts = 4
        self.gate_up_proj = nn.Parameter(torch.empty(4, 64, 16, device="meta"))
        self.down_proj = nn.Parameter(torch.empty(4, 16, 32, device="meta"))
        self.act_fn, self.factor = act_fn, factor

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(hidden_states)
        for token, chosen in enumerate(top_k_index.tolist()):
            for expert, weight in zip(chosen, weights[token], strict=True):
                gate, up = (self.gate_up_proj[expert] @ hidden_states[token]).chunk(2)
                output[token] += weight * self.factor * (self.down_proj[expert] @ (self.act_fn(gate) * up))
        return output


@pytest.mark.parametrize(("factor", "reason"), [(1.0, ""), (1.1, "something else than its experts one by one")])
def test_experts_that_compute_something_else_are_left_as_they_are(factor: float, reason: str) -> None:
    model = nn.ModuleDict({"mlp": OtherExperts(nn.SiLU(), factor)})
    places, unsplit = split_experts(model)
    assert reason in unsplit.get("mlp", "")
    assert isinstance(model["mlp"], OtherExperts if reason else Experts)
    assert len(places) == (0 if reason else 4 * 3)


def test_parameters_that_seem_to_hold_experts_are_named() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrices = nn.Parameter(torch.empty(4, 8, 16))

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden @ self.matrices

    model = nn.ModuleDict({"mixture": Mixture(), "conv": nn.Conv1d(4, 4, 3)})
    assert split_experts(model) == ({}, {"mixture": "what Mixture computes with its matrices is not known here"})


def test_the_audit_sees_a_change_beside_a_quantised_layer_in_the_same_tensor(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "source", "gpt_oss")
    model, workspace, records = quantize(directory, tmp_path / "work", keep=lambda name: name.endswith("1.up_proj"))
    result, codes = Checkpoint(tmp_path / "work" / "checkpoint"), workspace.directory / "layers"
    found = audit(model, result, records, codes)
    assert (found.changed, found.quantized) == ([], 2)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert (result.read([name])[name] == model.checkpoint.read([name])[name]).float().mean() > 0.8
    shard = result.tensors[name].file
    tensors = load_file(shard)
    tensors[name][2, 5, 7] += 1
    save_file(tensors, shard, {"format": "pt"})
    assert audit(model, Checkpoint(result.directory), records, codes).changed == [name]
