"""The mixes of llama.cpp: which tensor of a model gets which type in a file that is called Q4_K_M, for instance.

After `llama_tensor_get_type_impl` and `tensor_type_fallback` in src/llama-quant.cpp, but for Falcon, embeddings and
head. Types are called as there; those that are no K grids are Q4_0, Q5_0, Q5_1 and Q8_0, which hold uniform grids with
groups of 32 columns.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

BLOCK = 32  # columns of the types that are no K grids


@dataclass(frozen=True)
class Place:
    """One tensor. block: the index of its decoder block, for attn_v that among the blocks that have one; blocks: their
    number. query_groups: query heads per key-value head. experts: of the model, 0 for none. is_70b: whether llama.cpp
    calls the model so: Llama and Qwen2 with 80 blocks."""

    kind: str  # a key of KINDS, or another text
    block: int
    blocks: int
    query_groups: int = 1
    experts: int = 0
    is_70b: bool = False


Rule = tuple[tuple[str, Callable[[Place], bool]], ...]  # the first type whose condition holds


def _everywhere(place: Place) -> bool:
    return True


def _first(count: int) -> Callable[[Place], bool]:
    return lambda place: place.block < count


def _first_part(parts: int) -> Callable[[Place], bool]:
    return lambda place: place.block < place.blocks // parts


def _with_more_bits(place: Place) -> bool:
    """The first and the last eighth of the blocks, and every third between."""
    eighth = place.blocks // 8
    return place.block < eighth or place.block >= 7 * place.blocks // 8 or (place.block - eighth) % 3 == 2


def _shares_values(place: Place) -> bool:
    return place.query_groups >= 4


@dataclass(frozen=True)
class Mix:
    """base: the type of all tensors but those for which a rule gives another. grows_output: whether attn_output is Q5_K
    in a model of eight experts, where its rule does not count."""

    base: str
    rules: Mapping[str, Rule] = field(default_factory=dict)  # by kind
    grows_output: bool = False


_MORE = {"attn_v": (("q6_k", _with_more_bits),), "ffn_down": (("q6_k", _with_more_bits),)}

MIXES: Mapping[str, Mix] = {
    "q2_k": Mix(
        "q2_k",
        {
            "attn_v": (("q4_k", _shares_values), ("q3_k", _everywhere)),
            "attn_output": (("q3_k", _everywhere),),
            "ffn_down": (("q3_k", _everywhere),),
        },
        grows_output=True,
    ),
    "q2_k_s": Mix("q2_k", {"attn_v": (("q4_k", _shares_values),), "ffn_down": (("q4_k", _first_part(8)),)}),
    "q3_k_s": Mix("q3_k", grows_output=True),
    "q3_k_m": Mix(
        "q3_k",
        {
            "attn_v": (("q5_k", _first(2)), ("q4_k", _everywhere)),
            "attn_output": (("q4_k", _everywhere),),
            "ffn_down": (("q5_k", _first_part(16)), ("q4_k", _everywhere)),
        },
        grows_output=True,
    ),
    "q3_k_l": Mix("q3_k", {kind: (("q5_k", _everywhere),) for kind in ("attn_v", "attn_output", "ffn_down")}),
    "q4_k_s": Mix(
        "q4_k", {"attn_v": (("q5_k", _first(4)),), "ffn_down": (("q5_k", _first_part(8)),)}, grows_output=True
    ),
    "q4_k_m": Mix("q4_k", _MORE, grows_output=True),
    "q5_k_s": Mix("q5_k"),
    "q5_k_m": Mix("q5_k", _MORE),
    "q6_k": Mix("q6_k"),
}
"""Those of llama-quantize whose types jointq has."""

KINDS: Mapping[str, tuple[str, ...]] = {
    "attn_v": (
        *("v_proj", "attention.value"),
        *("qkv_proj", "query_key_value", "attn.c_attn", "Wqkv", "W_pack"),  # fused, for which attn_v's rules count
    ),
    "attn_k": ("k_proj",),
    "attn_output": ("o_proj", "attn.out_proj", "attention.dense", "attention.out_proj", "attn.dense", "attn.c_proj"),
    "ffn_down": ("down_proj", "fc2", "mlp.fc_out", "dense_4h_to_h", "mlp.c_proj", "w2"),
}
"""The kinds of tensors that rules name, by the ends of the names of layers in transformers."""

FALLBACKS: Mapping[str, str] = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""What a tensor gets whose rows are no multiple of a super-block's columns."""

UNIFORM_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    name: {"grid": None, "bits": bits, "symmetric": symmetric, "zero_point": None, "group_size": BLOCK}
    for name, bits, symmetric in (("q4_0", 4, True), ("q5_0", 5, True), ("q5_1", 5, False), ("q8_0", 8, True))
}
"""The settings of a quantizer whose result these types hold."""


def kind_of(layer: str) -> str:
    """The kind of a layer by its full name; "" where no rule names it."""
    ends = ((kind, end) for kind, names in KINDS.items() for end in names)
    return next((kind for kind, end in ends if f".{layer}".endswith((f".{end}", f"_{end}"))), "")


def type_of(mix: str, place: Place) -> str:
    """The type of a tensor in a mix, a key of MIXES; "q8_0" or the name of a K grid."""
    chosen = MIXES[mix]
    if place.experts == 8:
        if place.kind in ("attn_v", "attn_k"):
            return "q8_0"
        if place.kind == "attn_output":
            return "q5_k" if chosen.grows_output else chosen.base
    rule = chosen.rules.get(place.kind, ())
    found = next((name for name, holds in rule if holds(place)), chosen.base)
    if place.is_70b and place.kind == "attn_v" and found in ("q3_k", "q4_k"):
        return "q5_k"
    return found
