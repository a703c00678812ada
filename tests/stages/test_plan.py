"""A plan against the run that follows it; and that a plan reads no weights and writes nothing."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from tiny_models import FAMILIES, GROUPED, edit_config, write_checkpoint, write_tokenizer
from transformers import AutoModelForCausalLM, Gemma3Config, LlamaConfig, MambaConfig

from jointq_cli import pipeline
from jointq_cli.cli.compose import launch
from jointq_cli.cli.main import USAGE_ERROR, main
from jointq_cli.errors import Interrupted, JointqError
from jointq_cli.models import checkpoint
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.quantization.hidden_states import HiddenStateFile
from jointq_cli.records import RunEstimate
from jointq_cli.report import Console
from jointq_cli.report.number_format import significant
from jointq_cli.stages import model as model_stage
from jointq_cli.stages import quantize as quantize_stage
from jointq_cli.stages.plan.costs import Windows, Workload, total
from jointq_cli.stages.plan.dry_run import dry_run, find_inputs
from jointq_cli.stages.plan.estimate import workload
from jointq_cli.stages.plan.preflight import LEAST_SCORED
from jointq_cli.system import machine
from jointq_cli.system.files import nearest_existing
from jointq_cli.system.hash_cache import FILE, cache_hash, cached_hash

TINY = [
    "recipe=ci_smoke", "quantizer=rtn", "quantizer.group_size=32", "qep=none", "calibration.num_samples=8",
    "calibration.seqlen=32", "evaluation.seqlen=32", "evaluation.max_windows=4", "runtime.batch_tokens=64",
    "output_dir=out",
]  # fmt: skip
RUN = "hydra.run.dir=out/run"
MADE = ("quantize", "evaluate original", "evaluate quantized")
KINDS = {
    "activations": "activations", "rotate": "rotated", "quantize": "quantize", "evaluate original": "hidden",
    "evaluate quantized": "scores",
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jointq_cli.stages.plan.throughput.MEASURED_SECONDS", 0.001)
    monkeypatch.setattr("jointq_cli.report.pages.run.run_html", lambda report: "")  # pictures take longer than the rest


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tied", "llama_tied")


@pytest.fixture
def words(model: Path) -> list[str]:
    return [*TINY, f"model.path={model}"]


def planned(words: list[str]) -> RunEstimate:
    found: list[RunEstimate] = []
    launch("plan", words, lambda recipe, job: found.append(pipeline.plan(recipe, Console(quiet=True))))
    return found[0]


def states(words: list[str]) -> dict[str, str]:
    return {stage.name: stage.state for stage in planned(words).stages}


def quantized(words: list[str]) -> dict[str, Any]:
    """The report of a run."""
    assert main(["quantize", *words, RUN]) == 0
    report: dict[str, Any] = json.loads(Path("out/run/report.json").read_text())
    return report


def everything(directory: Path) -> dict[str, tuple[int, int]]:
    states = {path: path.stat() for path in directory.rglob("*")}
    return {str(path): (state.st_size, state.st_mtime_ns) for path, state in states.items()}


# --- no weights read, nothing written


@pytest.fixture
def llama_8b(tmp_path: Path) -> Path:
    """A checkpoint of Llama-3-8B's shape, of which only the headers take room on the disk."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    directory = tmp_path / "llama"
    config.save_pretrained(directory)
    write_tokenizer(directory)
    with init_empty_weights():
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return directory


@pytest.fixture
def _unreadable_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Checkpoint, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")

    def hash_of(path: Path) -> str:
        assert path.suffix != ".safetensors", f"{path} was read"
        return "0" * 64

    monkeypatch.setattr(Checkpoint, "_read_one", refuse)
    for module in (checkpoint, model_stage):
        monkeypatch.setattr(module, "file_hash", hash_of)


@pytest.mark.usefixtures("_unreadable_weights")
def test_a_model_of_8_billion_parameters_is_planned_from_its_headers(llama_8b: Path) -> None:
    estimate = planned([*TINY, f"model.path={llama_8b}", "quantizer.group_size=128", "rotation=learned"])
    assert estimate.memory > 2 * 2 * 128256 * 4096  # input and output embeddings
    assert estimate.disk > 2 * 8e9
    assert estimate.seconds > 1


