"""Layers with settings of their own, from a recipe to plan, run, report, key and exports."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import write_checkpoint

from jointq_cli.cli.main import main
from jointq_cli.data.calibration import Calibration
from jointq_cli.data.token_file import Tokens
from jointq_cli.errors import ConfigError
from jointq_cli.evaluation.activation_settings import Activations
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.layer_selection import LayerSelection
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.curvature import NO_CURVATURE
from jointq_cli.quantization.qep import NoQep
from jointq_cli.quantization.quantizers import GPTQ, RTN, JointQ, Quantizer
from jointq_cli.stages.export import model_to_quantize
from jointq_cli.stages.loop_settings import asked_for, loop_settings, selected_layers
from jointq_cli.stages.plan.model_sizes import shapes_of
from jointq_cli.system.settings import Runtime
from jointq_cli.transforms.settings import HadamardRotation, NoRotation, Rotation

WORDS = [
    "recipe=ci_smoke", "model.path=model", "quantizer=rtn", "quantizer.group_size=32", "quantizer.symmetric=true",
    "qep=none", "calibration.num_samples=4", "calibration.seqlen=32", "evaluation.seqlen=32",
    "evaluation.max_windows=4", "generate_tokens=0", "output_dir=out", "check_exports=false",
    "export=compressed-tensors",
    "layers.overrides={model.layers.0.*:keep,down_proj:{bits:8},o_proj:{},?_proj:{bits:5,symmetric:false}}",
]  # fmt: skip
RUN = Path("out/run")
RTN32 = RTN(group_size=32)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("overrides")
    write_checkpoint(directory / "model", "llama", dtype=torch.bfloat16, num_hidden_layers=2)
    return directory


@pytest.fixture(autouse=True)
def _in_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def asked(rotation: Rotation | None = None) -> Any:
    """What the loop's settings need of a recipe."""
    return SimpleNamespace(
        qep=NoQep(),
        calibration=Calibration(),
        runtime=Runtime(),
        experts=None,
        rotation=rotation or NoRotation(),
        curvature=NO_CURVATURE,
    )


def opened() -> StreamedModel:
    return StreamedModel(Checkpoint(Path("model")), torch.device("cpu"), torch.float32)


def selected(quantizer: Quantizer, **rules: Any) -> dict[str, str]:
    """The label of each layer, by its last part and block."""
    model = opened()
    layers = selected_layers(model, LayerSelection(**rules), quantizer, Activations())
    forms = model_to_quantize(model, layers).forms
    return {name.removeprefix("model.layers.").removesuffix(".weight"): form.label for name, form in forms.items()}


def test_a_mixed_run_is_planned_reported_reused_and_exported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", *WORDS, f"hydra.run.dir={RUN}"]) == 0
    report = json.loads((RUN / "report.json").read_text())
    usual = "RTN W5 g32 asymmetric mse + 3 layers W4 symmetric, 1 layer W8 symmetric + model.layers.0.* left alone"
    assert report["quantizer"] == usual
    assert f"quantizer    {usual}" in capsys.readouterr().out
    wanted = {
        **{f"model.layers.1.self_attn.{kind}_proj": "W5 g32 asymmetric" for kind in "qkv"},
        "model.layers.1.self_attn.o_proj": "W4 g32 symmetric",
        **{f"model.layers.1.mlp.{kind}_proj": "W4 g32 symmetric" for kind in ("gate", "up")},
        "model.layers.1.mlp.down_proj": "W8 g32 symmetric",
    }
    assert {layer["name"]: layer["label"] for layer in report["layers"]} == wanted

    assert main(["plan", *WORDS]) == 0
    planned = capsys.readouterr().out
    assert f"quantizer    {usual}" in planned
    assert all(line.split()[1] == "reused" for line in planned.splitlines() if line.startswith("quantize "))
    assert "layers on several grids, some asymmetric: transformers reads them wrongly" in planned

    config = json.loads((RUN / "export" / "compressed-tensors" / "config.json").read_text())["quantization_config"]
    targets = {
        name: group["weights"]["num_bits"] for group in config["config_groups"].values() for name in group["targets"]
    }
    assert targets == {name: int(label[1]) for name, label in wanted.items()}
    assert "dequantize" not in config


def test_planned_bits_are_those_of_each_layers_quantizer() -> None:
    model = opened()
    layers = selected_layers(model, LayerSelection(overrides={"down_proj": {"bits": 8}}), RTN32, Activations())
    planned = {
        (one.in_features, rows): quantizer.storage(rows, one.in_features, torch.bfloat16).label
        for one in shapes_of(model, layers).inputs
        for rows, quantizer in zip(one.out_features, one.quantizers, strict=True)
    }
    assert planned[128, 64] == "W8 g32 asymmetric"
    assert planned[64, 128] == "W4 g32 asymmetric"


