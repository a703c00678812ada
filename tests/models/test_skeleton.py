"""A model built without weights has the buffers of the model that transformers loads."""

from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import FAMILIES, auto_class, write_checkpoint

from jointq_cli.errors import ModelError
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.skeleton import build_skeleton, find_blocks

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


def test_blocks_of_an_image_encoder_are_not_those_of_the_text() -> None:
    large = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.device("meta"):
        model = transformers.GitForCausalLM(transformers.GitConfig(vision_config=large, vocab_size=64, **small))
    assert find_blocks(model)[0] == "git.encoder.layer"


def test_a_model_whose_layers_are_in_two_lists_is_refused() -> None:
    """XLM has its attentions in one list and its MLPs in another, so that quantising one would be half of it."""
    config = transformers.XLMConfig(emb_dim=64, n_layers=2, n_heads=4, vocab_size=64)
    with torch.device("meta"), pytest.raises(ModelError, match=r"layers in transformer\.ffns and in transformer\.att"):
        find_blocks(transformers.XLMWithLMHeadModel(config))
