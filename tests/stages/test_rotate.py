"""A rotated model from the command to the checkpoint: same function, same bits however often stopped, nothing twice.

On a random Llama with tied embeddings and grouped heads: what R1, R2 and untying have to get right.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import write_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from jointq_cli.cli.main import main
from jointq_cli.errors import Interrupted
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.forward import final_hidden
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.records import EvaluationReport, RotationRecord, RunReport
from jointq_cli.report import load_record, load_report, rotation_summary
from jointq_cli.report.summary import problems
from jointq_cli.stages import rotate as rotation_stages
from jointq_cli.system.interrupts import Interrupts

CPU = torch.device("cpu")
LEARNED = ["rotation=learned", "rotation.r2_epochs=10", "rotation.reservoir_tokens=256"]  # of 512 that there are
ALL = [*LEARNED, "smoothing=smoothquant", "activations=a4"]


@dataclass(frozen=True)
class Place:
    """A folder with a model, a text and a store; runs go into out/NAME."""

    path: Path

    def __call__(self, name: str, *settings: str, command: str = "quantize", model: str = "model") -> int:
        text = f"path={self.path / 'text.txt'}"
        words = [
            f"model.path={self.path / model}", f"output_dir={self.path / 'out'}", f"hydra.run.dir={self.out(name)}",
            "evaluation=text", f"evaluation.{text}", "evaluation.seqlen=32", "evaluation.max_windows=8",
        ]  # fmt: skip
        if command != "evaluate":
            words += [
                "recipe=ci_smoke", "calibration=text", f"calibration.{text}", "calibration.num_samples=16",
                "calibration.seqlen=32", "quantizer=rtn", "quantizer.group_size=32", "qep=none", "generate_tokens=0",
            ]  # fmt: skip
        return main([command, *words, *settings])

    def out(self, name: str) -> Path:
        return self.path / "out" / name

    def report(self, name: str) -> RunReport:
        return load_report(self.out(name) / "report.json")

    def evaluation(self, name: str) -> EvaluationReport:
        found: EvaluationReport = load_record(EvaluationReport, self.out(name) / "evaluation.json")
        return found

    def reused(self, name: str) -> set[str]:
        """The stages that a run found in the store."""
        return {stage.name for stage in self.report(name).stages if stage.reused}

    def artifacts(self) -> list[str]:
        """Kinds of what is finished in the store."""
        return sorted(path.name.split("-")[0] for path in self.path.glob("out/store/[!.]*-*"))


@pytest.fixture(scope="module", autouse=True)
def _without_pictures() -> Iterator[None]:
    """The page of a report is tested elsewhere, and takes a second to draw."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jointq_cli.report.pages.run.run_html", lambda report: "")
        yield


