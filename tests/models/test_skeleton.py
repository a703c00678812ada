"""A model built without weights has the buffers of the model that transformers loads."""

from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import FAMILIES, auto_class, write_checkpoint

from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.skeleton import build_skeleton

ROTARY = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 256, "rotary_dim": 8}
MORE = {  # these keep a table of positions in a buffer
    "gptj": lambda: transformers.GPTJConfig(**ROTARY),
    "codegen": lambda: transformers.CodeGenConfig(**ROTARY),
    "xglm": lambda: transformers.XGLMConfig(d_model=64, ffn_dim=128, num_layers=2, attention_heads=4, vocab_size=256),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", [*FAMILIES, *MORE, "qwen2_5_vl", "gemma3_vl"])
def test_buffers_are_those_of_transformers_to_the_bit(
    family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family in MORE:
        monkeypatch.setitem(FAMILIES, family, MORE[family])
    directory = write_checkpoint(tmp_path, family, dtype=dtype)
    module = build_skeleton(Checkpoint(directory), dtype, trust_remote_code=False)
    loaded = auto_class(family).from_pretrained(directory, dtype=dtype)
    persistent = module.state_dict().keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name not in persistent}
    expected = {name: buffer for name, buffer in loaded.named_buffers() if name not in persistent}
    assert buffers.keys() == expected.keys()
    for name, buffer in buffers.items():
        assert buffer.dtype == expected[name].dtype
        assert torch.equal(buffer, expected[name]), name
