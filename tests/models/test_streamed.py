"""The streamed model computes what transformers computes, for every family, with one block in memory at a time."""

from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import FAMILIES, GROUPED, WRAPPERS, auto_class, edit_config, write_checkpoint
from transformers import AutoModelForCausalLM

from jointq_cli.errors import ModelError
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.streamed import StreamedModel

CPU = torch.device("cpu")


def windows(count: int = 5, tokens: int = 24) -> torch.Tensor:
    return torch.randint(3, 256, (count, tokens), generator=torch.Generator().manual_seed(1))


def walk(model: StreamedModel, ids: torch.Tensor, batch: int) -> torch.Tensor:
    hidden = model.embed_all(ids, batch)
    for index in range(len(model)):
        with model.block(index, model.block_tensors(index)):
            model.run_all(index, hidden, batch)
    with model.outer():
        return model.logits(hidden)


@pytest.mark.parametrize("family", [*FAMILIES, *WRAPPERS])
@torch.no_grad()
def test_running_block_by_block_gives_the_logits_of_transformers(family: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, family)
    expected = auto_class(family).from_pretrained(directory, dtype=torch.float32).eval()(windows()).logits
    streamed = StreamedModel(Checkpoint(directory), CPU, torch.float32)
    torch.testing.assert_close(walk(streamed, windows(), batch=2), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "falcon"])
@torch.no_grad()
def test_logits_need_no_forward_pass_before_them(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path, family))
    hidden = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    walked, fresh = (StreamedModel(checkpoint, CPU, torch.float32) for _ in range(2))
    walk(walked, windows(), batch=5)
    with walked.outer(), fresh.outer():
        assert torch.equal(walked.logits(hidden), fresh.logits(hidden))


MIXERS = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 256}
WITH_MORE_OUTPUTS = {  # blocks return two values (Bamba), three (RWKV), and a list (the first GPT)
    "bamba": lambda: transformers.BambaConfig(
        **{**GROUPED, "num_hidden_layers": 2}, attn_layer_indices=[1],
        mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1,
    ),
    "openai-gpt": lambda: transformers.OpenAIGPTConfig(
        n_embd=64, n_layer=2, n_head=4, n_positions=64, vocab_size=256
    ),
    "rwkv": lambda: transformers.RwkvConfig(**MIXERS, context_length=64),
}  # fmt: skip


@pytest.mark.parametrize("family", WITH_MORE_OUTPUTS)
@torch.no_grad()
def test_blocks_may_return_more_than_hidden_states(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, family, WITH_MORE_OUTPUTS[family])
    directory = write_checkpoint(tmp_path, family)
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    expected = loaded(windows(), use_cache=False).logits
    streamed = StreamedModel(Checkpoint(directory), CPU, torch.float32)
    torch.testing.assert_close(walk(streamed, windows(), batch=2), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_blocks_hand_to_the_next_block_is_no_reason_to_run_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zaya's routers read those of the block before: run with None, each block would compute something else."""
    config = transformers.ZayaConfig(
        **GROUPED, head_dim=16, num_experts=4, num_experts_per_tok=1, moe_intermediate_size=64
    )
    monkeypatch.setitem(FAMILIES, "zaya", lambda: config)
    streamed = StreamedModel(Checkpoint(write_checkpoint(tmp_path, "zaya")), CPU, torch.float32)
    with pytest.raises(ModelError, match="passes to each block what the block before it returns beside"):
        walk(streamed, windows(), batch=2)


PER_LAYER = {
    **GROUPED, "num_hidden_layers": 2, "head_dim": 16, "vocab_size_per_layer_input": 256,
    "hidden_size_per_layer_input": 16, "sliding_window": 8, "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
REFUSED = {
    "gemma3n": (
        lambda: transformers.Gemma3nTextConfig(
            **PER_LAYER, altup_num_inputs=2, laurel_rank=8, activation_sparsity_pattern=[0.0, 0.0]
        ),
        r"hidden states of shape \[2, 1, 3, 64\], not \(batch, tokens, hidden\)",
    ),
    "gemma4": (
        lambda: transformers.Gemma4TextConfig(**PER_LAYER),
        "passes its blocks per_layer_input beside the hidden states, which depends on the tokens",
    ),
    "xlnet": (
        lambda: transformers.XLNetConfig(d_model=64, n_layer=2, n_head=4, d_inner=128, vocab_size=256),
        r"hidden states of shape \[3, 1, 64\], not \(batch, tokens, hidden\)",
    ),
    "zamba2": (
        lambda: transformers.Zamba2Config(
            **{**GROUPED, "num_key_value_heads": 4, "num_hidden_layers": 4}, num_mem_blocks=1, mamba_d_state=16,
            n_mamba_heads=8, mamba_headdim=16, mamba_ngroups=1, layers_block_type=["mamba", "hybrid"] * 2,
        ),
        "passes its blocks original_hidden_states beside the hidden states, which depends on the tokens",
    ),
}  # fmt: skip


@torch.no_grad()
def test_logits_do_not_depend_on_what_the_config_lets_a_model_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1}
    monkeypatch.setitem(FAMILIES, "granitemoe", lambda: transformers.GraniteMoeConfig(**sizes))
    directory = write_checkpoint(tmp_path, "granitemoe")
    plain = walk(StreamedModel(Checkpoint(directory), CPU, torch.float32), windows(), batch=5)
    edit_config(directory, return_dict=False, output_router_logits=True)
    assert torch.equal(walk(StreamedModel(Checkpoint(directory), CPU, torch.float32), windows(), batch=5), plain)


@torch.no_grad()
@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_run_block_by_block_is_refused_with_the_reason_before_any_weight_is_read(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, reason = REFUSED[family]
    monkeypatch.setitem(FAMILIES, family, config)
    checkpoint = Checkpoint(write_checkpoint(tmp_path, family))
    monkeypatch.setattr(Checkpoint, "read", None)
    with pytest.raises(ModelError, match=reason):
        StreamedModel(checkpoint, CPU, torch.float32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "bart", "is_encoder_decoder": True}, "bart has an encoder and a decoder"),
        ({"model_type": "vit"}, "transformers has no causal language model for model_type vit"),
    ],
)
def test_what_is_no_decoder_only_language_model_is_refused(
    change: dict[str, object], reason: str, tmp_path: Path
) -> None:
    directory = write_checkpoint(tmp_path)
    edit_config(directory, **change)
    with pytest.raises(ModelError, match=reason):
        StreamedModel(Checkpoint(directory), CPU, torch.float32)


