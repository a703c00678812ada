"""Random checkpoints of a few thousand parameters, one per model family that the engine is tested with."""

import json
from pathlib import Path

import torch
import transformers
from expert_model import CalledConfig, ExpertsConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.utils import logging

logging.disable_progress_bar()

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}

FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "llama_tied": lambda: transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "llama_bias": lambda: transformers.LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=8),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "qwen2_tied": lambda: transformers.Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=16),
    "gemma": lambda: transformers.GemmaConfig(**GROUPED, head_dim=16),
    "gemma2": lambda: transformers.Gemma2Config(**GROUPED, head_dim=16, sliding_window=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **GROUPED,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": lambda: transformers.Phi3Config(**GROUPED),
    "olmo2": lambda: transformers.Olmo2Config(**GROUPED),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=64, n_layer=3, n_head=4, n_positions=64, vocab_size=256, bos_token_id=0, eos_token_id=1
    ),  # its layers are Conv1D
    "falcon": lambda: transformers.FalconConfig(**SIZES),  # its blocks return tuples
}

MOE = {**GROUPED, "num_hidden_layers": 2, "intermediate_size": 96, "num_experts_per_tok": 2}
QWEN_MOE = {**MOE, "num_experts": 4, "moe_intermediate_size": 32}
DEEPSEEK = {
    **QWEN_MOE,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
LATENT = {**DEEPSEEK, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32}
LATENT |= {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
MIXED_LAYERS = {"layer_types": ["linear_attention", "full_attention"]}
LINEAR_ATTENTION = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "shared_expert_intermediate_size": 32,
    **MIXED_LAYERS,
}

EXPERTS = {  # their experts are parameters, not linear layers, except for the first two
    "llama_called_experts": lambda: CalledConfig(**{**GROUPED, "num_hidden_layers": 2, "intermediate_size": 32}),
    "llama_experts": lambda: ExpertsConfig(**{**GROUPED, "num_hidden_layers": 2, "intermediate_size": 32}),
    "granitemoe": lambda: transformers.GraniteMoeConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "llama4": lambda: transformers.Llama4TextConfig(
        **GROUPED,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        intermediate_size_mlp=128,
        interleave_moe_layer_step=1,
        attention_chunk_size=32,
    ),
    "mixtral": lambda: transformers.MixtralConfig(**MOE, num_local_experts=4),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**QWEN_MOE, shared_expert_intermediate_size=32),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**QWEN_MOE, head_dim=16),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(**QWEN_MOE, **LINEAR_ATTENTION, head_dim=16),
    "qwen3_5_moe": lambda: transformers.Qwen3_5MoeTextConfig(**QWEN_MOE, **LINEAR_ATTENTION, head_dim=16),
    "olmoe": lambda: transformers.OlmoeConfig(**QWEN_MOE),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **MOE,
        head_dim=16,
        num_local_experts=4,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "deepseek_v2": lambda: transformers.DeepseekV2Config(**LATENT),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(**LATENT),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(**DEEPSEEK, head_dim=16),
    "ernie4_5_moe": lambda: transformers.Ernie4_5_MoeConfig(
        **QWEN_MOE, moe_num_experts=4, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=1
    ),
    "phimoe": lambda: transformers.PhimoeConfig(**MOE, num_local_experts=4),
    "lfm2_moe": lambda: transformers.Lfm2MoeConfig(
        **QWEN_MOE, num_dense_layers=1, layer_types=["conv", "full_attention"]
    ),
    "minimax": lambda: transformers.MiniMaxConfig(
        **MOE, num_local_experts=4, head_dim=16, block_size=8, **MIXED_LAYERS
    ),
    "jamba": lambda: transformers.JambaConfig(
        **MOE,
        num_experts=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=8,
        use_mamba_kernels=False,
    ),
    "jetmoe": lambda: transformers.JetMoeConfig(**MOE, kv_channels=16, num_local_experts=4),
    "longcat_flash": lambda: transformers.LongcatFlashConfig(
        **{**LATENT, "num_layers": 1},
        head_dim=16,
        ffn_hidden_size=96,
        expert_ffn_hidden_size=32,
        zero_expert_num=2,
        moe_topk=2,
    ),
    "gemma4_moe": lambda: transformers.Gemma4TextConfig(
        **QWEN_MOE,
        head_dim=16,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=256,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        num_kv_shared_layers=0,
        enable_moe_block=True,
        top_k_experts=2,
    ),
    "nemotron_h": lambda: transformers.NemotronHConfig(
        **QWEN_MOE,
        head_dim=16,
        layers_block_type=["attention", "moe"],
        n_routed_experts=4,
        moe_shared_expert_intermediate_size=32,
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=1,
    ),
    "granitemoehybrid": lambda: transformers.GraniteMoeHybridConfig(
        **MOE,
        num_local_experts=4,
        shared_intermediate_size=32,
        layer_types=["mamba", "attention"],
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_d_state=16,
        mamba_n_groups=1,
    ),
}


