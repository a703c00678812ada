"""Texts that a streamed model writes are those of the complete model in transformers."""

from pathlib import Path

import pytest
import torch
from tiny_models import write_checkpoint
from transformers import AutoModelForCausalLM

from jointq_cli.data.tokenizer import load_tokenizer
from jointq_cli.evaluation import generation
from jointq_cli.evaluation.generation import PROMPTS, generate, prompt_ids, why_not
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.sources import BUNDLED
from jointq_cli.models.streamed import StreamedModel


def streamed(directory: Path) -> StreamedModel:
    return StreamedModel(Checkpoint(directory), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_each_token_is_the_most_likely_one_after_those_before_it(tmp_path: Path, family: str) -> None:
    write_checkpoint(tmp_path, family)
    ids = torch.tensor([[5, 6, 7], [9, 8, 7]])
    with torch.no_grad():
        model = streamed(tmp_path)
        found = generate(model, ids, 6)
        complete = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        for _ in range(6):
            ids = torch.cat([ids, complete(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, ids[:, 3:])
    assert all(parameter.is_meta for parameter in model.module.parameters())  # unloaded again


def test_prompts_are_of_one_length() -> None:
    tokenizer = load_tokenizer(BUNDLED, trust_remote_code=False)
    ids = prompt_ids(tokenizer)
    assert ids.shape[0] == len(PROMPTS)
    assert all(prompt.startswith(tokenizer.decode(one)) for prompt, one in zip(PROMPTS, ids, strict=True))


def test_a_large_model_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, "llama")
    assert why_not(streamed(tmp_path)) == ""
    monkeypatch.setattr(generation, "LARGEST", 1e3)
    assert "1e-06 GB are the most" in why_not(streamed(tmp_path))
