"""Which modules of an architecture read and write the residual stream: what a change of basis has to edit.

One explicit description per model family, checked against the model before any weight is read: a model with a tensor
that its description does not mention is refused. Uses names and shapes only, never values.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from jointq_cli.errors import ModelError
from jointq_cli.models.streamed import BlockwiseModel

_BASIS_FREE = ("rotary_emb.inv_freq",)  # ends of tensors in older checkpoints that no change of basis concerns
_POST_NORMS = "a norm with a gain per channel stands between its layers and the residual stream"


@dataclass(frozen=True)
class ModelFamily:
    """The modules of one decoder block, by their names in it."""

    readers: dict[str, tuple[str, ...]]  # norm -> the layers that read the residual stream through it
    o_proj: str = "self_attn.o_proj"
    down_proj: str = "mlp.down_proj"
    unrotated: tuple[str, ...] = ()  # modules that no change of basis edits, such as norms of queries and keys
    gain_offset: float = 0.0  # what the norms add to their weight (Gemma: 1)
    fused: bool = False  # queries, keys and values are rows of one layer, gate and up those of another
    r1_obstacle: str | None = None  # why R1 is impossible, None where it is possible


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj")
_PRE_NORM = {"input_layernorm": _ATTENTION, "post_attention_layernorm": _MLP}
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

_GEMMA2 = {"input_layernorm": _ATTENTION, "pre_feedforward_layernorm": _MLP}
_GEMMA2_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")

FAMILIES = {
    "llama": ModelFamily(_PRE_NORM),
    "mistral": ModelFamily(_PRE_NORM),
    "qwen2": ModelFamily(_PRE_NORM),
    "qwen3": ModelFamily(_PRE_NORM, unrotated=_HEAD_NORMS),
    "gemma": ModelFamily(_PRE_NORM, gain_offset=1.0),
    "phi3": ModelFamily(
        {"input_layernorm": ("self_attn.qkv_proj",), "post_attention_layernorm": ("mlp.gate_up_proj",)}, fused=True
    ),
    "gemma2": ModelFamily(_GEMMA2, unrotated=_GEMMA2_POST_NORMS, gain_offset=1.0, r1_obstacle=_POST_NORMS),
    "gemma3_text": ModelFamily(
        _GEMMA2, unrotated=_GEMMA2_POST_NORMS + _HEAD_NORMS, gain_offset=1.0, r1_obstacle=_POST_NORMS
    ),
    "olmo2": ModelFamily({"": _ATTENTION + _MLP}, unrotated=_GEMMA2_POST_NORMS + _HEAD_NORMS, r1_obstacle=_POST_NORMS),
}
"""config.model_type -> its description. The norm "" means none: the layers read the residual stream itself."""


@dataclass(frozen=True)
class ArchitectureLayout:
    """A family's description with one model's sizes and module names."""

    family: ModelFamily
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int  # of the MLP
    embedding: str
    final_norm: str
    lm_head: str

    @property
    def value_layer(self) -> str:
        return "self_attn.qkv_proj" if self.family.fused else "self_attn.v_proj"

    @property
    def value_rows(self) -> slice:
        """Rows of `value_layer` that produce the values: num_kv_heads x head_dim, head by head."""
        start = (self.num_heads + self.num_kv_heads) * self.head_dim if self.family.fused else 0
        return slice(start, start + self.num_kv_heads * self.head_dim)

    @property
    def up_layer(self) -> str:
        return "mlp.gate_up_proj" if self.family.fused else "mlp.up_proj"

    @property
    def up_rows(self) -> slice:
        """Rows of `up_layer` whose outputs are multiplied by the activated gate."""
        start = self.intermediate_size if self.family.fused else 0
        return slice(start, start + self.intermediate_size)

    def norm_before(self, layer: str) -> str | None:
        """The norm through which a layer of a block reads the residual stream, None if it reads through none."""
        return next((norm for norm, readers in self.family.readers.items() if norm and layer in readers), None)


def layout_of(model: BlockwiseModel, *, r1: bool, key: str = "rotation") -> ArchitectureLayout:
    """The layout of a model that is to be rotated, with or without R1.

    Raises ModelError, whose message starts with the config key `key`, where the architecture is unknown, has a tensor
    that its description does not mention, or does not admit R1.
    """
    config: Any = model.module.config
    kind = str(config.model_type)
    name = type(model.module).__name__
    if kind not in FAMILIES:
        raise ModelError(
            f"{key}: jointq does not know which tensors of {name} ({kind}) read and write the residual stream; it "
            f"knows {', '.join(FAMILIES)}. Use rotation=none smoothing=none"
        )
    family = FAMILIES[kind]
    if r1 and family.r1_obstacle:
        raise ModelError(f"{key}.r1=true: {name} cannot have it: {family.r1_obstacle}; use {key}.r1=false")
    _check_blocks(model, family, name, key)
    _check_unused(model, name, key, r1=r1)
    embedding, lm_head = _embeddings(model)
    layout = ArchitectureLayout(
        family=family,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        embedding=embedding,
        final_norm=f"{model.module.base_model_prefix}.norm",
        lm_head=lm_head,
    )
    known = {layout.embedding, layout.final_norm, layout.lm_head}
    outside = [tensor for tensor, _ in model.module.named_parameters() if model.block_of(tensor) is None]
    unknown = [tensor for tensor in outside if tensor.rpartition(".")[0] not in known]
    if unknown:
        raise ModelError(f"{key}: {name} has a tensor {unknown[0]}, which no rotation knows; use rotation=none")
    return layout


def _check_blocks(model: BlockwiseModel, family: ModelFamily, name: str, key: str) -> None:
    layers = {layer for readers in family.readers.values() for layer in readers}
    expected = {*family.readers, *layers, family.o_proj, family.down_proj, *family.unrotated} - {""}
    for index, block in enumerate(model.blocks):
        found = {tensor.rpartition(".")[0] for tensor, _ in block.named_parameters()}
        if found != expected:
            different = min(found ^ expected)
            verb = "has a module" if different in found else "lacks a module"
            raise ModelError(
                f"{key}: {name} {verb} {model.prefix(index)}{different}, against what jointq knows of its family; "
                "use rotation=none smoothing=none"
            )


def _check_unused(model: BlockwiseModel, name: str, key: str, *, r1: bool) -> None:
    """Stored tensors that the model class has no place for (multi-token prediction, a classifier's head) would stay in
    the old basis. They are read after R1 changes the residual stream; without R1, if they belong to a block."""
    parameters = [name for name in model.module.state_dict() if model.stores(name)]
    used = {stored for name in parameters for stored in model.location(name).tensors}
    for stored in model.source.shapes:
        is_changed = r1 or model.block_of(model.module_name(stored)) is not None
        if stored not in used and is_changed and not stored.endswith(_BASIS_FREE):
            raise ModelError(
                f"{key}: the checkpoint holds {stored}, which {name} does not use and no rotation knows; "
                "use rotation=none smoothing=none"
            )


def _embeddings(model: BlockwiseModel) -> tuple[str, str]:
    """The names of the input and output embeddings."""
    names = {module: name for name, module in model.module.named_modules()}
    embedding: nn.Module = model.module.get_input_embeddings()
    lm_head: nn.Module = model.module.get_output_embeddings()
    return names[embedding], names[lm_head]