def test_a_plan_writes_nothing_and_makes_no_store(words: list[str], model: Path, tmp_path: Path) -> None:
    before = everything(model)
    assert main(["plan", *words, RUN]) == 0
    assert everything(tmp_path) == {}
    assert everything(model) == before


def test_a_plan_changes_nothing_in_a_store(words: list[str], tmp_path: Path) -> None:
    quantized(words)
    before = everything(tmp_path)
    states(words)
    states([*words, "quantizer.bits=3", "rotation=hadamard"])
    assert everything(tmp_path) == before


# --- states of stages


def test_a_stage_is_to_make_before_its_run_and_reused_after_it(words: list[str]) -> None:
    before, estimate = states(words), planned(words)
    assert [before[name] for name in MADE] == ["to make"] * 3
    report = quantized(words)
    after = planned(words)
    assert [stage.state for stage in after.stages if stage.name in MADE] == ["reused"] * 3
    assert all(stage.seconds == stage.disk == 0 for stage in after.stages if stage.name in MADE)
    assert after.seconds < estimate.seconds
    assert [name for name in before if name != "run directory"] == [stage["name"] for stage in report["stages"]]


def test_windows_that_the_model_writes_are_to_make_and_then_reused(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*words, "calibration.add_generated=2"]
    before = planned(words)
    assert [stage.state for stage in before.stages if stage.name == "generated tokens"] == ["to make"]
    assert main(["calibrate", *words, "output=tokens"]) == 0
    assert states(words)["generated tokens"] == "reused"
    assert planned(words).seconds < before.seconds
    monkeypatch.setattr("jointq_cli.stages.generated_tokens.complete_bytes", lambda *_: 1e18)
    assert main(["plan", *words, "calibration.seed=1"]) == 1
    assert "needing 1e+09 GB" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stage_that_does_not_depend_on_a_setting_is_shared(words: list[str]) -> None:
    quantized(words)
    found = states([*words, "quantizer.bits=3"])
    assert [found[name] for name in MADE] == ["to make", "reused", "to make"]


def test_a_rotated_run_is_found_again_and_its_rotation_shared(words: list[str]) -> None:
    words = [*words, "rotation=hadamard"]
    before = states(words)
    assert [before[name] for name in ("activations", "rotate", *MADE)] == ["to make"] * 5
    report = quantized(words)
    assert [name for name in before if name != "run directory"] == [stage["name"] for stage in report["stages"]]
    after = states(words)
    assert [after[name] for name in ("activations", "rotate", *MADE)] == ["reused"] * 5
    other = states([*words, "rotation.seed=1"])
    assert [other[name] for name in ("activations", "rotate", *MADE)] == [
        "reused", "to make", "to make", "reused", "to make",
    ]  # fmt: skip


