"""Layer selection: the reference's rules in the reference's order, and no pattern that does nothing."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MambaConfig

from jointq_cli.errors import ConfigError
from jointq_cli.models.layer_ref import LayerRef
from jointq_cli.models.layer_selection import LayerSelection, find_routers, find_uncalled

NAMES = [
    f"model.layers.{block}.{kind}"
    for block in (0, 1, 10)
    for kind in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
]
KNOWN = [*NAMES, "lm_head"]


def select(**fields: object) -> list[str]:
    return LayerSelection(**{"exclude_layer_names": [], **fields}).select(NAMES, KNOWN)  # type: ignore[arg-type]


def test_no_rules_select_every_layer_of_the_blocks() -> None:
    assert select() == NAMES
    assert select(exclude_layer_names=["lm_head"]) == NAMES


def test_routers_are_found_by_name_and_shape() -> None:
    routers = [
        "mlp.gate",
        "block_sparse_moe.gate",
        "mlp.shared_expert_gate",
        "block_sparse_moe.router.layer",
        "router.proj",
    ]
    others = ["mlp.gate_proj", "mlp.up_proj", "self_attn.q_proj"]
    linear = {name: LayerRef(name, nn.Linear(64, 4, device="meta")) for name in [*routers, *others]}
    assert find_routers(linear) == set(routers)
    assert (
        find_routers({"mlp.gate": LayerRef("mlp.gate", nn.Linear(64, 128, device="meta"))}) == set()
    )  # of a gated MLP


def test_layers_that_the_model_does_not_call_are_left_out_and_refused_where_asked_for() -> None:
    config = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=8, state_size=4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    uncalled = find_uncalled(model)
    assert uncalled == {"backbone.layers.0.mixer.dt_proj"}
    names = [f"backbone.layers.0.mixer.{kind}" for kind in ("in_proj", "x_proj", "dt_proj", "out_proj")]

    def chosen(**rules: list[str]) -> list[str]:
        found = LayerSelection(exclude_layer_names=[], **rules).select(names, names, uncalled=uncalled)
        return [name.rpartition(".")[2] for name in found]

    assert chosen() == chosen(include_layer_keywords=["mixer"]) == ["in_proj", "x_proj", "out_proj"]
    for key in ("include_layer_names", "include_layer_keywords"):
        with pytest.raises(ConfigError, match=rf"^layers.{key}: 'dt_proj' asks for {names[2]}, .* without calling"):
            chosen(**{key: ["in_proj", "dt_proj"]})


def test_a_name_matches_complete_components_only() -> None:
    assert select(include_layer_names=["mlp.down_proj"]) == [name for name in NAMES if name.endswith("mlp.down_proj")]
    assert select(include_layer_names=["model.layers.1.self_attn.q_proj"]) == ["model.layers.1.self_attn.q_proj"]
    with pytest.raises(ConfigError, match="'own_proj' matches none"):
        select(include_layer_names=["own_proj"])


def test_a_keyword_matches_anywhere() -> None:
    assert select(include_layer_keywords=["layers.1."]) == NAMES[3:6]
    assert select(exclude_layer_keywords=["attn"]) == NAMES[2::3]


def test_excludes_follow_includes_and_the_count_comes_last() -> None:
    chosen = select(include_layer_keywords=["self_attn"], exclude_layer_names=["o_proj"], num_layers=2)
    assert chosen == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("key", ["include_layer_names", "include_layer_keywords", "exclude_layer_names"])
def test_a_pattern_that_matches_nothing_is_an_error_that_names_it(key: str) -> None:
    with pytest.raises(ConfigError, match=f"layers.{key}: 'qproj' matches none of the model's 10 linear layers"):
        select(**{key: ["qproj"]})


def test_the_default_exclusion_fits_models_whose_head_has_another_name() -> None:
    names = [name for name in NAMES if name != "lm_head"]
    assert LayerSelection().select(names, [*names, "embed_out"]) == names
    with pytest.raises(ConfigError, match="'lm_head' matches none"):
        LayerSelection(include_layer_names=["lm_head"]).select(names, [*names, "embed_out"])


def test_rules_that_leave_nothing_are_an_error() -> None:
    with pytest.raises(ConfigError, match="select none of the model's 9 linear layers"):
        select(exclude_layer_keywords=["proj"])


def test_a_count_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_layers=0"):
        select(num_layers=0)


# --- overrides


def test_the_first_pattern_decides() -> None:
    first, values, regex, glob = "model.layers.0.mlp.down_proj", "q_proj", r"re:.*\.(0|1)\.self_attn", "layers.10.*"
    selection = LayerSelection(overrides={first: {"bits": 8}, values: "keep", regex: {"bits": 8}, glob: {}})
    assert selection.match_overrides(NAMES) == {
        "model.layers.0.mlp.down_proj": first,
        **{name: values for name in NAMES if name.endswith("q_proj")},
        "model.layers.0.self_attn.o_proj": regex,
        "model.layers.1.self_attn.o_proj": regex,
        "model.layers.10.self_attn.o_proj": glob,
        "model.layers.10.mlp.down_proj": glob,
    }
    assert LayerSelection().match_overrides(NAMES) == {}


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("mlp.*", 3), ("*_proj", 9), ("o_proj", 3), ("[oq]_proj", 6), ("re:model.layers.1", 6), ("re:.*mlp", 3)],
)
def test_a_pattern_is_an_end_a_glob_or_the_beginning_of_a_regular_expression(pattern: str, count: int) -> None:
    assert len(LayerSelection(overrides={pattern: {}}).match_overrides(NAMES)) == count


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"v_proj": {}}, "layers.overrides.v_proj: matches none of the 9 layers to quantise"),
        ({"own_proj": {}}, "layers.overrides.own_proj: matches none of the 9 layers to quantise"),
        ({"re:mlp": {}}, "layers.overrides.re:mlp: matches none of the 9 layers to quantise"),
        (
            {"q_proj": {}, "o_proj": {}, "self_attn.*": {}},
            "layers.overrides.self_attn.*: the first match decides, and earlier patterns (q_proj, o_proj) have all "
            "that it matches; put it before them",
        ),
    ],
)
def test_an_idle_pattern_is_refused(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LayerSelection(overrides=overrides).match_overrides(NAMES)
    assert str(caught.value) == message


def test_an_override_that_is_none_is_refused() -> None:
    for value in (8, None, "left", [8]):
        with pytest.raises(
            ConfigError, match=r"^layers\.overrides\.q_proj=.*: must be settings .*\{bits: 8\}, or keep$"
        ):
            LayerSelection(overrides={"q_proj": value})
    with pytest.raises(ConfigError, match=r"^layers\.overrides\.re:\(: not a regular expression: missing \)"):
        LayerSelection(overrides={"re:(": {}})
    with pytest.raises(ConfigError, match=r"^layers\.mix=q4_k_x: must be one of q2_k, "):
        LayerSelection(mix="q4_k_x")
