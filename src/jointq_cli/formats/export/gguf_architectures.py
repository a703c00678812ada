"""How a model's config and tensors are written in a GGUF file, by architecture. Sources: llama.cpp's
convert_hf_to_gguf.py (keys and tensors), its src/models (what is computed from them)."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from gguf import MODEL_ARCH, GGUFWriter
from torch import Tensor

from jointq_cli.errors import ConfigError
from jointq_cli.models.gguf_file import llama3_factors

ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Architecture:
    """permutes: whether rows of q_proj and k_proj are interleaved, for rotary embeddings of adjacent pairs.
    norm_offset: added to the weights of norms. check: raises ConfigError for a config that llama.cpp does not compute.
    """

    arch: MODEL_ARCH
    permutes: bool = False
    norm_offset: float = 0.0
    check: Callable[[Any], None] = lambda config: None
    keys: Callable[[GGUFWriter, Any], None] = lambda writer, config: None  # besides those of all architectures


def architecture_of(config: Any) -> Architecture:
    """config: of transformers. Raises ConfigError for an unknown architecture, or one with settings that llama.cpp does
    not know."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ConfigError(f"export=gguf: no support for the architecture {kind}; there are {', '.join(ARCHITECTURES)}")
    found = ARCHITECTURES[kind]
    rope = _rope(config)
    if rope.get("rope_type", "default") not in ("default", "linear", "yarn", "llama3"):
        raise ConfigError(f"export=gguf: rotary embeddings of rope_type={rope['rope_type']} are not supported")
    found.check(config)
    return found


def write_config(writer: GGUFWriter, architecture: Architecture, config: Any) -> None:
    """The keys from which llama.cpp builds the model."""
    head_dim = _head_dim(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(_kv_heads(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config.vocab_size)
    rope = _rope(config)
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)
    architecture.keys(writer, config)


def further_tensors(config: Any) -> dict[str, Tensor]:
    """Tensors that no checkpoint has, float32: what Llama 3 divides its rotary frequencies by."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return {}
    factors = llama3_factors(rope, rope["rope_theta"], _head_dim(config) // 2)
    return {ROPE_FACTORS: factors.to(torch.float32)}


def tensor_name(architecture: Architecture, config: Any, name: str) -> str:
    """llama.cpp's name. Raises ConfigError for a tensor that it does not know."""
    names = _name_map(architecture.arch, config.num_hidden_layers)
    found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        kind = config.model_type
        raise ConfigError(f"export=gguf: llama.cpp has no place for the tensor {name} in the architecture {kind}")
    return found


@functools.cache
def _name_map(arch: MODEL_ARCH, blocks: int) -> Any:
    return gguf.get_tensor_name_map(arch, blocks)


def row_order(architecture: Architecture, config: Any, name: str, rows: int) -> Tensor | None:
    """Row i of the written tensor is row order[i] of the checkpoint's: (rows,) int64; None where they are equal."""
    part = name.rpartition(".")[0]
    if not architecture.permutes or not part.endswith(("q_proj", "k_proj")):
        return None
    heads = config.num_attention_heads if part.endswith("q_proj") else _kv_heads(config)
    return torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).flatten()


def offset_of(architecture: Architecture, name: str) -> float:
    return architecture.norm_offset if name.endswith("norm.weight") else 0.0


def _rope(config: Any) -> dict[str, Any]:
    """The rotary embedding, of a model with several kinds of layers that of full attention."""
    parameters = config.rope_parameters
    found: dict[str, Any] = parameters.get("full_attention", parameters)
    return found


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _check_qwen(config: Any) -> None:
    if getattr(config, "use_sliding_window", False):
        raise ConfigError("export=gguf: use_sliding_window=true is computed by no architecture of llama.cpp")


def _check_gemma3(config: Any) -> None:
    if config.query_pre_attn_scalar != _head_dim(config):
        raise ConfigError("export=gguf: Gemma 3 with a query_pre_attn_scalar other than head_dim is not supported")
    if getattr(config, "attn_logit_softcapping", None) or getattr(config, "use_bidirectional_attention", False):
        raise ConfigError("export=gguf: Gemma 3 with attn_logit_softcapping or bidirectional attention is unsupported")
    _period(config)


def _period(config: Any) -> int:
    """Every so manieth layer attends to all positions."""
    full = [kind == "full_attention" for kind in config.layer_types]
    period = full.index(True) + 1 if any(full) else len(full) + 1
    if full != [(index + 1) % period == 0 for index in range(len(full))]:
        raise ConfigError(
            "export=gguf: layer_types of Gemma 3 have no regular pattern, and llama.cpp knows those alone"
        )
    return period


def _gemma3_keys(writer: GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern(_period(config))
    if local := config.rope_parameters.get("sliding_attention"):
        writer.add_rope_freq_base_swa(local["rope_theta"])
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _phi3_keys(writer: GGUFWriter, config: Any) -> None:
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_sliding_window(config.sliding_window or 0)


ARCHITECTURES = {
    "llama": Architecture(MODEL_ARCH.LLAMA, permutes=True),
    "mistral": Architecture(MODEL_ARCH.LLAMA, permutes=True),
    "qwen2": Architecture(MODEL_ARCH.QWEN2, check=_check_qwen),
    "qwen3": Architecture(MODEL_ARCH.QWEN3, check=_check_qwen),
    "gemma3_text": Architecture(MODEL_ARCH.GEMMA3, norm_offset=1.0, check=_check_gemma3, keys=_gemma3_keys),
    "phi3": Architecture(MODEL_ARCH.PHI3, keys=_phi3_keys),
}
"""By transformers' model_type; SmolLM is a llama."""