def test_an_interrupted_run_continues_at_its_block(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    finish = HiddenStateFile.write

    def stop(self: HiddenStateFile, *given: Any) -> None:
        finish(self, *given)
        raise Interrupted("stopped")

    whole = planned(words)
    with monkeypatch.context() as patched:
        patched.setattr(HiddenStateFile, "write", stop)
        assert main(["quantize", *words, RUN]) == Interrupted.exit_code
    remaining = planned(words)
    stage = {stage.name: stage for stage in remaining.stages}["quantize"]
    assert stage.state == "continues at block 2 of 3"
    assert stage.disk == pytest.approx({stage.name: stage for stage in whole.stages}["quantize"].disk * 2 / 3)


def test_weights_that_changed_since_are_unknown_until_a_run_has_read_them(words: list[str], tmp_path: Path) -> None:
    mine = write_checkpoint(tmp_path / "mine")
    words = [*words, f"model.path={mine}"]
    quantized(words)
    os.utime(mine / "model.safetensors", (0, 0))
    estimate = planned(words)
    found = {stage.name: stage.state for stage in estimate.stages}
    assert [found[name] for name in MADE] == ["unknown"] * 3
    assert any(str(mine) in note for note in estimate.notes)
    quantized(words)
    assert [states(words)[name] for name in MADE] == ["reused"] * 3


def test_a_rotated_run_that_was_stopped_is_known_too(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*words, "rotation=hadamard"]

    def stop(*given: Any, **named: Any) -> None:
        raise Interrupted("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(quantize_stage, "assemble", stop)
        assert main(["quantize", *words, RUN]) == Interrupted.exit_code
    stage = {stage.name: stage for stage in planned(words).stages}["quantize"]
    assert stage.state == "continues after all blocks"
    assert stage.disk > 0  # the checkpoint is yet to be written


def test_a_damaged_artifact_is_to_make(words: list[str]) -> None:
    quantized(words)
    next(Path("out/store").glob("quantize-*/layers/*.json")).unlink()
    assert states(words)["quantize"] == "to make"


HESSIANS = ["quantizer=gptq", "quantizer.group_size=32", "calibration.inputs=original"]


def test_hessians_of_the_original_are_not_those_of_its_rotation(words: list[str]) -> None:
    words = [*words, *HESSIANS]
    quantized(words)
    assert "hessians" not in states(words)  # what they are for is there
    assert states([*words, "quantizer.bits=2"])["hessians"] == "reused"
    found = states([*words, "quantizer.bits=2", "rotation=hadamard"])
    assert found["rotate"] == found["hessians"] == found["quantize"] == "to make"


def test_gradients_are_a_stage_that_other_settings_of_the_solve_reuse(words: list[str]) -> None:
    words = [*words, "curvature=kfac"]
    assert states(words)["gradients"] == "to make"
    assert "K-FAC strength=1" in quantized(words)["quantizer"]
    assert "gradients" not in states(words)  # what they are for is there
    assert states([*words, "quantizer.bits=2", "curvature.strength=0.2"])["gradients"] == "reused"
    assert states([*words, "curvature.seed=1"])["gradients"] == "to make"


def test_whether_hessians_are_kept_is_counted_as_the_run_counts(words: list[str]) -> None:
    words = [*words, *HESSIANS, "runtime.hessians_gb=0.00055"]
    planned_stages = [name for name in states(words) if name != "run directory"]
    assert planned_stages == [stage["name"] for stage in quantized(words)["stages"]]


def test_an_evaluation_of_a_hubs_text_is_not_known_to_be_there_or_not(words: list[str]) -> None:
    quantized(words)
    estimate = planned([*words, "evaluation=wikitext2"])
    found = {stage.name: stage.state for stage in estimate.stages}
    assert [found[name] for name in MADE] == ["reused", "unknown", "unknown"]
    assert any("evaluation.dataset=wikitext2" in note for note in estimate.notes)


@pytest.mark.slow
def test_a_run_does_not_rely_on_the_noted_hash(words: list[str], tmp_path: Path) -> None:
    mine = write_checkpoint(tmp_path / "mine")
    words = [*words, f"model.path={mine}"]
    first = quantized(words)
    file = mine / "model.safetensors"
    state = file.stat()
    content = bytearray(file.read_bytes())
    content[-4:] = b"\0\0\0\0"
    file.write_bytes(content)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert states(words)["quantize"] == "reused"  # all that a plan can see
    second = quantized(words)
    assert second["model_hash"] != first["model_hash"]
    assert not any(stage["reused"] for stage in second["stages"])


@pytest.mark.slow
def test_the_bundled_model_is_to_make_before_a_run_and_reused_after_it() -> None:
    words = ["recipe=ci_smoke", "output_dir=out"]
    before = planned(words)
    assert [stage.state for stage in before.stages if stage.name in MADE] == ["to make"] * 3
    quantized(words)
    assert [states(words)[name] for name in MADE] == ["reused"] * 3


@pytest.mark.slow
def test_memory_is_estimated_within_a_third() -> None:
    words = ["recipe=ci_smoke", "output_dir=out"]
    finished = [
        subprocess.run([sys.executable, "-m", "jointq_cli", command, *words], capture_output=True, text=True)
        for command in ("plan", "quantize")
    ]
    assert [process.returncode for process in finished] == [0, 0]
    estimated, unit = re.findall(r"^memory: ([\d.]+) (MB|GB) at its peak", finished[0].stdout, re.MULTILINE)[0]
    (report,) = Path("out").glob("ci_smoke/*/report.json")
    peak = json.loads(report.read_text())["peak_memory"]
    assert 0.75 < float(estimated) * {"MB": 1e6, "GB": 1e9}[unit] / peak < 1.33


# --- noted hashes


def test_a_note_holds_as_long_as_size_and_time_do(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_text("one")
    cache_hash(tmp_path, file, [file], "digest")
    assert cached_hash(tmp_path, file, [file]) == "digest"
    file.write_text("longer")
    assert cached_hash(tmp_path, file, [file]) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}'])
def test_a_damaged_note_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    assert cached_hash(tmp_path, tmp_path / "x", []) is None
    cache_hash(tmp_path, tmp_path / "x", [], "digest")
    assert cached_hash(tmp_path, tmp_path / "x", []) == "digest"


def test_a_store_that_cannot_be_written_stops_no_run(tmp_path: Path) -> None:
    cache_hash(tmp_path / "nowhere", tmp_path, [], "digest")
    assert cached_hash(tmp_path / "nowhere", tmp_path, []) is None


# --- estimates


@pytest.fixture(scope="module")
def load(model: Path) -> Workload:
    found: list[Workload] = []
    launch("plan", [*TINY, f"model.path={model}"], lambda recipe, job: found.append(_load_of(recipe)))
    return found[0]


def _load_of(recipe: Any) -> Workload:
    inputs = find_inputs(recipe, CPU)
    return workload(recipe, inputs, dry_run(recipe, inputs))


def stages_of(load: Workload) -> Iterator[Any]:
    for name in ("activations", "rotate", "quantize", "evaluate_original", "evaluate_quantized", "audit"):
        yield getattr(load, name)()


def test_shapes_are_those_of_the_checkpoint(load: Workload, model: Path) -> None:
    held = Checkpoint(model)
    assert load.shapes.in_blocks + load.shapes.outside == held.parameters
    assert load.shapes.is_tied
    linear = [info.shape for name, info in held.tensors.items() if "_proj" in name]
    assert load.shapes.selected == sum(math.prod(shape) for shape in linear)
    assert [(one.in_features, one.out_features) for one in load.shapes.inputs[:4]] == [
        (64, (64, 32, 32)), (64, (64,)), (64, (128, 128)), (128, (64,)),
    ]  # fmt: skip


@pytest.mark.parametrize("part", ["calibration", "evaluation"])
def test_more_windows_cost_more(load: Workload, part: str) -> None:
    more = replace(load, **{part: Windows(1000, 32)})
    some, many = total(list(stages_of(load))), total(list(stages_of(more)))
    assert many.seconds > some.seconds
    assert many.disk >= some.disk
    kind = "quantize" if part == "calibration" else "evaluate_original"
    assert getattr(more, kind)().memory > getattr(load, kind)().memory


def test_a_larger_model_costs_more_of_everything(load: Workload) -> None:
    shapes = load.shapes
    larger = replace(
        load,
        shapes=replace(
            shapes,
            largest_block=2 * shapes.largest_block,
            in_blocks=2 * shapes.in_blocks,
            vocabulary=2 * shapes.vocabulary,
            outside=2 * shapes.outside,
        ),
    )
    for small, large in zip(stages_of(load), stages_of(larger), strict=True):
        assert large.seconds >= small.seconds
        assert large.memory >= small.memory
        assert large.disk >= small.disk
    assert larger.quantize().memory > load.quantize().memory
    assert larger.quantize().disk > load.quantize().disk


def test_memory_follows_the_block_and_not_the_number_of_blocks(load: Workload) -> None:
    shapes = replace(load.shapes, blocks=100, in_blocks=100 * load.shapes.in_blocks, inputs=100 * load.shapes.inputs)
    assert replace(load, shapes=shapes).quantize().memory == load.quantize().memory


def test_suspended_passes_are_bounded_by_their_key(load: Workload) -> None:
    many = replace(load, calibration=Windows(100_000, 32))
    recipe = replace(load.recipe, runtime=replace(load.recipe.runtime, suspended_activations_gb=0.0))
    spared = many.quantize().memory - replace(many, recipe=recipe).quantize().memory
    per_token = 2 * 64 + 128
    assert spared == pytest.approx(100_000 * 32 * max(4 * 64, per_token) * load.element)


def test_time_and_disk_of_stages_add_up_and_memory_does_not(load: Workload) -> None:
    costs = list(stages_of(load))
    both = total(costs)
    assert both.seconds == pytest.approx(sum(cost.seconds for cost in costs))
    assert both.memory == max(cost.memory for cost in costs)
    assert costs[2].remaining(0.0) == total([])


@pytest.mark.slow
def test_disk_is_what_a_run_leaves_in_the_store(words: list[str]) -> None:
    words = [*words, "rotation=hadamard"]
    estimates = {stage.name: stage.disk for stage in planned(words).stages}
    quantized(words)
    for name, kind in KINDS.items():
        (directory,) = Path("out/store").glob(f"{kind}-*")
        kept = sum(path.stat().st_size for path in directory.rglob("*.safetensors") if "scores" not in path.name)
        # Headers of so small files are as large as what they hold.
        assert estimates[name] == pytest.approx(kept, rel=0.7, abs=60_000), name


# --- warnings


def test_a_run_shows_the_warnings_of_its_plan(words: list[str]) -> None:
    words = [*words, "rotation=hadamard", "evaluation.seqlen=128"]
    warnings = planned(words).warnings
    keys = [warning.split(":")[0] for warning in warnings]
    assert keys == ["evaluation.seqlen=128", "calibration.num_samples", "evaluation.max_windows", "rotation.r1=true"]
    assert quantized(words)["warnings"] == warnings


def test_experts_are_planned_calibrated_and_reported(tmp_path: Path) -> None:
    words = [*TINY, f"model.path={write_checkpoint(tmp_path / 'model', 'mixtral')}", "experts.warn_below=1000"]
    estimate = planned(words)
    [few] = [text for text in estimate.warnings if text.startswith("calibration.num_samples:")]
    assert few.startswith("calibration.num_samples: 256 tokens, some 128 for each expert, for layers of 96 columns are")
    report = quantized(words)
    layers = [layer for layer in report["layers"] if layer["tokens"] is not None]
    assert {layer["kind"] for layer in layers} == {"gate_proj", "up_proj", "down_proj"}
    counts = {layer["name"].rpartition(".")[0]: layer["tokens"] for layer in layers}
    assert sum(counts.values()) == 2 * 2 * 256  # blocks, experts per token, tokens
    assert any(f"{len(counts)} of {len(counts)} experts have received fewer" in text for text in report["warnings"])
    assert states(words)["quantize"] == "reused"
    assert states([*words, "experts.memory_gb=0"])["quantize"] == "reused"
    assert states([*words, "experts.routing=own"])["quantize"] == "reused"  # without qep there is nothing to compare
    assert states([*words, "experts.calibration=all"])["quantize"] == "to make"


def test_settings_of_experts_are_nothing_to_other_models(tmp_path: Path) -> None:
    words = [*TINY, f"model.path={write_checkpoint(tmp_path / 'model')}"]
    quantized(words)
    assert states([*words, "experts.calibration=all"])["quantize"] == "reused"


def test_experts_that_are_left_out_are_named_in_plan_run_and_report(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", "granitemoe")
    words = [*TINY, f"model.path={model}", "layers.exclude_layer_keywords=[experts]"]
    [warning] = [text for text in planned(words).warnings if text.startswith("layers:")]
    assert warning == (
        "layers: only 11 % of the weights of the blocks are quantised; left out are "
        "block_sparse_moe.experts.*.gate_proj: 30 %, block_sparse_moe.experts.*.up_proj: 30 %, "
        "block_sparse_moe.experts.*.down_proj: 30 %"
    )
    report = quantized(words)
    coverage = report["coverage"]
    assert warning in report["warnings"]
    assert coverage["share"] == pytest.approx(12288 / (12288 + 98304 + 256))
    assert coverage["block_bits"] == pytest.approx(
        report["bits_per_weight"] * coverage["share"] + 32 * (1 - coverage["share"])
    )
    assert coverage["checkpoint_bits"] == pytest.approx(8 * report["audit"]["packed_bytes"] / report["parameters"])
    text = Path("out/run/report.md").read_text()
    assert (
        f"bits per weight in 11.1 % of the blocks' weights ({significant(coverage['block_bits'], 3)} in all of them)"
        in text
    )
    assert "| bits/model |" in text


def test_a_layer_that_the_model_does_not_call_is_named_in_plan_run_and_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=256, state_size=8)
    monkeypatch.setitem(FAMILIES, "mamba", lambda: config)
    words = [*TINY, f"model.path={write_checkpoint(tmp_path / 'model', 'mamba')}", "quantizer.group_size=-1"]
    [share, reason] = [text for text in planned(words).warnings if text.startswith("layers:")]
    assert "mixer.dt_proj: 1.8 %" in share
    assert reason.startswith("layers: mixer.dt_proj cannot be quantised and is left out: the model uses its weight")
    report = quantized(words)
    assert {share, reason} <= set(report["warnings"])
    assert report["reload_check"] == "identical"


def test_conv1d_layers_are_planned_quantised_and_audited_like_linear_ones(tmp_path: Path) -> None:
    words = [*TINY, f"model.path={write_checkpoint(tmp_path / 'model', 'gpt2')}", "activations=a8"]
    assert {stage.name for stage in planned(words).stages} >= set(MADE)
    report = quantized(words)
    assert report["coverage"]["share"] == 1
    assert report["reload_check"] == "identical"
    assert not report["audit"]["changed"]
    assert len(report["simulation"]["clip_ratios"]) == report["audit"]["quantized"] == 12
    shapes = {layer["kind"]: (layer["out_features"], layer["in_features"]) for layer in report["layers"]}
    assert shapes == {"c_attn": (192, 64), "c_fc": (256, 64), "c_proj": (64, 256)}
    few = [word for word in TINY if word.startswith(("evaluation", "output_dir"))]
    assert main(["evaluate", "model.path=out/run/checkpoint", *few]) == 0


@pytest.mark.parametrize("kind", ["c_attn", "attn.c_proj"])  # the second is square
def test_conv1d_layers_are_not_exported(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TINY, f"model.path={write_checkpoint(tmp_path / 'model', 'gpt2')}", "export=compressed-tensors"]
    assert main(["plan", *words, f"layers.include_layer_names=[{kind}]"]) == 1
    assert re.search(rf"error: export=.*{kind}.weight is stored as \(in, out\)", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # the calibration windows are cut from the start of the text, and so are the evaluated ones
        (["calibration.split=evaluation"], "4 of 4 windows hold text of the calibration windows"),
        (["calibration.split=evaluation", "calibration.strategy=drop_head", "evaluation.max_windows=1"], "windows"),
        ([], None),
    ],
)
def test_a_text_that_calibrates_and_evaluates_is_noticed(
    words: list[str], changes: list[str], expected: str | None
) -> None:
    def noticed(warnings: list[str]) -> list[str]:
        return [text for text in warnings if text.startswith("evaluation.split=evaluation: ")]

    found = noticed(planned([*words, *changes]).warnings)
    assert noticed(quantized([*words, *changes])["warnings"]) == found
    assert len(found) == (expected is not None)
    assert (expected or "") in "".join(found)


def test_a_copy_of_the_calibration_file_is_noticed(words: list[str], tmp_path: Path) -> None:
    text = " ".join(str(number**3) for number in range(20_000))
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text(text)
    files = [
        "calibration=text", f"calibration.path={tmp_path / 'one.txt'}", "calibration.strategy=concat_rand",
        "evaluation=text", f"evaluation.path={tmp_path / 'two.txt'}",
    ]  # fmt: skip
    [warning, *_] = planned([*files, *words]).warnings
    assert warning.startswith(f"evaluation.path={tmp_path / 'two.txt'}: the text of calibration, though other windows")


def test_a_split_of_the_hub_for_both_is_noticed_before_it_is_fetched(words: list[str]) -> None:
    both = [*words, "calibration=wikitext2", "evaluation=wikitext2", "evaluation.split=train"]
    assert planned(both).warnings[0].startswith("evaluation.split=train: the text of calibration;")
    assert not any("the text of" in text for text in planned([*both, "evaluation.split=test"]).warnings)


def test_enough_tokens_give_no_warning(words: list[str]) -> None:
    words = [*words, "calibration.num_samples=32", f"evaluation.max_windows={LEAST_SCORED // 31 + 1}"]
    assert planned(words).warnings == []


def test_a_head_that_is_not_excluded_is_said_to_be_left_out(words: list[str]) -> None:
    warnings = planned([*words, "layers.exclude_layer_names=[]"]).warnings
    assert warnings[-1].startswith("layers.exclude_layer_names=[]: the head is not quantised all the same")


def test_a_short_text_is_not_said_to_be_cut(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("some words " * 20)
    words = [*words, "evaluation=text", f"evaluation.path={tmp_path / 'short.txt'}", "evaluation.max_windows=1000"]
    assert planned([*words, "evaluation.seqlen=32"]).warnings[-1].startswith("evaluation.path: only ")


def test_run_directories_on_another_disk_have_their_own_room(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jointq_cli.stages.plan.estimate._one_disk", lambda recipe: False)
    monkeypatch.setattr(machine, "free_disk", lambda path: 10**9 if "store" in str(path) else 10**5)
    [warning] = [text for text in planned(words).warnings if "GB there" in text]
    assert warning.startswith("output_dir=out: ")
    monkeypatch.setattr(machine, "free_disk", lambda path: 10**6 if "store" in str(path) else 10**9)
    assert not [text for text in planned(words).warnings if text.startswith("output_dir")]


def test_too_little_memory_and_disk_are_reported_with_their_keys(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 10**8)
    monkeypatch.setattr(machine, "free_disk", lambda path: 10**5)
    memory, disk = planned(words).warnings[-2:]
    assert "runtime.suspended_activations_gb=4, runtime.batch_tokens=64: " in memory
    assert "0.1 GB are free" in memory
    assert disk.startswith("store=out/store: ")


def test_the_limit_of_a_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, use = tmp_path / "max", tmp_path / "current"
    use.write_text("1000\n")
    monkeypatch.setattr(machine, "CGROUPS", ((str(limit), str(use)),))
    free = machine.available_memory()
    limit.write_text("max\n")
    assert machine.available_memory() == pytest.approx(free, rel=0.5)
    limit.write_text("3000\n")
    own = machine._status("VmRSS") or 0
    assert machine.available_memory() == pytest.approx(own + 2000, rel=0.05)
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {10**10}\n")  # what was read may go again
    assert machine.available_memory() > min(free, 10**9)


def test_a_missing_directory_is_on_the_disk_of_its_parent(tmp_path: Path) -> None:
    assert nearest_existing(tmp_path / "a" / "b") == tmp_path
    assert machine.free_disk(tmp_path / "a" / "b") > 0


# --- what cannot be planned


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("quantizer.group_size=48", "quantizer.group_size=48: must divide in_features"),
        ("layers.include_layer_names=[nothing]", "layers.include_layer_names: 'nothing' matches none"),
        ("model.path=nobody/nothing", "model.path=nobody/nothing: no such directory here, and not downloaded yet"),
        ("calibration.seqlen=10000000", "calibration.seqlen=10000000: pydoc/calibration has only"),
        ("model.path=./nowhere", "model.path=./nowhere: no such directory"),
    ],
)
def test_what_the_run_would_refuse_is_refused(
    words: list[str], setting: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *words, setting]) == JointqError.exit_code
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_a_rotation_that_the_architecture_does_not_admit_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    neox = write_checkpoint(tmp_path / "neox", "gpt_neox")
    assert main(["plan", *words, f"model.path={neox}"]) == 0
    assert main(["plan", *words, f"model.path={neox}", "rotation=hadamard"]) == 1
    assert "rotation: jointq does not know which tensors" in capsys.readouterr().err


