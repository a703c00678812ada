"""A budget of bits: from a recipe to the map, the run, the plan and the report."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from tiny_models import write_checkpoint

from jointq_cli.cli.main import main
from jointq_cli.errors import ConfigError
from jointq_cli.evaluation.activation_settings import Activations
from jointq_cli.formats.export import exporters_of
from jointq_cli.formats.layer_file import load_form
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.layer_ref import LayerRef
from jointq_cli.models.layer_selection import LayerSelection
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.allocation import Allocation, Budget
from jointq_cli.quantization.quantizers import RTN
from jointq_cli.stages.allocation import Problem, _tied, allocation_stage, find_problem
from jointq_cli.stages.base import Stage
from jointq_cli.stages.loop_settings import selected_layers
from jointq_cli.transforms.settings import NoRotation

WORDS = [
    "recipe=ci_smoke", "model.path=model", "quantizer=rtn", "quantizer.group_size=32", "qep=none",
    "calibration.num_samples=4", "calibration.seqlen=32", "evaluation.seqlen=32", "evaluation.max_windows=4",
    "generate_tokens=0", "output_dir=out",
]  # fmt: skip
BUDGET = ["allocation=budget", "allocation.candidates=[{bits:2},{bits:3},{bits:4},{bits:4,group_size:16}]"]
CANDIDATES = [{"bits": 2}, {"bits": 3}, {"bits": 4}]
BITS = 3.6
RTN32 = RTN(group_size=32)
RUN = Path("out/run")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("budget")
    write_checkpoint(directory / "model", "llama", dtype=torch.bfloat16, num_hidden_layers=2)
    return directory


@pytest.fixture(autouse=True)
def _in_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("jointq_cli.stages.plan.throughput.MEASURED_SECONDS", 0.001)
    monkeypatch.setattr("jointq_cli.report.pages.run.run_html", lambda report: "")  # pictures take longer than the rest


def run(*words: str) -> tuple[dict[str, str], dict[str, bool]]:
    """The label of each layer, and whether each stage's result came from the store."""
    assert main(["quantize", *WORDS, *words, f"hydra.run.dir={RUN}"]) == 0
    report = json.loads((RUN / "report.json").read_text())
    reused = {stage["name"]: stage["reused"] for stage in report["stages"]}
    return {layer["name"]: layer["label"] for layer in report["layers"]}, reused


def stored_bits() -> tuple[int, int]:
    """Of all files of codes, and their number of weights."""
    forms = [load_form(file) for file in (RUN / "codes").glob("*.safetensors")]
    return sum(form.stored_bits for form in forms), sum(form.shape[0] * form.shape[1] for form in forms)


def test_what_is_stored_holds_the_budget_and_the_map_gives_the_same_run(capsys: pytest.CaptureFixture[str]) -> None:
    labels, reused = run(*BUDGET, f"allocation.bits_per_weight={BITS}")
    assert len(set(labels.values())) > 2
    bits, weights = stored_bits()
    assert BITS - 0.1 < bits / weights <= BITS
    assert not reused["sensitivity"]
    report = json.loads((RUN / "report.json").read_text())
    record = report["allocation"]
    assert record["chosen"]["bits_per_weight"] == pytest.approx(bits / weights) == report["bits_per_weight"]
    assert record["chosen"]["loss"] < record["uniform"][1]["loss"]
    assert record["chosen"]["loss"] <= record["other_tie"]["loss"]
    assert "predicted KL" in capsys.readouterr().out
    assert "## Budget: bits_per_weight=3.6" in (RUN / "report.md").read_text()
    manifest = json.loads((RUN / "manifest.json").read_text())
    assert "allocation.yaml" in manifest["files"]

    assert main(["plan", *WORDS, *BUDGET, f"allocation.bits_per_weight={BITS}"]) == 0
    planned = capsys.readouterr().out
    states = {line[:18].strip(): line[18:].split()[0] for line in planned.splitlines() if "reused" in line}
    assert states.keys() >= {"sensitivity", "allocation", "quantize"}
    assert "the budget is 3.6 bits per weight" in planned

    found = yaml.safe_load((RUN / "allocation.yaml").read_text())
    assert found.keys() == labels.keys()
    kept = RUN.parent / "map.yaml"
    kept.write_text((RUN / "allocation.yaml").read_text())
    again, reused = run(f"layers.overrides=@{kept}")
    assert again == labels
    assert reused["quantize"]
    assert not (RUN / "allocation.yaml").exists()  # of the run before into this directory


def test_another_budget_measures_nothing_again_and_ties_hold() -> None:
    weights = sum(layer.out_features * layer.in_features for layer in in_blocks(opened()).values())
    whole = sum(tensor.nbytes for tensor in Checkpoint(Path("model")).tensors.values())
    wanted = whole - 2 * weights + weights * 3.3 / 8
    budget = [*BUDGET, "allocation.sensitivity=fisher"]
    run(*budget, f"allocation.bits_per_weight={BITS}")
    labels, reused = run(*budget, f"allocation.size_gb={wanted / 1e9}", "allocation.tie=kernel")
    assert reused["sensitivity"]
    packed = json.loads((RUN / "report.json").read_text())["audit"]["packed_bytes"]
    assert wanted - 0.1 * weights / 8 < packed <= wanted
    for block in (0, 1):
        attention, mlp = f"model.layers.{block}.self_attn.", f"model.layers.{block}.mlp."
        assert len({labels[f"{attention}{kind}_proj"] for kind in "qkv"}) == 1
        assert labels[f"{mlp}gate_proj"] == labels[f"{mlp}up_proj"]
    assert len(set(labels.values())) > 1


