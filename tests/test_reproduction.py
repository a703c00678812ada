"""Whether two runs are the same run: what counts as a difference, which one is told, and how a run is asked for again.

The published run serves as evidence: what is compared here is what lies in tests/published.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import pytest
import torch

from jointq_cli.checkpoint import save_tensors
from jointq_cli.config import Recipe, concrete, keys
from jointq_cli.errors import Interrupted, JointqError
from jointq_cli.evidence import Evidence, codes_file, read_evidence
from jointq_cli.grid import QuantizedWeight
from jointq_cli.launch import Job
from jointq_cli.main import main
from jointq_cli.records import (
    ASKED,
    DIFFERENT,
    IDENTICAL,
    WITHIN_TOLERANCE,
    BlockRecord,
    Invariance,
    Reproduction,
    RotationRecord,
    Simulation,
)
from jointq_cli.replay import replay
from jointq_cli.report import encode, load_record
from jointq_cli.report.replayed import conclusion, render_lines, render_reproduction
from jointq_cli.reproduction import GIVEN, compare
from jointq_cli.reproduction.asked import DICTIONARIES, decides
from jointq_cli.reproduction.measured import ROUNDING
from jointq_cli.workspace import save_layer

ROOT = Path(__file__).parent.parent
PUBLISHED = Path(__file__).parent / "published" / "ci_smoke"
INVARIANCE = Invariance(merge=0.0, stored=0.0, rounding=0.0, dtype="float32", tokens=1)


@pytest.fixture(scope="module")
def run() -> Evidence:
    return read_evidence(PUBLISHED)


# --- what is a difference

Change = Callable[[Evidence], Evidence]


def with_setting(key: str, value: str) -> Change:
    return lambda run: replace(run, settings=run.settings | {key: value})


def with_hash(name: str) -> Change:
    return lambda run: with_manifest(run, hashes=run.manifest.hashes | {name: "0" * 64})


def with_file(name: str) -> Change:
    return lambda run: replace(run, files=run.files | {name: "0" * 64})


def with_manifest(run: Evidence, **changes: Any) -> Evidence:
    return replace(run, manifest=replace(run.manifest, **changes))


def with_report(run: Evidence, **changes: Any) -> Evidence:
    return replace(run, report=replace(run.report, **changes))


def with_layer(run: Evidence, index: int, **changes: Any) -> Evidence:
    layers = list(run.report.layers)
    layers[index] = replace(layers[index], **changes)
    return with_report(run, layers=layers)


def with_figures(run: Evidence, original: float = 1.0, quantized: float = 1.0, divergence: float = 1.0) -> Evidence:
    """Each times a factor."""
    report = run.report
    return with_report(
        run,
        original=replace(report.original, value=report.original.value * original),
        quantized=replace(report.quantized, value=report.quantized.value * quantized),
        comparison=replace(report.comparison, kl_divergence=report.comparison.kl_divergence * divergence),
    )


# One change for each step, in the order of the road.
CHANGES: dict[str, Change] = {
    "config": with_setting("quantizer.bits", "3"),
    "model": with_hash("model"),
    "calibration tokens": with_hash("calibration tokens"),
    "evaluation windows": with_hash("evaluation windows"),
    "codes": with_file(codes_file("model.layers.2.mlp.up_proj")),
    "layers": lambda run: with_layer(run, 20, output_error=0.5),
    "blocks": lambda run: with_report(run, blocks=[*run.report.blocks[:-1], BlockRecord(3, 0.5)]),
    "checkpoint": with_file("checkpoint/model-00003-of-00005.safetensors"),
    "audit": lambda run: with_report(run, audit=replace(run.report.audit, changed=["lm_head.weight"])),
    "reload check": lambda run: with_report(run, reload_check="differs by 0.1"),
    "simulation": lambda run: with_report(run, simulation=Simulation("A4", {"model.layers.0.mlp.up_proj": 0.9})),
    "likelihoods": lambda run: with_report(run, comparison=replace(run.report.comparison, top1_agreement=0.1)),
    "original perplexity": lambda run: with_figures(run, original=1.001),
    "quantised perplexity": lambda run: with_figures(run, quantized=1.001),
    "KL divergence": lambda run: with_figures(run, divergence=1.001),
}


def test_a_run_is_identical_to_itself(run: Evidence) -> None:
    found = compare(run, run)
    assert found.verdict == IDENTICAL
    assert found.first_difference is None
    assert found.surroundings == []


def test_every_step_is_reached_by_a_change_but_for_the_rotation(run: Evidence) -> None:
    assert [step.name for step in compare(run, run).steps if step.name != "rotation"] == list(CHANGES)


@pytest.mark.parametrize("name", CHANGES)
def test_one_change_is_one_difference_and_is_found_from_either_side(name: str, run: Evidence) -> None:
    changed = CHANGES[name](run)
    for found in (compare(run, changed), compare(changed, run)):
        assert found.verdict == DIFFERENT
        assert [step.name for step in found.steps if not step.same] == [name]


def test_the_first_of_all_differences_is_told(run: Evidence) -> None:
    changed = run
    for name in reversed(CHANGES):
        changed = CHANGES[name](changed)
        found = compare(run, changed)
        assert found.first_difference is not None
        assert found.first_difference.name == name


def test_layers_come_in_the_order_of_the_model_and_not_of_their_names(run: Evidence) -> None:
    changed = with_file(codes_file("model.layers.0.mlp.down_proj"))(run)
    changed = with_file(codes_file("model.layers.0.self_attn.v_proj"))(changed)
    [_, _, _, _, _, codes, *_] = compare(run, changed).steps
    assert codes.detail == "first in model.layers.0.self_attn.v_proj (block 0 of 4), and in 2 of 28 layers"


def test_codes_that_one_run_lacks_differ(run: Evidence) -> None:
    name = codes_file(run.report.layers[-1].name)
    lacking = replace(run, files={path: digest for path, digest in run.files.items() if path != name})
    first = compare(run, lacking).first_difference
    assert first is not None
    assert first.name == "codes"


def without(kind: str, run: Evidence) -> Evidence:
    return replace(run, files={name: digest for name, digest in run.files.items() if not name.startswith(kind)})


def test_what_has_no_hash_on_either_side_is_not_identical(run: Evidence) -> None:
    for kind, name, said in (
        ("codes/model.layers.2.mlp.up_proj", "codes", "(no hash)"),
        ("codes/", "codes", "(no hash)"),
        ("checkpoint/model-", "checkpoint", "no hash of any weights"),
    ):
        first = compare(without(kind, run), without(kind, run)).first_difference
        assert first is not None
        assert (first.name, said in first.detail) == (name, True)


def test_codes_that_no_report_names_are_compared_all_the_same(run: Evidence) -> None:
    silent = with_report(run, layers=[], blocks=[])
    first = compare(silent, CHANGES["codes"](silent)).first_difference
    assert first is not None
    assert first.detail == "first in model.layers.2.mlp.up_proj"
    nothing = without("codes/", silent)
    assert compare(nothing, nothing).verdict == DIFFERENT


def test_hashes_that_nothing_was_read_for_are_told_as_the_manifests(run: Evidence) -> None:
    told = {step.name: step.detail for step in compare(run, run).steps}
    assert told["codes"] == "28 layers (by the manifest; files not there)"
    assert told["checkpoint"] == "10 files (by the manifest; files not there)"


def test_the_last_digits_of_sums_are_no_difference_and_the_others_are(run: Evidence) -> None:
    layer = run.report.layers[3]
    for factor, same in ((1 + ROUNDING / 2, True), (1 - ROUNDING / 2, True), (1 + 2 * ROUNDING, False)):
        notes = layer.notes | {"min_condition": layer.notes["min_condition"] * factor}
        for changed in (
            with_layer(run, 3, weight_error=layer.weight_error * factor),
            with_layer(run, 3, notes=notes),
            with_figures(run, quantized=factor),
        ):
            assert (compare(run, changed).verdict == IDENTICAL) is same


def test_counts_and_words_have_no_last_digits(run: Evidence) -> None:
    assert compare(run, with_layer(run, 3, verdict="damped")).verdict == DIFFERENT
    notes = run.report.layers[3].notes
    assert compare(run, with_layer(run, 3, notes=notes | {"sweeps": notes["sweeps"] + 1})).verdict == DIFFERENT
    assert compare(run, with_layer(run, 3, notes=notes | {"other": None})).verdict == IDENTICAL


def test_time_and_memory_are_no_part_of_a_result(run: Evidence) -> None:
    slower = with_layer(run, 0, seconds=1000.0)
    slower = with_report(slower, stages=[], peak_memory=1, warnings=["slow"])
    assert compare(run, with_manifest(slower, created="yesterday", command=["jointq", "quantize"])).verdict == IDENTICAL


def test_what_a_run_is_called_and_where_it_lies_decides_nothing(run: Evidence) -> None:
    for key in ("name", "output_dir", "store", "runtime.device", "runtime.num_threads", "model.path", "model"):
        assert compare(run, with_setting(key, "other")(run)).verdict == IDENTICAL


def test_every_setting_of_the_maths_decides() -> None:
    groups = ("quantizer", "qep", "rotation", "smoothing", "activations", "layers")
    maths = [key for key in keys(Recipe) if key.split(".")[0] in groups]
    assert len(maths) > 50
    assert all(map(decides, maths))
    assert decides("runtime.dtype")
    assert decides("runtime.batch_tokens")


def test_a_setting_that_one_side_alone_knows_is_no_difference_where_nothing_else_is(run: Evidence) -> None:
    later = with_setting("quantizer.invented", "7")(run)
    for found, whose in ((compare(run, later), "the replay"), (compare(later, run), "the original")):
        assert found.verdict == IDENTICAL
        assert found.steps[0].detail == f"only {whose} has quantizer.invented=7"


def test_a_setting_that_one_side_alone_knows_is_under_suspicion_where_anything_else_differs(run: Evidence) -> None:
    later = elsewhere(with_setting("quantizer.invented", "7")(run))
    for name in list(CHANGES)[1:]:
        for found in (compare(run, CHANGES[name](later), 0.99), compare(CHANGES[name](later), run, 0.99)):
            assert found.verdict == DIFFERENT
            assert not found.steps[0].same
            assert found.steps[0].detail.startswith("not known to be the same: only the")


def test_an_entry_of_a_dictionary_is_no_setting_that_came_with_later_code(run: Evidence) -> None:
    (name,) = DICTIONARIES
    assert compare(run, with_setting(f"{name}.down_proj", "8")(run)).verdict == DIFFERENT
    assert compare(with_setting(f"{name}.down_proj", "8")(run), run).verdict == DIFFERENT


def test_every_dictionary_of_a_recipe_is_known() -> None:
    found = {
        f"{group}.{field.name}"
        for group in get_type_hints(Recipe)
        for choice in concrete(get_type_hints(Recipe)[group])
        for field in fields(choice)
        if get_origin(get_type_hints(choice)[field.name]) is dict
    }
    assert found == set(DICTIONARIES)


def test_only_what_does_not_decide_a_result_can_be_given_and_every_key_of_it_is_one() -> None:
    assert not any(map(decides, GIVEN))
    assert set(GIVEN) <= set(keys(Recipe))
    undecided = {key for key in keys(Recipe) if key.startswith("runtime.") and not decides(key)}
    assert undecided <= set(GIVEN)


def test_another_basis_is_told_with_how_far_it_is(run: Evidence, tmp_path: Path) -> None:
    runs = []
    for name, angle in (("ours", 0.0), ("theirs", 0.25)):
        (tmp_path / name / "rotation").mkdir(parents=True)
        save_tensors(tmp_path / name / "rotation/rotation.safetensors", {"r1": torch.eye(2) + angle})
        turned = with_report(run, rotation=RotationRecord("R1", "", [], 0.0, name, [], [], [], INVARIANCE, 0, 0))
        runs.append(replace(turned, directory=tmp_path / name))
    first = compare(*runs).first_difference
    assert first is not None
    assert (first.name, first.detail) == ("rotation", "sha256 ours → theirs; r1 by up to 2.5e-01")
    first = compare(run, runs[0]).first_difference
    assert first is not None
    assert (first.name, first.detail) == ("rotation", "sha256 not there → ours")


# --- how codes differ


def quantised(codes: list[list[int]], scale: list[float], zero_point: list[int]) -> QuantizedWeight:
    return QuantizedWeight(
        codes=torch.tensor(codes, dtype=torch.uint8),
        scale=torch.tensor(scale)[:, None],
        zero_point=torch.tensor(zero_point, dtype=torch.uint8)[:, None],
        permutation=None,
        bits=4,
        symmetric=False,
    )


def test_codes_are_counted_where_both_files_are_there(run: Evidence, tmp_path: Path) -> None:
    layer = run.report.layers[4].name
    ours = quantised([[1, 2, 3], [4, 5, 6]], [1.0, 2.0], [7, 7])
    theirs = quantised([[1, 0, 15], [4, 5, 6]], [1.0, 2.1], [7, 8])
    runs = []
    for name, weight in (("ours", ours), ("theirs", theirs)):
        (tmp_path / name / "codes").mkdir(parents=True)
        save_layer(tmp_path / name / codes_file(layer), weight)
        runs.append(replace(with_file(codes_file(layer))(run), directory=tmp_path / name))
    runs[1] = replace(runs[1], files=runs[1].files | {codes_file(layer): "1" * 64})
    first = compare(*runs).first_difference
    assert first is not None
    assert first.detail.endswith(": 2 of 6 codes, 1 of 2 scales by up to 5.00 %, 1 of 2 zero-points")
    (tmp_path / "ours" / codes_file(layer)).unlink()
    first = compare(*runs).first_difference
    assert first is not None
    assert first.detail.endswith(f"first in {layer} (block 0 of 4)")


# --- tolerance


@pytest.mark.parametrize("figure", ["original", "quantized", "divergence"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_each_figure_has_to_keep_to_the_tolerance(figure: str, sign: int, run: Evidence) -> None:
    rounded = elsewhere(CHANGES["codes"](run))
    for share, verdict in ((0.049, WITHIN_TOLERANCE), (0.051, DIFFERENT)):
        assert compare(run, with_figures(rounded, **{figure: 1 + sign * share}), 0.05).verdict == verdict
        assert compare(run, with_figures(rounded, **{figure: 1 + sign * share})).verdict == DIFFERENT


def test_no_tolerance_makes_another_question_the_same(run: Evidence) -> None:
    for step in compare(run, run).steps:
        if step.part == ASKED:
            assert compare(run, elsewhere(CHANGES[step.name](run)), 0.99).verdict == DIFFERENT
    assert compare(run, run, 0.0).verdict == IDENTICAL


CANNOT_ROUND_OTHERWISE: dict[str, dict[str, Any]] = {
    "nothing": {},
    "another commit": {"commit": "1" * 40},
    "another platform": {"platform": "Linux"},
    "more cores that were not used": {"cpu_count": 64},
    "a processor that is not told": {"cpu": None},
}
CAN_ROUND_OTHERWISE: dict[str, dict[str, Any]] = {
    "cpu": {"cpu": "Z80"},
    "gpu": {"gpu": "H100"},
    "device": {"device": "cuda:0"},
    "threads": {"threads": 3},
    "processes": {"processes": 2},
}


@pytest.mark.parametrize("case", CANNOT_ROUND_OTHERWISE)
def test_a_tolerance_does_not_excuse_what_no_hardware_or_library_explains(case: str, run: Evidence) -> None:
    other = with_manifest(CHANGES["codes"](run), **CANNOT_ROUND_OTHERWISE[case])
    found = compare(run, other, 0.05)
    assert (found.verdict, found.rounding) == (DIFFERENT, [])
    assert "is for other hardware or libraries, and none are recorded" in conclusion(found)[0]


@pytest.mark.parametrize("library", ["jointq", "python"])
def test_a_version_of_what_does_not_round_is_no_reason_for_a_tolerance(library: str, run: Evidence) -> None:
    other = with_manifest(CHANGES["codes"](run), versions=run.manifest.versions | {library: "9.9"})
    assert compare(run, other, 0.05).verdict == DIFFERENT


@pytest.mark.parametrize("name", [*CAN_ROUND_OTHERWISE, "torch"])
def test_a_tolerance_names_the_hardware_or_library_that_it_is_for(name: str, run: Evidence) -> None:
    changes = CAN_ROUND_OTHERWISE.get(name, {"versions": run.manifest.versions | {name: "9.9"}})
    found = compare(run, with_manifest(CHANGES["codes"](run), **changes), 0.05)
    assert found.verdict == WITHIN_TOLERANCE
    assert [told.split()[0] for told in found.rounding] == [name]
    assert conclusion(found)[-1].startswith(f"these differ: {name} ")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_is_no_number_is_within_no_tolerance(value: float, run: Evidence) -> None:
    broken = with_figures(run, divergence=value)
    for ours, theirs in ((run, broken), (broken, run), (broken, CHANGES["codes"](broken))):
        found = compare(ours, elsewhere(theirs), 0.99)
        assert found.verdict == DIFFERENT
        assert conclusion(found)[0] == "different: KL divergence is no number, which no tolerance admits"
    assert compare(broken, broken).verdict == IDENTICAL


# --- why


def elsewhere(run: Evidence) -> Evidence:
    versions = run.manifest.versions | {"torch": "9.9"}
    return with_manifest(run, versions=versions, threads=64, cpu="Z80", gpu="H100", commit="1" * 40)


def test_every_difference_of_the_surroundings_is_named(run: Evidence) -> None:
    told = compare(run, elsewhere(run)).surroundings
    assert [line.split()[0] for line in told] == ["torch", "commit", "gpu", "cpu", "threads"]
    assert told[0] == f"torch {run.manifest.versions['torch']} → 9.9"


def test_the_surroundings_are_the_probable_reason_of_other_bits_but_not_of_another_config(run: Evidence) -> None:
    assert conclusion(compare(run, elsewhere(run)))[-1].startswith("although these differ: torch")
    assert conclusion(compare(run, elsewhere(CHANGES["codes"](run))))[-1].startswith("probable reason: torch")
    assert conclusion(compare(run, elsewhere(CHANGES["config"](run))))[-1].startswith("these differ besides: torch")
    assert conclusion(compare(run, elsewhere(CHANGES["codes"](run)), 0.05))[-1].startswith("these differ: torch")
    assert "not deterministic" in conclusion(compare(run, CHANGES["codes"](run)))[-1]


def test_pydoc_of_another_python_is_named_as_such(run: Evidence) -> None:
    texts = run.manifest.texts | {"calibration": run.manifest.texts["calibration"] | {"revision": "python 3.12.1"}}
    other = with_manifest(with_hash("calibration tokens")(run), texts=texts)
    first = compare(run, other).first_difference
    assert first is not None
    revision = run.manifest.texts["calibration"]["revision"]
    assert f"revision {revision} → python 3.12.1; the text pydoc is the documentation of the Python" in first.detail


def test_lines_and_markdown_have_every_step_and_the_json_comes_back(run: Evidence, tmp_path: Path) -> None:
    found = compare(run, elsewhere(CHANGES["codes"](run)), 0.05)
    for text in (render_lines(found), render_reproduction(found)):
        assert all(step.name in text for step in found.steps)
        assert "first in model.layers.2.mlp.up_proj (block 2 of 4); everything before it is identical" in text
        assert all(line in text for line in found.surroundings)
    (tmp_path / "reproduction.json").write_text(encode(found), encoding="utf-8")
    assert load_record(Reproduction, tmp_path / "reproduction.json") == found


# --- what is left of a run


def copied(place: Path) -> Path:
    return Path(shutil.copytree(PUBLISHED, place / "run"))


def change_manifest(directory: Path, **changes: Any) -> None:
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8")) | changes
    present = {key: value for key, value in manifest.items() if value is not None}
    (directory / "manifest.json").write_text(json.dumps(present), encoding="utf-8")


def test_only_a_finished_run_of_quantize_is_evidence(tmp_path: Path) -> None:
    def refused(directory: Path, said: str) -> None:
        with pytest.raises(JointqError, match=said) as caught:
            read_evidence(directory)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "nowhere", "no such directory")
    refused(tmp_path, r"has no manifest\.json")
    run = copied(tmp_path)
    change_manifest(run, command=["jointq", "rotate"])
    refused(run, "is a run of jointq rotate; only one of jointq quantize")
    change_manifest(run, command=["jointq", "quantize"], threads="two")
    refused(run, "threads must be int")
    (run / "evaluation.json").touch()
    refused(run, "is a run of jointq evaluate")


def test_a_manifest_of_before_hashes_were_kept_needs_the_files(run: Evidence, tmp_path: Path) -> None:
    directory = copied(tmp_path)
    change_manifest(directory, files=None, cpu=None)

    def refused(said: str) -> None:
        with pytest.raises(JointqError, match=said):
            read_evidence(directory)

    refused(r"has no hashes of files, and checkpoint/config\.json is not there")
    for name in ["checkpoint/config.json", *(codes_file(layer.name) for layer in run.report.layers)]:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text('{"model_type": "llama"}')
    refused("has neither model.safetensors nor")
    save_tensors(directory / "checkpoint" / "model.safetensors", {"x": torch.ones(2)})
    found = read_evidence(directory)
    assert len(found.files) == 30
    assert compare(found, found).verdict == IDENTICAL


@pytest.mark.parametrize(
    "name", ["checkpoint/model-00001-of-00005.safetensors", codes_file("model.layers.0.mlp.up_proj")]
)
def test_a_file_that_was_changed_after_the_run_is_no_evidence(name: str, run: Evidence, tmp_path: Path) -> None:
    directory = copied(tmp_path)
    (directory / name).parent.mkdir()
    (directory / name).write_bytes(b"weights")
    change_manifest(directory, files=run.files | {name: hashlib.sha256(b"weights").hexdigest()})
    assert read_evidence(directory).files[name] != run.files[name]
    (directory / name).write_bytes(b"Weights")
    with pytest.raises(JointqError, match=f"{name}: was changed after the run; its sha256 is"):
        read_evidence(directory)


def test_the_published_run_tells_nothing_of_where_it_was_made() -> None:
    for file in PUBLISHED.iterdir():
        if file.suffix in (".json", ".yaml", ".csv"):
            text = file.read_text(encoding="utf-8").replace("override /", "override ")  # of a group, not of a path
            assert not re.search(r"""["' =]/\w""", text), file.name