def test_the_key_of_a_run_depends_on_what_each_layer_has() -> None:
    """Not on how it is said: overrides that say the same for all are none."""
    model, tokens = opened(), Tokens(torch.zeros(4, 8, dtype=torch.int64), {})
    recipe = asked()

    def settings(quantizer: Quantizer, **rules: Any) -> Any:
        layers = selected_layers(model, LayerSelection(**rules), quantizer, Activations())
        return loop_settings(layers, recipe, tokens)

    uniform = settings(RTN(bits=3, group_size=32))
    assert settings(RTN32, overrides={"*": {"bits": 3}}) == uniform
    assert settings(RTN32, overrides={"q_proj": {"bits": 4}, "*": {"bits": 3}}).own.keys() == {
        f"model.layers.{block}.self_attn.q_proj" for block in (0, 1)
    }
    assert not uniform.own


def test_no_input_is_turned_twice() -> None:
    model, tokens = opened(), Tokens(torch.zeros(4, 8, dtype=torch.int64), {})
    turned = RTN(group_size=32, incoherence="input")

    def settings(rotation: Rotation, *, outputs_only: bool) -> None:
        overrides = {f"{name}_proj": {"incoherence": "none"} for name in ("q", "k", "v", "gate", "up")}
        layers = selected_layers(
            model, LayerSelection(overrides=overrides if outputs_only else {}), turned, Activations()
        )
        loop_settings(layers, asked(rotation), tokens)

    settings(NoRotation(), outputs_only=False)
    settings(HadamardRotation(r4=False), outputs_only=True)
    with pytest.raises(ConfigError, match=r"incoherence=input: rotation turns the input of .*q_proj already; "):
        settings(HadamardRotation(r4=False), outputs_only=False)
    with pytest.raises(ConfigError, match=r"input of .*down_proj already"):
        settings(HadamardRotation(r4=True), outputs_only=True)


def test_a_size_that_does_not_fit_is_named_by_the_pattern_that_says_it() -> None:
    with pytest.raises(
        ConfigError, match=r"^layers\.overrides\.q_proj\.group_size=48: must divide in_features, and does"
    ):
        selected(RTN32, overrides={"q_proj": {"group_size": 48}})
    with pytest.raises(ConfigError, match=r"^layers\.overrides\.q_proj: quantizer\.group_size=48: must divide"):
        selected(RTN(group_size=48), overrides={"q_proj": {"bits": 8}, "*": {"group_size": 32}})
    with pytest.raises(ConfigError, match=r"^layers\.overrides: leaves all layers alone"):
        selected(RTN32, overrides={"*": "keep"})


def test_rows_that_a_super_block_does_not_fit_get_the_types_of_llama_cpp(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(selected(GPTQ(grid="q3_k")).values()) == {"W4 g32 symmetric"}
    found = selected(JointQ(), mix="q5_k_m", overrides={"0.self_attn.o_proj": {"bits": 6, "group_size": 32}})
    assert found["0.self_attn.o_proj"] == "W6 g32 asymmetric"
    assert found["1.self_attn.o_proj"] == "W5 g32 asymmetric"
    assert found["1.mlp.down_proj"] == "W8 g32 symmetric"
    assert main(["plan", *WORDS[:7], "layers.mix=q4_k_m"]) == 0
    assert (
        "! layers: 14 of 14 have in_features that 256 does not divide, and take what llama.cpp takes then: "
        "Q5_0 for Q4_K (model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj, and 10 more); "
        "Q8_0 for Q6_K (model.layers.1.self_attn.v_proj, model.layers.1.mlp.down_proj)"
    ) in capsys.readouterr().out


def test_a_mix_gives_each_layer_its_type_and_overrides_come_first() -> None:
    layers = LayerSelection(
        mix="q4_k_m", overrides={"1.mlp.down_proj": {"bits": 8}}, exclude_layer_names=["0.self_attn.v_proj"]
    )
    found = {name[13:]: quantizer.describe() for name, quantizer in asked_for(opened(), layers, RTN32).items()}
    assert found["1.self_attn.v_proj"] == "RTN Q6_K"  # the second of two, though the first is left alone
    assert found["0.mlp.down_proj"] == found["1.self_attn.o_proj"] == "RTN Q4_K"
    assert found["1.mlp.down_proj"] == "RTN W8 g32 asymmetric mse"