@torch.no_grad()
def test_of_a_wrapper_the_vision_tower_is_not_loaded(tmp_path: Path) -> None:
    model = StreamedModel(Checkpoint(write_checkpoint(tmp_path, "smolvlm")), CPU, torch.float32)
    assert model.prefix(1) == "model.text_model.layers.1."
    with model.outer():
        loaded = {name for name, parameter in model.module.named_parameters() if not parameter.is_meta}
    assert loaded == {
        "lm_head.weight",
        "model.text_model.embed_tokens.weight",
        "model.text_model.norm.weight",
        "model.vision_model.embeddings.patch_embedding.weight",  # says on which device the model is
    }


@torch.no_grad()
def test_a_head_that_differs_from_its_tied_embeddings_is_loaded(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    edit_config(directory, tie_word_embeddings=True)
    expected = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()(windows()).logits
    model = StreamedModel(Checkpoint(directory), CPU, torch.float32)
    for _ in range(2):
        torch.testing.assert_close(walk(model, windows(), batch=5), expected, rtol=1e-5, atol=1e-5)


def test_remote_code_is_part_of_the_identity_only_if_it_is_trusted(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")

    def identity(trust: bool) -> list[str | None]:
        return StreamedModel(Checkpoint(directory, "hash"), torch.device("cpu"), torch.float32, trust).identity

    (directory / "mine.py").write_text("scale = 1.0")
    alone, trusted = identity(False), identity(True)
    (directory / "mine.py").write_text("scale = 0.1")
    assert identity(False) == alone
    assert identity(True) != trusted


def test_ids_beyond_the_vocabulary_are_refused_in_one_line(tmp_path: Path) -> None:
    model = StreamedModel(Checkpoint(write_checkpoint(tmp_path)), CPU, torch.float32)
    with pytest.raises(ModelError, match="ids up to 999"):
        model.embed_all(torch.full((1, 4), 999), batch=1)


@torch.no_grad()
def test_outside_its_contexts_no_parameter_is_in_memory(tmp_path: Path) -> None:
    model = StreamedModel(Checkpoint(write_checkpoint(tmp_path, "llama_tied")), CPU, torch.float32)
    model.embed_all(windows(), 2)
    assert all(parameter.is_meta for parameter in model.module.parameters())
    with model.block(1, model.block_tensors(1)):
        loaded = {name.split(".")[2] for name, p in model.module.named_parameters() if not p.is_meta}
        assert loaded == {"1"}
    assert all(parameter.is_meta for parameter in model.module.parameters())


@torch.no_grad()
def test_every_source_tensor_belongs_to_one_block_or_to_none(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path, "gpt_neox"))
    model = StreamedModel(checkpoint, CPU, torch.float32)
    parts = [model.outer_tensors(), *(model.block_tensors(index) for index in range(len(model)))]
    names = [name for part in parts for name in part]
    assert sorted(names) == sorted(checkpoint.tensors)


def test_a_checkpoint_that_lacks_a_tensor_is_refused_by_name(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    edit_config(directory, num_hidden_layers=4)
    with pytest.raises(ModelError, match=r"lacks 9 of the .* tensors of LlamaForCausalLM, model\.layers\.3"):
        StreamedModel(Checkpoint(directory), CPU, torch.float32)


def test_a_tensor_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    edit_config(directory, intermediate_size=96)
    with pytest.raises(
        ModelError, match=r"mlp\.gate_proj\.weight has shape \[128, 64\], but config.json asks for \[96, 64\]"
    ):
        StreamedModel(Checkpoint(directory), CPU, torch.float32)


def test_an_unknown_architecture_is_refused_in_one_line(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    edit_config(directory, model_type="nonesuch")
    with pytest.raises(ModelError) as error:
        StreamedModel(Checkpoint(directory), CPU, torch.float32)
    assert "\n" not in str(error.value)
    assert "nonesuch" in str(error.value)