# --- a replay


@pytest.fixture
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the published run's paths begin."""
    monkeypatch.chdir(ROOT)


def asked_again(run: Evidence, fresh: Path, *overrides: str) -> tuple[Recipe, Job]:
    jobs: list[tuple[Recipe, Job]] = []
    replay(run, fresh, list(overrides), lambda recipe, job: jobs.append((recipe, job)))
    [job] = jobs
    return job


@pytest.mark.parametrize("name", ["fresh", "a b", "it's, here", "x=1", "[a]{b}"])
def test_a_replay_asks_for_the_same_in_its_own_directory(
    name: str, run: Evidence, tmp_path: Path, at_the_root: None
) -> None:
    recipe, job = asked_again(run, tmp_path / name)
    assert job.directory == tmp_path / name
    assert Path(recipe.store) == tmp_path / name / "store"
    (tmp_path / "recipe.yaml").write_text(job.config, encoding="utf-8")
    for file in ("manifest.json", "report.json"):
        shutil.copyfile(PUBLISHED / file, tmp_path / file)
    change_manifest(tmp_path, commit="0" * 40)  # by whose code there may be further settings
    assert compare(run, read_evidence(tmp_path)).verdict == IDENTICAL


def test_a_replay_computes_where_the_run_did_unless_told_otherwise(
    run: Evidence, tmp_path: Path, at_the_root: None
) -> None:
    recipe, _ = asked_again(run, tmp_path / "a")
    assert (recipe.runtime.device, recipe.runtime.num_threads) == ("cpu", run.manifest.threads)
    assert recipe.runtime.num_threads == 2
    recipe, _ = asked_again(run, tmp_path / "b", "runtime.num_threads=1", "model.path=./tests")
    assert (recipe.runtime.device, recipe.runtime.num_threads, recipe.model.path) == ("cpu", 1, "./tests")