def prepare(path: Path, family: str = "llama_tied", dtype: torch.dtype = torch.float32) -> Place:
    write_checkpoint(path / "model", family, dtype=dtype)
    (path / "text.txt").write_text(" ".join(f"{n} times {n + 1} is {n * (n + 1)}." for n in range(300)))
    return Place(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return prepare(tmp_path_factory.mktemp("rotated"))


@pytest.fixture(scope="module")
def hadamard(place: Place) -> RunReport:
    assert place("hadamard", "rotation=hadamard", "activations=a4") == 0
    return place.report("hadamard")


@pytest.fixture(scope="module")
def whole(place: Place) -> RunReport:
    """Smoothed, learned and simulated."""
    assert place("whole", *ALL) == 0
    return place.report("whole")


@pytest.fixture(scope="module")
def online(place: Place) -> RunReport:
    assert place("online", "rotation=hadamard", "rotation.r4=true") == 0
    return place.report("online")


def hashes(directory: Path) -> dict[str, str]:
    files = [path for path in sorted(directory.iterdir()) if path.name != "README.md"]  # which has measurements
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def ids() -> Tensor:
    return torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def streamed_logits(directory: Path) -> Tensor:
    model = StreamedModel(Checkpoint(directory), CPU, torch.float32)
    hidden = final_hidden(model, ids(), batch=2)
    with model.outer():
        return model.logits(hidden)


@torch.no_grad()
def plain_logits(directory: Path) -> Tensor:
    found: Tensor = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(ids()).logits
    return found


def distance(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


# --- what a run proves


def test_the_report_tells_of_the_rotation_and_of_what_was_simulated(place: Place, hadamard: RunReport) -> None:
    assert hadamard.rotation is not None
    assert hadamard.rotation.rotation == "R1+R2 random Hadamard seed=0"
    assert hadamard.rotation.smoothing == ""
    assert hadamard.rotation.constructions == ["R1: Hadamard 64", "R2: Hadamard 16"]
    assert hadamard.rotation.orthogonality_error < 1e-12
    assert hadamard.rotation.invariance.merge < 5e-6
    assert len(hadamard.rotation.sites) == 3 * 4
    assert hadamard.rotation.rotated_bytes > hadamard.rotation.source_bytes  # untied
    assert hadamard.simulation is not None
    assert hadamard.simulation.activations == "A4 asymmetric per token clip=searched down_proj=A8"
    assert set(hadamard.simulation.clip_ratios) == {layer.name for layer in hadamard.layers}
    assert hadamard.reload_check == "identical"
    assert hadamard.audit.passed
    assert not problems(hadamard)


def test_the_basis_lies_beside_the_checkpoint_and_is_the_one_of_the_report(place: Place, hadamard: RunReport) -> None:
    directory = place.out("hadamard") / "rotation"
    assert {path.name for path in directory.iterdir()} == {"rotation.json", "rotation.safetensors"}
    assert load_record(RotationRecord, directory / "rotation.json") == hadamard.rotation
    assert hadamard.rotation is not None
    assert hashes(directory)["rotation.safetensors"] == hadamard.rotation.hash
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(directory / "rotation.safetensors").items()}
    assert shapes == {"r1": (64, 64), "r2": (3, 2, 16, 16)}


@pytest.mark.parametrize("name", ["hadamard", "whole"])
def test_plain_transformers_runs_the_checkpoint_as_the_engine_does(
    name: str, place: Place, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(name)
    checkpoint = place.out(name) / "checkpoint"
    assert distance(plain_logits(checkpoint), streamed_logits(checkpoint)) < 1e-5
    assert distance(plain_logits(checkpoint), plain_logits(place.path / "model")) > 1e-3  # it was quantised


def test_the_embeddings_are_untied_for_good(place: Place, hadamard: RunReport) -> None:
    """Tied again by whoever saves and loads them, they would be a hundred percent wrong."""
    source, checkpoint = place.path / "model", place.out("hadamard") / "checkpoint"
    tied = [json.loads((path / "config.json").read_text())["tie_word_embeddings"] for path in (source, checkpoint)]
    assert tied == [True, False]
    again = place.path / "saved_again"
    AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).save_pretrained(again)
    assert torch.equal(plain_logits(again), plain_logits(checkpoint))


def test_the_size_that_a_packed_model_is_compared_with_is_the_originals(place: Place, hadamard: RunReport) -> None:
    """Not that of the rotated one, which untying has made larger."""
    assert hadamard.audit.source_bytes == Checkpoint(place.path / "model").weight_bytes
    assert hadamard.audit.checkpoint_bytes > hadamard.audit.source_bytes


def test_a_learned_rotation_tells_how_it_was_learned(place: Place, whole: RunReport) -> None:
    assert whole.rotation is not None
    assert [course.name for course in whole.rotation.courses] == ["R1", *(f"R2 of block {n}" for n in range(3))]
    assert whole.rotation.courses[0].moved > 0.01
    for course in whole.rotation.courses:
        assert course.steps > 0
        assert course.errors[0].error == course.error_before >= course.error_after
    assert whole.rotation.smoothing == "SmoothQuant alpha=0.5 o_proj+down_proj"
    tensors = load_file(place.out("whole") / "rotation" / "rotation.safetensors")
    assert set(tensors) == {"r1", "r2", "value_scales", "mlp_scales"}


def test_what_is_learned_raises_the_sqnr_of_what_r1_turns(hadamard: RunReport, whole: RunReport) -> None:
    def gained(report: RunReport) -> float:
        assert report.rotation is not None
        return sum(site.sqnr_after for site in report.rotation.sites if site.name in ("attention", "mlp"))

    assert gained(whole) > gained(hadamard)


def test_smoothing_alone_keeps_the_embeddings_tied(place: Place) -> None:
    assert place("smoothed", "smoothing=smoothquant") == 0
    report = place.report("smoothed")
    assert report.rotation is not None
    assert (report.rotation.rotation, report.rotation.courses) == ("", [])
    assert report.rotation.rotated_bytes < 1.05 * report.rotation.source_bytes
    assert report.rotation.invariance.merge < 5e-6
    assert report.simulation is None
    assert json.loads((place.out("smoothed") / "checkpoint" / "config.json").read_text())["tie_word_embeddings"]


def test_the_original_is_the_model_before_its_rotation(place: Place, hadamard: RunReport) -> None:
    assert place("original", command="evaluate") == 0
    assert place.evaluation("original").perplexity == hadamard.original


# --- nothing twice


def test_another_quantizer_starts_from_the_same_rotated_model(place: Place, hadamard: RunReport) -> None:
    assert place("three_bits", "rotation=hadamard", "activations=a4", "quantizer.bits=3") == 0
    assert place.reused("three_bits") == {"activations", "rotate", "evaluate original"}
    assert place.report("three_bits").rotation == hadamard.rotation


def test_another_rotation_learns_from_the_same_activations(place: Place, hadamard: RunReport) -> None:
    assert place("seed_1", "rotation=hadamard", "rotation.seed=1") == 0
    assert place.reused("seed_1") == {"activations", "evaluate original"}
    other = place.report("seed_1").rotation
    assert hadamard.rotation is not None
    assert other is not None
    assert other.hash != hadamard.rotation.hash


def test_other_calibration_tokens_are_another_basis(place: Place, whole: RunReport) -> None:
    assert place("other_tokens", *LEARNED, "smoothing=smoothquant", "calibration.seed=1", command="rotate") == 0
    record: RotationRecord = load_record(RotationRecord, place.out("other_tokens") / "rotation" / "rotation.json")
    assert whole.rotation is not None
    assert record.hash != whole.rotation.hash


def test_what_is_simulated_changes_the_measurement_and_not_the_checkpoint(place: Place, hadamard: RunReport) -> None:
    assert place("a16", "rotation=hadamard") == 0
    report = place.report("a16")
    assert place.reused("a16") == {"activations", "rotate", "quantize", "evaluate original"}
    assert report.simulation is None
    assert report.quantized != hadamard.quantized
    assert report.comparison.kl_divergence < hadamard.comparison.kl_divergence
    assert report.original == hadamard.original
    assert hashes(place.out("a16") / "checkpoint") == hashes(place.out("hadamard") / "checkpoint")


def test_without_rotation_there_is_none_anywhere(place: Place, hadamard: RunReport) -> None:
    assert place("plain", "activations=a4") == 0
    report = place.report("plain")
    assert report.rotation is None
    assert report.simulation is not None
    assert {"activations", "rotate"}.isdisjoint(stage.name for stage in report.stages)
    assert not (place.out("plain") / "rotation").exists()
    assert place.reused("plain") == {"evaluate original"}


def test_a_run_directory_that_is_used_again_keeps_no_basis_of_an_earlier_run(place: Place) -> None:
    assert place("again", "rotation=hadamard") == 0
    assert place("again") == 0
    assert not (place.out("again") / "rotation").exists()


# --- stopped


def in_activations(store: Path) -> bool:
    return any(store.glob("partial/activations-*/*.safetensors"))


def in_learning(store: Path) -> bool:
    return any(
        path.is_dir() and not (path / "rotation.safetensors").exists() for path in store.glob("partial/rotated-*")
    )


def in_merging(store: Path) -> bool:
    return any(store.glob("partial/rotated-*/checkpoint/model-00002-*"))


@pytest.fixture(scope="module")
def copy(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Place]:
    """Gives the same model and text with an empty store."""

    def made() -> Place:
        path = tmp_path_factory.mktemp("copy")
        for name in ("model", "text.txt"):
            (path / name).symlink_to(place.path / name)
        return Place(path)

    return made


@pytest.mark.parametrize(
    ("where", "times", "error"),
    [
        (in_activations, 1, Interrupted),
        (in_learning, 8, KeyboardInterrupt),
        (in_learning, 50, Interrupted),
        (in_merging, 1, KeyboardInterrupt),
    ],
)
def test_a_stopped_run_goes_on_to_the_bits_of_an_undisturbed_one(
    where: Callable[[Path], bool],
    times: int,
    error: type[BaseException],
    place: Place,
    whole: RunReport,
    copy: Callable[[], Place],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped, calls = copy(), iter(range(10_000))

    def stop(_: Interrupts) -> None:
        if where(stopped.path / "out" / "store") and next(calls) == times - 1:
            raise error("stop")

    with monkeypatch.context() as patch:
        patch.setattr(Interrupts, "raise_if_requested", stop)
        assert stopped("run", *ALL) == 75
    assert next(calls) == times  # it was stopped where it should be
    assert "rotated" not in stopped.artifacts()
    assert not (stopped.out("run") / "report.json").exists()
    if where is in_merging:  # what was learned is not learned again
        monkeypatch.setattr(rotation_stages, "solve_basis", None)
    assert stopped("run", *ALL) == 0
    for part in ("rotation", "checkpoint", "codes"):
        assert hashes(stopped.out("run") / part) == hashes(place.out("whole") / part)
    assert stopped.report("run").quantized == whole.quantized


# --- online


def test_r4_is_in_the_report_and_raises_the_sqnr_before_down_proj(online: RunReport) -> None:
    assert online.rotation is not None
    assert online.rotation.online == ["R4"]
    assert online.rotation.constructions[-1] == "R4: Hadamard 128"
    assert online.rotation.invariance.merge < 5e-6
    inner = [site for site in online.rotation.sites if site.name == "down_proj"]
    assert all(site.sqnr_after > site.sqnr_before and site.peak_after < site.peak_before for site in inner)


def test_plain_transformers_refuses_what_needs_r4_and_says_why(place: Place, online: RunReport) -> None:
    with pytest.raises(ValueError, match="needs jointq"):
        AutoModelForCausalLM.from_pretrained(place.out("online") / "checkpoint")


def test_evaluate_runs_what_needs_r4_and_gives_the_perplexity_of_its_run(place: Place, online: RunReport) -> None:
    assert place("online_again", command="evaluate", model="out/online/checkpoint") == 0
    assert place.evaluation("online_again").perplexity == online.quantized


def test_r4_alone_has_no_tensors_to_keep(place: Place) -> None:
    only = ["rotation=hadamard", "rotation.r1=false", "rotation.r2=false", "rotation.r4=true"]
    assert place("only_r4", *only, command="rotate") == 0
    assert load_file(place.out("only_r4") / "rotation" / "rotation.safetensors") == {}
    checkpoint = place.out("only_r4") / "checkpoint"
    assert distance(streamed_logits(checkpoint), streamed_logits(place.path / "model")) < 5e-6


# --- jointq rotate


def test_rotate_writes_a_model_that_computes_the_same(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert place("rotated", *LEARNED, "smoothing=smoothquant", command="rotate") == 0
    directory = place.out("rotated")
    present = {path.name for path in directory.iterdir()}
    assert present == {"recipe.yaml", "overrides.yaml", "manifest.json", "log.txt", "checkpoint", "rotation"}
    record: RotationRecord = load_record(RotationRecord, directory / "rotation" / "rotation.json")
    assert hashes(directory / "rotation")["rotation.safetensors"] == record.hash
    assert distance(plain_logits(directory / "checkpoint"), plain_logits(place.path / "model")) < 5e-6
    assert place("checked", command="evaluate", model="out/rotated/checkpoint") == 0
    assert place("original_again", command="evaluate") == 0
    found, expected = (place.evaluation(name).perplexity.nll for name in ("checked", "original_again"))
    assert found == pytest.approx(expected, rel=1e-5)
    assert "SQNR of activations at 4 bits" in capsys.readouterr().out


def test_rotate_fails_where_nothing_was_learned(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jointq_cli.report.rotation_summary.LEAST_MOVE", 10.0)
    assert place("idle", *LEARNED, command="rotate") == 1
    assert "error: nothing was learned for R1" in capsys.readouterr().err
    assert (place.out("idle") / "rotation" / "rotation.json").exists()


def test_too_few_tokens_to_measure_with_are_refused_in_one_line(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place("few", "rotation=hadamard", "calibration.num_samples=1", command="rotate") == 1
    error = capsys.readouterr().err
    assert error == "error: calibration.num_samples=1: must make at least 64 tokens for a rotation, not 32\n"


def test_a_recipe_is_rotated_once_for_both_commands(place: Place, hadamard: RunReport) -> None:
    before = place.artifacts()
    assert place("rotated_hadamard", "rotation=hadamard", command="rotate") == 0
    assert place.artifacts() == before
    directory = place.out("rotated_hadamard") / "rotation"
    assert load_record(RotationRecord, directory / "rotation.json") == hadamard.rotation


def test_in_bfloat16_a_rotated_model_rounds_no_more_than_the_original(tmp_path: Path) -> None:
    halves = prepare(tmp_path, dtype=torch.bfloat16)
    assert halves("run", "rotation=hadamard", command="rotate") == 0
    record: RotationRecord = load_record(RotationRecord, halves.out("run") / "rotation" / "rotation.json")
    assert record.invariance.merge < 5e-6
    assert 1e-4 < record.invariance.rounding < 0.1
    assert record.invariance.stored < 1.5 * record.invariance.rounding
    assert not rotation_summary.problems(record)
    stored = load_file(halves.out("run") / "checkpoint" / "model-00002-of-00004.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_rotates_as_a_cpu_does(place: Place, whole: RunReport) -> None:
    assert place("gpu", *ALL, "rotation.r4=true", "runtime.device=cuda") == 0
    report = place.report("gpu")
    assert report.rotation is not None
    assert report.rotation.invariance.merge < 5e-6
    assert report.reload_check == "identical"
    assert not problems(report)
    assert report.original.nll == pytest.approx(whole.original.nll, rel=1e-3)


# --- refused

REFUSED = {
    "rotate without a rotation": ("rotate", "llama", [], "rotation=none: with smoothing=none nothing changes"),
    "an unknown family": (
        "quantize",
        "gpt_neox",
        ["rotation=hadamard"],
        "rotation: jointq does not know which tensors of GPTNeoXForCausalLM (gpt_neox) read and write",
    ),
    "an unknown family to be smoothed": (
        "rotate",
        "gpt_neox",
        ["smoothing=smoothquant"],
        "jointq does not know which tensors",
    ),
    "R1 where norms follow the layers": (
        "quantize",
        "gemma3",
        ["rotation=hadamard"],
        "rotation.r1=true: Gemma3ForCausalLM cannot have it",
    ),
    "bits for a layer that is not there": (
        "quantize",
        "llama",
        ["rotation=hadamard", "activations=a4", "+activations.layer_bits.nonesuch=8"],
        "activations.layer_bits.nonesuch=8: must name one of the 21 linear layers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_one_line_before_any_computing(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, family, settings, said = REFUSED[case]
    place = prepare(tmp_path, family)
    rotation = [] if command == "quantize" else ["rotation=none"]
    assert place("run", *rotation, *settings, command=command) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert said in err
    assert set(place.artifacts()) <= {"verified"}
    assert not (place.out("run") / "checkpoint").exists()
