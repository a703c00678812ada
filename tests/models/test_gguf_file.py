"""GGUF files: converted with nothing lost, or refused."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jointq_cli.errors import ModelError
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.gguf_file import convert_gguf
from jointq_cli.models.streamed import StreamedModel

THETA = 500000.0
CPU = torch.device("cpu")


def write_gguf(
    path: Path,
    metadata: dict[str, str | float | int] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    without: str = "",
) -> dict[str, np.ndarray]:
    """A tiny Llama with a byte-level BPE of no merges but one; returns its tensors. The extra tensors are added with
    these names, and the one `without` is left out."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(THETA)
    writer.add_vocab_size(64)
    tokens = ["<s>", "</s>", "th", *(chr(code) for code in range(ord("@"), ord("@") + 61))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * 62])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"token_embd": (64, 64), "output_norm": (64,), "output": (64, 64)}
    for block in range(2):
        attention = {
            "attn_norm": (64,),
            "attn_q": (64, 64),
            "attn_k": (32, 64),
            "attn_v": (32, 64),
            "attn_output": (64, 64),
        }
        mlp = {"ffn_norm": (64,), "ffn_gate": (128, 64), "ffn_up": (128, 64), "ffn_down": (64, 128)}
        shapes |= {f"blk.{block}.{name}": shape for name, shape in (attention | mlp).items()}
    random = np.random.default_rng(0)
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in {**{f"{name}.weight": tensor for name, tensor in tensors.items()}, **(extra or {})}.items():
        if name != without:
            writer.add_tensor(name, tensor)
    for key, value in (metadata or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint16}[type(value)]
        add(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def convert(directory: Path, **changes: Any) -> Checkpoint:
    write_gguf(directory / "tiny.gguf", **changes)
    target = directory / "converted"
    target.mkdir()
    convert_gguf(directory / "tiny.gguf", target)
    return Checkpoint(target)


def llama3_factors(**changes: Any) -> np.ndarray:
    """What the frequencies of the tiny Llama are divided by under Llama 3.1's scaling, as transformers computes it."""
    plain = AutoConfig.for_model("llama", hidden_size=64, num_attention_heads=4, rope_theta=THETA)
    scaling = {
        "rope_type": "llama3", "rope_theta": THETA, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, **changes,
    }  # fmt: skip
    scaled = AutoConfig.for_model("llama", hidden_size=64, num_attention_heads=4, rope_parameters=scaling)
    frequencies = THETA ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    assert plain.hidden_size // plain.num_attention_heads == 16
    return (frequencies / ROPE_INIT_FUNCTIONS["llama3"](scaled, CPU)[0].double()).float().numpy()


def test_a_gguf_file_is_converted_into_a_directory(tmp_path: Path) -> None:
    tensors = write_gguf(tmp_path / "tiny.gguf")
    checkpoint = convert(tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    expected = torch.from_numpy(tensors["blk.1.ffn_down"]).bfloat16()
    assert torch.equal(checkpoint.read([name])[name], expected)
    assert len(StreamedModel(checkpoint, CPU, torch.bfloat16)) == 2
    assert (checkpoint.directory / "tokenizer.json").exists()
    assert checkpoint.config["rope_parameters"] == {"rope_theta": THETA, "rope_type": "default"}


def test_a_broken_gguf_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(ModelError, match=r"x\.gguf: transformers cannot read this GGUF file"):
        convert_gguf(tmp_path / "x.gguf", tmp_path)


def test_a_file_of_a_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tiny\.gguf: is file 1 of 3 of a split GGUF; join them first"):
        convert(tmp_path, metadata={"split.count": 3, "split.no": 0})


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"lacks 1 tensors of LlamaForCausalLM, model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        convert(tmp_path, without="blk.1.ffn_up.weight")


def test_tied_embeddings_need_no_head(tmp_path: Path) -> None:
    assert convert(tmp_path, without="output.weight").config["tie_word_embeddings"] is True


def test_a_tensor_without_a_place_in_the_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds blk\.0\.attn_q\.bias, for which LlamaForCausalLM has no place"):
        convert(tmp_path, extra={"blk.0.attn_q.bias": np.ones(64, dtype=np.float32)})


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 16, "finetuned": 1, "yarn_beta_fast": 16.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16.0},
        ),
    ],
)
def test_the_scaling_of_rotary_embeddings_is_carried_over(
    metadata: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = convert(tmp_path, metadata={f"llama.rope.scaling.{key}": value for key, value in metadata.items()})
    assert checkpoint.config["rope_parameters"] == {"rope_theta": THETA, **expected}
    StreamedModel(checkpoint, CPU, torch.bfloat16)


def test_the_oldest_key_of_a_linear_scaling_is_read(tmp_path: Path) -> None:
    rope = convert(tmp_path, metadata={"llama.rope.scale_linear": 2.0}).config["rope_parameters"]
    assert rope == {"rope_theta": THETA, "rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"type": "longrope", "factor": 2.0}, "has rope.scaling.type=longrope, which cannot be carried over"),
        ({"type": "yarn", "factor": 2.0, "yarn_log_multiplier": 0.5}, "has rope.scaling.yarn_log_multiplier=0.5"),
    ],
)
def test_a_scaling_that_config_json_cannot_say_is_refused(
    metadata: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        convert(tmp_path, metadata={f"llama.rope.scaling.{key}": value for key, value in metadata.items()})


def test_the_factors_of_llama_3_become_its_parameters(tmp_path: Path) -> None:
    factors = llama3_factors()
    assert len(set(factors.round(4).tolist())) > 2  # those of high, low and medium frequencies
    rope = convert(tmp_path, extra={"rope_freqs.weight": factors}).config["rope_parameters"]
    assert rope == {
        "rope_type": "llama3", "rope_theta": THETA, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip


def test_other_factors_are_refused(tmp_path: Path) -> None:
    factors = llama3_factors(high_freq_factor=8.0)
    with pytest.raises(ModelError, match=r"rope_freqs\.weight, which is not the scaling of a Llama 3"):
        convert(tmp_path, extra={"rope_freqs.weight": factors})