def test_a_quantised_checkpoint_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = write_checkpoint(tmp_path / "mine")
    edit_config(mine, quantization_config={})
    assert main(["plan", *words, f"model.path={mine}"]) == 1
    assert "is quantised already" in capsys.readouterr().err


def test_a_rotation_is_refused_also_where_texts_are_yet_to_be_fetched(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    neox = write_checkpoint(tmp_path / "neox", "gpt_neox")
    assert main(["plan", *words, f"model.path={neox}", "rotation=hadamard", "calibration=c4"]) == 1
    assert "rotation: jointq does not know which tensors" in capsys.readouterr().err


def test_a_part_of_a_model_of_the_hub_is_not_a_model(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tokenizer(tmp_path / "snapshot")
    monkeypatch.setattr(
        "jointq_cli.models.sources.snapshot_download", lambda *given, **named: str(tmp_path / "snapshot")
    )
    assert main(["plan", *words, "model.path=acme/model"]) == 1
    assert "not downloaded yet" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_with_vision_is_planned_as_it_is_run(words: list[str], tmp_path: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**GROUPED, "head_dim": 16, "sliding_window": 8},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "seeing")
    write_tokenizer(tmp_path / "seeing")
    words = [*words, f"model.path={tmp_path / 'seeing'}"]
    assert states(words)["quantize"] == "to make"
    quantized(words)
    assert states(words)["quantize"] == "reused"


def test_texts_of_the_hub_are_to_fetch_and_the_other_stages_are_still_planned(words: list[str]) -> None:
    found = states([*words, "evaluation=wikitext2", "calibration=c4", "calibration.num_samples=4"])
    assert found["calibration tokens"] == found["evaluation tokens"] == "to fetch"
    assert [found[name] for name in MADE] == ["to make"] * 3


def test_a_gguf_file_that_no_run_has_converted_is_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.gguf").write_bytes(b"GGUF")
    assert main(["plan", *words, "model.path=mine.gguf"]) == 1
    assert "model.path=mine.gguf: has to be converted first" in capsys.readouterr().err


def test_a_sweep_is_no_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words in (["-m", "quantizer.bits=2,3"], ["hydra.mode=MULTIRUN", "quantizer.bits=2,3"]):
        assert main(["plan", *words]) in (1, USAGE_ERROR)
        assert "without -m" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []


def test_a_run_directory_that_is_named_is_not_made(words: list[str], tmp_path: Path) -> None:
    assert main(["plan", *words, "++hydra.run.dir=made"]) == 0
    assert list(tmp_path.iterdir()) == []


# --- output


def test_a_pipe_gets_plain_lines_with_everything_in_them(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    lines = out.splitlines()
    assert lines[0].startswith("recipe ")
    assert any(line.startswith("About ") for line in lines)
    assert any(line.split()[:3] == ["quantize", "to", "make"] for line in lines)
    assert "! calibration.num_samples: " in out


@pytest.mark.slow
def test_hessians_of_original_inputs_are_a_stage_and_spare_the_next_run_their_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["recipe=ci_smoke", "quantizer=gptq", "qep=none", "calibration.inputs=original"]
    states = []
    for damping in ("0.01", "0.02"):
        assert main(["plan", *words, f"quantizer.damping={damping}"]) == 0
        [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("hessians ")]
        states.append(" ".join(line.split()[1:3]))
        assert main(["quantize", *words, f"quantizer.damping={damping}"]) == 0
        capsys.readouterr()
    assert states[0] == "to make"
    assert states[1].startswith("reused")


def test_a_plan_warns_of_two_sets_of_weights(words: list[str], tmp_path: Path) -> None:
    both = write_checkpoint(tmp_path / "both", shard="100KB")
    (write_checkpoint(tmp_path / "one") / "model.safetensors").rename(both / "model.safetensors")
    assert any("has both" in warning for warning in planned([*words, f"model.path={both}"]).warnings)


def test_a_plan_warns_of_weights_that_jointq_has_quantised(words: list[str], tmp_path: Path) -> None:
    again = write_checkpoint(tmp_path / "again")
    edit_config(again, jointq={"version": "1.0", "quantizer": "RTN W4 g128"})
    expected = "model.path: jointq has quantised these weights already (RTN W4 g128); use the original model"
    assert expected in planned([*words, f"model.path={again}"]).warnings