def test_an_interrupted_replay_does_not_promise_to_continue(run: Evidence, tmp_path: Path, at_the_root: None) -> None:
    def stopped(recipe: Recipe, job: Job) -> None:
        raise Interrupted("the same command continues here")

    with pytest.raises(Interrupted, match="starts anew") as caught:
        replay(run, tmp_path / "fresh", [], stopped)
    assert "continues" not in str(caught.value)


REFUSED = {
    "quantizer.bits=3": "quantizer.bits=3: a replay takes quantizer.bits from the run; it can be given runtime.device,",
    "runtime.dtype=float32": "runtime.dtype=float32: a replay takes runtime.dtype from the run",
    "store=x": "store=x: a replay takes store from the run",
    "model=smollm2_135m": "model=smollm2_135m: a replay takes model from the run",
    "runtime=default": "runtime=default: a replay takes runtime from the run",
    "runtime={dtype:float32}": "runtime={dtype:float32}: a replay takes runtime from the run",
    "+runtime.num_threads=1": "+runtime.num_threads=1: a replay takes",
    "+quantizer.bits=3": "+quantizer.bits=3: a replay takes",
    "quantizer": "quantizer: settings are written KEY=VALUE; a replay takes runtime.device,",
    "model.path=./nowhere": "model.path=./nowhere: the model of ",
    "--directory=full": "--directory=full: must be new or empty",
    "--directory=file": "--directory=file: must be new or empty",
    "--against=full": "full: has no manifest.json",
    "--against=full --directory=x": "--against compares two runs that are there; --directory and KEY=VALUE are for",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_replayed_is_one_line_and_writes_nothing(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").touch()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    assert main(["reproduce", str(PUBLISHED), *words.split()]) == 1
    told = capsys.readouterr()
    assert told.err.startswith(f"error: {REFUSED[words]}")
    assert told.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_two_runs_are_compared_without_running_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = copied(tmp_path)
    assert main(["reproduce", str(PUBLISHED), "--against", str(other)]) == 0
    assert "identical: the same bits were made" in capsys.readouterr().out
    files = read_evidence(PUBLISHED).files
    change_manifest(other, files={**files, codes_file("model.layers.1.mlp.up_proj"): "0"})
    assert main(["reproduce", str(PUBLISHED), "--against", str(other)]) == 1
    assert "it begins with: codes: first in model.layers.1.mlp.up_proj" in capsys.readouterr().out
    words = ["reproduce", str(PUBLISHED), "--against", str(other), "--tolerance", "0.01"]
    assert main(words) == 1
    assert "is for other hardware or libraries, and none are recorded" in capsys.readouterr().out
    change_manifest(other, threads=3)
    assert main(words) == 0
    assert "these differ: threads 2 → 3" in capsys.readouterr().out
    assert not (other / "reproduction.json").exists()


@pytest.mark.parametrize("share", ["2", "-0.1", "some", "nan"])
def test_a_tolerance_is_a_share(share: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["reproduce", str(PUBLISHED), f"--tolerance={share}"])
    assert "must be a share from 0 to 1" in capsys.readouterr().err
