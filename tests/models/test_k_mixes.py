"""The mixes of llama.cpp: types by hand from `llama_tensor_get_type_impl` of src/llama-quant.cpp, tensor by tensor."""

import pytest
from gguf import MODEL_ARCH, get_tensor_name_map

from jointq_cli.formats.k_quant import K_GRIDS
from jointq_cli.formats.uniform import Grid, grid_label
from jointq_cli.models.k_mixes import BLOCK, FALLBACKS, MIXES, UNIFORM_SETTINGS, Place, kind_of, type_of

KINDS = ("attn_v", "attn_k", "attn_output", "ffn_down", "")


def types(mix: str, kind: str, blocks: int, **model: int | bool) -> str:
    """Of all blocks, the digit of each type: "4664" for Q4_K, Q6_K, Q6_K, Q4_K."""
    return "".join(type_of(mix, Place(kind, block, blocks, **model))[1] for block in range(blocks))  # type: ignore[arg-type]


def test_every_type_has_a_form() -> None:
    assert FALLBACKS.keys() == K_GRIDS.keys()
    assert {name for mix in MIXES for name in [type_of(mix, Place("attn_v", 0, 8, experts=8))]} <= set(UNIFORM_SETTINGS)
    assert set(FALLBACKS.values()) <= set(UNIFORM_SETTINGS)
    assert {mix.base for mix in MIXES.values()} == set(K_GRIDS)


# 16 blocks: an eighth is 2, a sixteenth 1; more bits: 0, 1, then 4, 7, 10, 13 and 14, 15.
@pytest.mark.parametrize(
    ("mix", "attn_v", "attn_output", "ffn_down", "others"),
    [
        ("q2_k", "3" * 16, "3" * 16, "3" * 16, "2" * 16),
        ("q2_k_s", "2" * 16, "2" * 16, "44" + "2" * 14, "2" * 16),
        ("q3_k_s", "3" * 16, "3" * 16, "3" * 16, "3" * 16),
        ("q3_k_m", "55" + "4" * 14, "4" * 16, "5" + "4" * 15, "3" * 16),
        ("q3_k_l", "5" * 16, "5" * 16, "5" * 16, "3" * 16),
        ("q4_k_s", "5555" + "4" * 12, "4" * 16, "55" + "4" * 14, "4" * 16),
        ("q4_k_m", "6644644644644666", "4" * 16, "6644644644644666", "4" * 16),
        ("q5_k_s", "5" * 16, "5" * 16, "5" * 16, "5" * 16),
        ("q5_k_m", "6655655655655666", "5" * 16, "6655655655655666", "5" * 16),
        ("q6_k", "6" * 16, "6" * 16, "6" * 16, "6" * 16),
    ],
)
def test_types_of_a_model_of_16_blocks(mix: str, attn_v: str, attn_output: str, ffn_down: str, others: str) -> None:
    found = [types(mix, kind, 16) for kind in KINDS]
    assert found == [attn_v, others, attn_output, ffn_down, others]


def test_few_blocks_have_no_eighth_and_the_last_counts_by_seven_eighths() -> None:
    assert types("q4_k_m", "ffn_down", 4) == "4466"
    assert types("q4_k_s", "ffn_down", 4) == "4444"
    assert types("q4_k_m", "attn_v", 9) == "6446446" + "66"  # an eighth is 1, seven eighths 7: 3, 6 between
    assert types("q3_k_m", "ffn_down", 32) == "55" + "4" * 30


def test_values_that_many_queries_share_get_more() -> None:
    assert [types(mix, "attn_v", 2, query_groups=4) for mix in ("q2_k", "q2_k_s", "q3_k_s")] == ["44", "44", "33"]
    assert types("q2_k", "attn_v", 2, query_groups=3) == "33"
    assert types("q2_k", "ffn_down", 2, query_groups=8) == "33"


def test_of_70b_the_values_have_five_bits_at_least() -> None:
    assert set(types("q3_k_s", "attn_v", 80, query_groups=8, is_70b=True)) == {"5"}
    assert set(types("q4_k_m", "attn_v", 80, query_groups=8, is_70b=True)) == {"5", "6"}
    assert types("q2_k_s", "attn_v", 80, is_70b=True) == "2" * 80
    assert types("q3_k_s", "ffn_down", 80, is_70b=True) == "3" * 80


def test_eight_experts_have_keys_and_values_in_eight_bits_and_outputs_in_five() -> None:
    def of(kind: str, experts: int = 8) -> list[str]:
        return [type_of(mix, Place(kind, 0, 16, experts=experts)) for mix in MIXES]

    assert set(of("attn_v")) == set(of("attn_k")) == {"q8_0"}
    grown = {"q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m"}
    assert of("attn_output") == ["q5_k" if name in grown else mix.base for name, mix in MIXES.items()]
    assert of("ffn_down") == of("ffn_down", 0)
    assert of("attn_v", 4) == of("attn_v", 0)


@pytest.mark.parametrize(
    ("arch", "names"),
    [
        (
            MODEL_ARCH.LLAMA,
            [f"model.layers.0.{end}" for end in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")],
        ),
        (MODEL_ARCH.LLAMA, [f"model.layers.0.{end}" for end in ("self_attn.q_proj", "self_attn.k_proj")]),
        (MODEL_ARCH.LLAMA, [f"model.layers.0.{end}" for end in ("mlp.gate_proj", "mlp.down_proj")]),
        (MODEL_ARCH.PHI3, [f"model.layers.0.{end}" for end in ("self_attn.qkv_proj", "self_attn.o_proj")]),
        (MODEL_ARCH.PHI2, [f"model.layers.0.{end}" for end in ("self_attn.dense", "mlp.fc1", "mlp.fc2")]),
        (
            MODEL_ARCH.GPT2,
            [f"transformer.h.0.{end}" for end in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")],
        ),
        (
            MODEL_ARCH.GPTNEOX,
            [
                f"gpt_neox.layers.0.{end}"
                for end in ("attention.query_key_value", "attention.dense", "mlp.dense_4h_to_h")
            ],
        ),
    ],
)
def test_layers_have_the_kinds_that_their_names_in_gguf_have(arch: MODEL_ARCH, names: list[str]) -> None:
    table = get_tensor_name_map(arch, 1)
    for name in names:
        written = (table.get_name(name) or "").rpartition(".")[2].replace("attn_qkv", "attn_v")
        assert kind_of(name) == (written if written in KINDS else ""), name


def test_experts_are_feed_forward_layers() -> None:
    assert kind_of("model.layers.0.block_sparse_moe.experts.7.w2") == "ffn_down"
    assert kind_of("model.layers.0.mlp.experts.7.down_proj") == kind_of("mlp.shared_expert.down_proj") == "ffn_down"
    assert kind_of("model.layers.0.mlp.experts.7.w1") == kind_of("model.layers.0.self_attn.kv_proj") == ""


def test_fallbacks_hold_the_bits_that_they_stand_for() -> None:
    labels = {
        name: grid_label(Grid(settings["bits"], settings["symmetric"]), settings["group_size"])
        for name, settings in UNIFORM_SETTINGS.items()
    }
    assert labels == {
        "q4_0": f"W4 g{BLOCK} symmetric",
        "q5_0": f"W5 g{BLOCK} symmetric",
        "q5_1": f"W5 g{BLOCK} asymmetric",
        "q8_0": f"W8 g{BLOCK} symmetric",
    }