def opened() -> StreamedModel:
    return StreamedModel(Checkpoint(Path("model")), torch.device("cpu"), torch.float32)


def in_blocks(model: StreamedModel) -> dict[str, LayerRef]:
    return {name: layer for name, layer in model.linear_layers().items() if model.block_of(name) is not None}


def problem(allocation: Allocation, export: str | None = None, **rules: Any) -> Problem:
    model, selection = opened(), LayerSelection(**rules)
    layers = selected_layers(model, selection, RTN32, Activations())
    asked: Any = SimpleNamespace(
        allocation=allocation,
        layers=selection,
        exporters=exporters_of(export),
        rotation=NoRotation(),
        activations=Activations(),
    )
    found = find_problem(model, layers, asked)
    assert found is not None
    return found


def test_what_overrides_decide_stays_and_is_counted() -> None:
    decided = "model.layers.0.mlp.down_proj"
    found = problem(
        Budget(bits_per_weight=BITS, candidates=CANDIDATES), overrides={decided: {"bits": 8}, "q_proj": "keep"}
    )
    layers = found.with_choice(found.distribute(lambda name, number: -number, "none"))
    assert layers[decided] == RTN(bits=8, group_size=32)
    assert not any("q_proj" in name for name in layers)
    bits = {
        name: each.storage(layer.out_features, layer.in_features, torch.bfloat16).stored_bits
        for name, layer in in_blocks(opened()).items()
        if (each := layers.get(name))
    }
    weights = sum(layer.out_features * layer.in_features for name, layer in in_blocks(opened()).items() if name in bits)
    assert found.fixed == bits[decided]
    assert BITS - 0.1 < sum(bits.values()) / weights <= BITS


def test_other_bits_of_decided_layers_are_another_result() -> None:
    measured, budget = (
        Stage(name="sensitivity", kind="sensitivity", spec={}, inputs=(), make=lambda scratch, context: None),
        Budget(bits_per_weight=BITS, candidates=CANDIDATES),
    )
    found = [problem(budget, overrides={"v_proj": {"bits": bits}}) for bits in (2, 8)]
    assert found[0].budget == found[1].budget
    keys = [allocation_stage(each, measured).key for each in found]
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    ("settings", "rules", "message"),
    [
        ({}, {}, "needs one of allocation.bits_per_weight and allocation.size_gb, and none is given"),
        ({"bits_per_weight": 3, "size_gb": 1}, {}, "and both are given"),
        ({"bits_per_weight": 2}, {}, "allocation.bits_per_weight=2: the smallest candidates take 2.562"),
        ({"size_gb": 1e-5}, {}, "allocation.size_gb=1e-05: the smallest candidates take"),
        ({"bits_per_weight": 3, "candidates": [{"bits": 3}]}, {}, "from 2 to 16 settings"),
        ({"bits_per_weight": 3, "candidates": [{"bits": 3}, 4]}, {}, r"candidates\[1\]=4: must be settings"),
        ({"bits_per_weight": 3, "candidates": [{"bits": 3}, {"bits": 9}]}, {}, r"candidates\[1\].bits=9: must be"),
        ({"bits_per_weight": 3, "candidates": [{"bits": 3}, {"bits": 3}]}, {}, r"candidates\[1\]={bits: 3}: is there"),
        (
            {"bits_per_weight": 5, "candidates": [{"bits": 3}, {"group_size": 48}]},
            {},
            r"allocation.candidates\[1\].group_size=48: must divide in_features",
        ),
        ({"bits_per_weight": 3}, {"overrides": {"*": {"bits": 4}}}, "layers.overrides decides all layers"),
        (
            {"bits_per_weight": 8.5, "candidates": [{"bits": 2, "zero_point": "half"}, {"bits": 8}]},
            {"export": "compressed-tensors"},
            r"is stored as W2 g32 half, .* or allocation.candidates\[0\].zero_point=integer",
        ),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], rules: dict[str, Any], message: str) -> None:
    def estimate(name: str, number: int) -> float:
        return 0.0

    def distribute() -> None:
        allocation = Budget(**{"candidates": CANDIDATES, **settings})
        allocation.check(RTN32)
        problem(allocation, **rules).distribute(estimate, "none")

    with pytest.raises(ConfigError, match=message):
        distribute()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("layers.mix=q4_k_m", "layers.mix=q4_k_m: decides all layers"),
        ("layers.overrides=@nothing.yaml", "layers.overrides=@nothing.yaml: cannot be read"),
        ("allocation.candidates=[{bits:3},{bitz:4}]", "allocation.candidates[1].bitz: RTN has bits"),
    ],
)
def test_a_recipe_is_refused_in_one_line(word: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *WORDS, "allocation=budget", "allocation.bits_per_weight=3", word]) != 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if line]
    assert message in line


def test_experts_of_a_block_are_tied(tmp_path: Path) -> None:
    model = StreamedModel(Checkpoint(write_checkpoint(tmp_path, "mixtral")), torch.device("cpu"), torch.float32)
    names = list(in_blocks(model))
    kernels, experts = _tied(model, names)
    of_experts = [name for name in names if ".experts." in name]
    assert experts.keys() == set(of_experts)
    assert len({experts[name] for name in of_experts}) == 3 * len(model)
    assert len({kernels[name] for name in of_experts}) == len(model)
    assert "model.layers.0.self_attn.o_proj" not in kernels