# A language model with a vision tower that has the larger list of blocks.
VISION = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
TEXT = {**GROUPED, "head_dim": 16, "num_hidden_layers": 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
QWEN_VISION = {"depth": 6, "hidden_size": 96, "intermediate_size": 192, "num_heads": 4, "out_hidden_size": 64}

WRAPPERS = {
    "qwen2_5_vl": lambda: transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": ROPE},
        vision_config={**QWEN_VISION, "window_size": 56, "fullatt_block_indexes": [1]},
        image_token_id=250,
        video_token_id=251,
        vision_start_token_id=252,
        vision_end_token_id=253,
    ),
    "qwen3_vl": lambda: transformers.Qwen3VLConfig(
        text_config={**TEXT, "rope_parameters": ROPE},
        vision_config={**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        image_token_id=250,
        video_token_id=251,
        vision_start_token_id=252,
        vision_end_token_id=253,
    ),
    "mistral3": lambda: transformers.Mistral3Config(  # its head is tied
        text_config={**TEXT, "model_type": "mistral"},
        vision_config={**VISION, "model_type": "pixtral"},
        image_token_index=250,
    ),
    "smolvlm": lambda: transformers.SmolVLMConfig(
        text_config={**TEXT, "model_type": "llama"}, vision_config=VISION, image_token_id=250, scale_factor=2
    ),
    "idefics3": lambda: transformers.Idefics3Config(  # takes the device of its inputs from the vision tower
        text_config={**TEXT, "model_type": "llama"}, vision_config=VISION, image_token_id=250, scale_factor=2
    ),
    "gemma3_vl": lambda: transformers.Gemma3Config(
        text_config={**TEXT, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=250,
    ),
}


def auto_class(family: str) -> type:
    """The class of plain transformers that loads a checkpoint of this family."""
    return AutoModelForImageTextToText if family in WRAPPERS else AutoModelForCausalLM


def write_checkpoint(
    directory: Path,
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    shard: str = "5GB",
    norm_spread: float = 0.0,
    **changes: object,
) -> Path:
    """A random model of `family` in `directory`, the same one every time.

    norm_spread: of the norms' weights around their initial ones or zeros, with which fusing them would be no test.
    """
    config = (FAMILIES | EXPERTS | WRAPPERS)[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto_class(family).from_config(config).to(dtype)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:  # transformers' initial 0.02 would leave every block's output near zero
                parameter.data = torch.randn_like(parameter) * parameter.shape[1] ** -0.5
            elif "norm" not in name:
                parameter.data = torch.randn_like(parameter) * 0.1
            elif norm_spread > 0:
                parameter.data += torch.randn_like(parameter) * norm_spread
    model.save_pretrained(directory, max_shard_size=shard)
    write_tokenizer(directory)
    return directory


def write_tokenizer(directory: Path) -> None:
    """One token per byte; ids 0, 1 and 2 are BOS, EOS and padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: SIZES["vocab_size"] - 3]
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            pre_tokenizers.Split("", "isolated"),
        ]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(directory)


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
