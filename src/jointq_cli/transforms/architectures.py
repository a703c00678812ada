"""Which tensors of an architecture read and write the residual stream: all that a change of basis has to touch.

An explicit list per family, and a verdict before any weight is touched: a tensor that has no place in the list refuses
the model. Knows names and shapes, and never reads a value.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from jointq_cli.errors import ModelError
from jointq_cli.models.streamed import StreamedModel

_POST_NORMS = "a norm with a gain per channel stands between its layers and the residual stream"


@dataclass(frozen=True)
class Family:
    """Modules of one decoder block, by their names in it.

    readers: norm -> the layers that read the stream through it. others: modules that no rotation concerns, such as
    norms of queries and keys. gain_offset: what the norms add to their weight (Gemma: 1). fused: queries, keys and
    values are the rows of one layer, gate and up those of another. no_r1: why R1 is not possible.
    """

    readers: dict[str, tuple[str, ...]]
    o_proj: str = "self_attn.o_proj"
    down_proj: str = "mlp.down_proj"
    others: tuple[str, ...] = ()
    gain_offset: float = 0.0
    fused: bool = False
    no_r1: str | None = None


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj")
_PRE_NORM = {"input_layernorm": _ATTENTION, "post_attention_layernorm": _MLP}
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

_GEMMA2 = {"input_layernorm": _ATTENTION, "pre_feedforward_layernorm": _MLP}
_GEMMA2_OTHERS = ("post_attention_layernorm", "post_feedforward_layernorm")

FAMILIES = {
    "llama": Family(_PRE_NORM),
    "mistral": Family(_PRE_NORM),
    "qwen2": Family(_PRE_NORM),
    "qwen3": Family(_PRE_NORM, others=_HEAD_NORMS),
    "gemma": Family(_PRE_NORM, gain_offset=1.0),
    "phi3": Family(
        {"input_layernorm": ("self_attn.qkv_proj",), "post_attention_layernorm": ("mlp.gate_up_proj",)}, fused=True
    ),
    "gemma2": Family(_GEMMA2, others=_GEMMA2_OTHERS, gain_offset=1.0, no_r1=_POST_NORMS),
    "gemma3_text": Family(_GEMMA2, others=_GEMMA2_OTHERS + _HEAD_NORMS, gain_offset=1.0, no_r1=_POST_NORMS),
    "olmo2": Family({"": _ATTENTION + _MLP}, others=_GEMMA2_OTHERS + _HEAD_NORMS, no_r1=_POST_NORMS),
}
"""config.model_type -> its list. "" stands for no norm: the layers read the stream itself."""


@dataclass(frozen=True)
class Anatomy:
    """A family's list with one model's sizes."""

    family: Family
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int  # of the MLP
    embedding: str  # names of modules
    final_norm: str
    head: str

    @property
    def value_layer(self) -> str:
        return "self_attn.qkv_proj" if self.family.fused else "self_attn.v_proj"

    @property
    def value_rows(self) -> slice:
        """Rows of `value_layer` that make the values: kv_heads x head_dim, head by head."""
        before = (self.heads + self.kv_heads) * self.head_dim if self.family.fused else 0
        return slice(before, before + self.kv_heads * self.head_dim)

    @property
    def up_layer(self) -> str:
        return "mlp.gate_up_proj" if self.family.fused else "mlp.up_proj"

    @property
    def up_rows(self) -> slice:
        """Rows of `up_layer` that are multiplied by the activated gate."""
        before = self.width if self.family.fused else 0
        return slice(before, before + self.width)

    def norm_of(self, layer: str) -> str | None:
        """The norm through which a layer of a block reads the residual stream, None if the layer does not."""
        return next((norm for norm, readers in self.family.readers.items() if norm and layer in readers), None)


def examine(model: StreamedModel, *, r1: bool, key: str = "rotation") -> Anatomy:
    """The anatomy of a model that is to be rotated, with or without R1.

    Raises ModelError, naming `key`, where its architecture is unknown, has a tensor too many, or does not admit R1.
    """
    config: Any = model.module.config
    kind = str(config.model_type)
    name = type(model.module).__name__
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ModelError(
            f"{key}: nobody has told jointq which tensors of {name} ({kind}) read and write the residual stream; "
            f"known are {known}. Use rotation=none smoothing=none"
        )
    family = FAMILIES[kind]
    if r1 and family.no_r1:
        raise ModelError(f"{key}.r1=true: {name} cannot have it: {family.no_r1}; use {key}.r1=false")
    _check_blocks(model, family, name, key)
    embedding, head = _embeddings(model)
    base = model.module.base_model_prefix
    anatomy = Anatomy(
        family=family,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        width=config.intermediate_size,
        embedding=embedding,
        final_norm=f"{base}.norm",
        head=head,
    )
    known_outside = {anatomy.embedding, anatomy.final_norm, anatomy.head}
    outside = [tensor for tensor, _ in model.module.named_parameters() if model.block_of(tensor) is None]
    strangers = [tensor for tensor in outside if tensor.rpartition(".")[0] not in known_outside]
    if strangers:
        raise ModelError(f"{key}: {name} has a tensor {strangers[0]}, which no rotation knows; use rotation=none")
    return anatomy


def _check_blocks(model: StreamedModel, family: Family, name: str, key: str) -> None:
    layers = {layer for readers in family.readers.values() for layer in readers}
    expected = {*family.readers, *layers, family.o_proj, family.down_proj, *family.others} - {""}
    for index, block in enumerate(model.blocks):
        found = {tensor.rpartition(".")[0] for tensor, _ in block.named_parameters()}
        if found != expected:
            odd = sorted(found ^ expected)[0]
            verb = "has a module" if odd in found else "lacks a module"
            raise ModelError(
                f"{key}: {name} {verb} {model.prefix(index)}{odd}, against what jointq knows of its family; "
                "use rotation=none smoothing=none"
            )


def _embeddings(model: StreamedModel) -> tuple[str, str]:
    names = {module: name for name, module in model.module.named_modules()}
    embedding: nn.Module = model.module.get_input_embeddings()
    head: nn.Module = model.module.get_output_embeddings()
    return names[embedding], names[head]
