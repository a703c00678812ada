"""Whether two runs are the same run: what counts as a difference, which one is named, and how a run is asked for again.

The published run serves as evidence: what is compared here is what lies in tests/published.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from jointq_cli.cli.commands.reproduce import fresh_beside
from jointq_cli.cli.compose import Job, launch
from jointq_cli.cli.main import main
from jointq_cli.cli.replay import replay
from jointq_cli.errors import Interrupted, JointqError, NumericsError, TextError, UntrustedResult
from jointq_cli.formats.layer_file import save_layer
from jointq_cli.formats.uniform import UniformWeight
from jointq_cli.recipe import Recipe, keys, setting_roles
from jointq_cli.records import (
    DIFFERENT,
    IDENTICAL,
    REQUESTED,
    WITHIN_TOLERANCE,
    BlockRecord,
    Invariance,
    Reproduction,
    RotationRecord,
    Simulation,
    TaskRecord,
    TaskScore,
)
from jointq_cli.report import Console, encode, load_record, reproduction
from jointq_cli.report.finished_run import FinishedRun, codes_file, read_finished_run
from jointq_cli.report.limits import Limits
from jointq_cli.report.pages.documents import document_markdown
from jointq_cli.report.reproduction import ROUNDING, reproduction_document
from jointq_cli.report.run_files import parse_settings
from jointq_cli.system.store import Store
from jointq_cli.system.tensor_files import save_tensors

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "tests" / "published" / "ci_smoke"
ROLES = setting_roles()
INVARIANCE = Invariance(merge=0.0, stored=0.0, rounding=0.0, dtype="float32", tokens=1)


def compare(original: FinishedRun, replay: FinishedRun, tolerance: float | None = None) -> Reproduction:
    return reproduction.compare(original, replay, ROLES, tolerance)


def conclusion(found: Reproduction) -> list[str]:
    """The verdict, problems of the replay, and the reasons."""
    document = reproduction_document(found)
    return [document.headline, *document.warnings, *document.notes]


def deciding_differences(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    return reproduction.deciding_differences(ours, theirs, ROLES)


@pytest.fixture(scope="module")
def run() -> FinishedRun:
    return read_finished_run(PUBLISHED)


# --- what is a difference

Change = Callable[[FinishedRun], FinishedRun]


def with_setting(key: str, value: str) -> Change:
    return lambda run: replace(run, settings=run.settings | {key: value})


def with_hash(name: str) -> Change:
    return lambda run: with_manifest(run, hashes=run.manifest.hashes | {name: "0" * 64})


def with_file(name: str) -> Change:
    return lambda run: replace(run, files=run.files | {name: "0" * 64})


def with_manifest(run: FinishedRun, **changes: Any) -> FinishedRun:
    return replace(run, manifest=replace(run.manifest, **changes))


def with_report(run: FinishedRun, **changes: Any) -> FinishedRun:
    return replace(run, report=replace(run.report, **changes))


def with_layer(run: FinishedRun, index: int, **changes: Any) -> FinishedRun:
    layers = list(run.report.layers)
    layers[index] = replace(layers[index], **changes)
    return with_report(run, layers=layers)


def with_figures(
    run: FinishedRun, original: float = 1.0, quantized: float = 1.0, divergence: float = 1.0
) -> FinishedRun:
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
    "exports": with_file("export/mlx/model.safetensors"),
    "audit": lambda run: with_report(run, audit=replace(run.report.audit, changed=["lm_head.weight"])),
    "reload check": lambda run: with_report(run, reload_check="differs by 0.1"),
    "simulation": lambda run: with_report(run, simulation=Simulation("A4", {"model.layers.0.mlp.up_proj": 0.9})),
    "likelihoods": lambda run: with_report(run, comparison=replace(run.report.comparison, top1_agreement=0.1)),
    "tasks": lambda run: with_report(
        run, tasks=[TaskRecord("arc_easy", "acc", 9, 0, "hash", "lm-eval", TaskScore(0.6, None), None, None)]
    ),
    "original perplexity": lambda run: with_figures(run, original=1.001),
    "quantised perplexity": lambda run: with_figures(run, quantized=1.001),
    "KL divergence": lambda run: with_figures(run, divergence=1.001),
}


def test_a_run_is_identical_to_itself(run: FinishedRun) -> None:
    found = compare(run, run)
    assert found.verdict == IDENTICAL
    assert found.first_difference is None
    assert found.surroundings == []


def test_every_step_is_reached_by_a_change_but_for_the_rotation(run: FinishedRun) -> None:
    assert [step.name for step in compare(run, run).steps if step.name != "rotation"] == list(CHANGES)


@pytest.mark.parametrize("name", CHANGES)
def test_one_change_is_one_difference_and_is_found_from_either_side(name: str, run: FinishedRun) -> None:
    changed = CHANGES[name](run)
    for found in (compare(run, changed), compare(changed, run)):
        assert found.verdict == DIFFERENT
        assert [step.name for step in found.steps if not step.same] == [name]


def test_the_first_of_all_differences_is_told(run: FinishedRun) -> None:
    changed = run
    for name in reversed(CHANGES):
        changed = CHANGES[name](changed)
        found = compare(run, changed)
        assert found.first_difference is not None
        assert found.first_difference.name == name


def test_layers_come_in_the_order_of_the_model_and_not_of_their_names(run: FinishedRun) -> None:
    changed = with_file(codes_file("model.layers.0.mlp.down_proj"))(run)
    changed = with_file(codes_file("model.layers.0.self_attn.v_proj"))(changed)
    [_, _, _, _, _, codes, *_] = compare(run, changed).steps
    assert codes.detail.startswith("2 of 28, first model.layers.0.self_attn.v_proj ")


def test_codes_that_one_run_lacks_differ(run: FinishedRun) -> None:
    name = codes_file(run.report.layers[-1].name)
    lacking = replace(run, files={path: digest for path, digest in run.files.items() if path != name})
    first = compare(run, lacking).first_difference
    assert first is not None
    assert first.name == "codes"


def test_hashes_that_nothing_was_read_for_are_told_as_the_manifests(run: FinishedRun) -> None:
    details = {step.name: step.detail for step in compare(run, run).steps}
    assert details["codes"] == "all 28 (by the manifest; files not there)"
    assert details["checkpoint"] == "all 10 (by the manifest; files not there)"


def test_the_last_digits_of_sums_are_no_difference_and_the_others_are(run: FinishedRun) -> None:
    layer = run.report.layers[3]
    for factor, same in ((1 + ROUNDING / 2, True), (1 - ROUNDING / 2, True), (1 + 2 * ROUNDING, False)):
        notes = layer.notes | {"min_condition": layer.notes["min_condition"] * factor}
        for changed in (
            with_layer(run, 3, weight_error=layer.weight_error * factor),
            with_layer(run, 3, notes=notes),
            with_figures(run, quantized=factor),
        ):
            assert (compare(run, changed).verdict == IDENTICAL) is same


def test_counts_and_words_have_no_last_digits(run: FinishedRun) -> None:
    assert compare(run, with_layer(run, 3, verdict="damped")).verdict == DIFFERENT
    notes = run.report.layers[3].notes
    assert compare(run, with_layer(run, 3, notes=notes | {"sweeps": notes["sweeps"] + 1})).verdict == DIFFERENT
    assert compare(run, with_layer(run, 3, notes=notes | {"other": None})).verdict == IDENTICAL


def test_time_and_memory_are_no_part_of_a_result(run: FinishedRun) -> None:
    slower = with_layer(run, 0, seconds=1000.0)
    slower = with_report(slower, stages=[], peak_memory=1, warnings=["slow"])
    assert compare(run, with_manifest(slower, created="yesterday", command=["jointq", "quantize"])).verdict == IDENTICAL


def test_what_a_run_is_called_and_where_it_lies_decides_nothing(run: FinishedRun) -> None:
    for key in ("name", "output_dir", "store", "runtime.device", "runtime.num_threads", "model.path", "model"):
        assert compare(run, with_setting(key, "other")(run)).verdict == IDENTICAL


def test_every_setting_of_the_maths_decides() -> None:
    groups = ("quantizer", "qep", "rotation", "smoothing", "activations", "layers")
    maths = [key for key in keys(Recipe) if key.split(".")[0] in groups]
    assert len(maths) > 50
    assert all(map(ROLES.decides, maths))
    assert ROLES.decides("runtime.dtype")
    assert ROLES.decides("runtime.batch_tokens")


def test_settings_of_other_versions_decide_unless_they_are_the_machines() -> None:
    assert ROLES.decides("quantizer.invented")
    assert not ROLES.decides("runtime.invented")


def test_a_setting_that_one_side_alone_knows_is_no_difference_where_nothing_else_is(run: FinishedRun) -> None:
    later = with_setting("quantizer.invented", "7")(run)
    assert compare(run, later).verdict == compare(later, run).verdict == IDENTICAL


def test_a_setting_that_one_side_alone_knows_is_under_suspicion_where_anything_else_differs(run: FinishedRun) -> None:
    later = elsewhere(with_setting("quantizer.invented", "7")(run))
    for name in list(CHANGES)[1:]:
        for found in (compare(run, CHANGES[name](later), 0.99), compare(CHANGES[name](later), run, 0.99)):
            assert found.verdict == DIFFERENT
            assert not found.steps[0].same
            assert "first quantizer.invented not there → 7" in found.steps[0].detail.replace(
                "7 → not there", "not there → 7"
            )


def test_a_setting_that_asks_for_nothing_is_none_that_older_runs_lack(run: FinishedRun) -> None:
    later = elsewhere(with_setting("quantizer.invented", "null")(run))
    assert compare(run, CHANGES["codes"](later), 0.99).verdict == WITHIN_TOLERANCE


def test_an_entry_of_a_dictionary_is_no_setting_that_came_with_later_code(run: FinishedRun) -> None:
    for name in ROLES.dictionaries:
        assert compare(run, with_setting(f"{name}.down_proj", "8")(run)).verdict == DIFFERENT
        assert compare(with_setting(f"{name}.down_proj", "8")(run), run).verdict == DIFFERENT


def test_an_empty_dictionary_is_one_that_older_runs_lack(run: FinishedRun) -> None:
    older = replace(run, settings={key: value for key, value in run.settings.items() if "layers.overrides" not in key})
    later = with_setting("layers.overrides", "{}")(older)
    assert deciding_differences(older.settings, later.settings) == []
    assert compare(older, later).verdict == compare(later, older).verdict == IDENTICAL


def test_settings_of_experts_are_not_missed_in_an_older_run_of_a_model_without_any(run: FinishedRun) -> None:
    def lacks(name: str, one: FinishedRun) -> FinishedRun:
        return replace(one, settings={key: value for key, value in one.settings.items() if key.split(".")[0] != name})

    chosen = with_setting("experts", "default")(with_setting("experts.calibration", "blend")(run))
    later = elsewhere(CHANGES["codes"](chosen))
    older = lacks("experts", run)
    assert compare(older, later).steps[0].same
    mixture = with_report(later, layers=[replace(layer, tokens=10) for layer in run.report.layers])
    assert not compare(older, mixture).steps[0].same


def test_the_order_of_overrides_counts() -> None:
    first, second = (
        parse_settings(yaml.safe_dump({"layers": {"overrides": dict(pairs)}}, sort_keys=False), Path("recipe.yaml"))
        for pairs in ([("a.*", {"bits": 8}), ("b", "keep")], [("b", "keep"), ("a.*", {"bits": 8})])
    )
    assert deciding_differences(first, first) == []
    assert deciding_differences(first, second) == [
        "layers.overrides {a.*: {bits: 8}, b: keep} → {b: keep, a.*: {bits: 8}}"
    ]
    assert deciding_differences({}, second) == ["layers.overrides not there → {b: keep, a.*: {bits: 8}}"]


def test_a_replay_may_change_the_machine_and_the_places_of_what_is_hashed_and_no_more() -> None:
    assert ROLES.dictionaries == {"activations.layer_bits", "layers.overrides"}
    assert ROLES.replayable == [
        "calibration.path",
        "calibration.revision",
        "calibration.tokens",
        "evaluation.path",
        "evaluation.revision",
        "evaluation.tasks_dir",
        "experts.memory_gb",
        "experts.warn_below",
        *(f"limits.{field.name}" for field in sorted(dataclasses.fields(Limits), key=lambda field: field.name)),
        "model.path",
        "model.revision",
        "runtime.device",
        "runtime.hessians_gb",
        "runtime.num_threads",
        "runtime.suspended_activations_gb",
    ]
    others = ROLES.undeciding - set(ROLES.replayable)
    assert {key for key in others if not key.startswith("tracking.")} == {
        "name",
        "check_exports",
        "description",
        "generate_tokens",
        "limits",
        "model",
        "output_dir",
        "store",
        "tracking",
    }


def test_the_page_on_reproducing_names_all_that_a_replay_may_change() -> None:
    words = set(re.findall("`([^`\n]+)`", (ROOT / "docs/reproduce.md").read_text(encoding="utf-8")))
    assert [key for key in ROLES.replayable if not {key, key.removeprefix("runtime.")} & words] == []


def test_another_basis_is_told_with_how_far_it_is(run: FinishedRun, tmp_path: Path) -> None:
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


def test_a_difference_begins_where_it_is_first_in_the_model_be_it_measured_or_made(run: FinishedRun) -> None:
    late = with_file(codes_file("model.layers.3.mlp.down_proj"))(run)
    names = [layer.name for layer in run.report.layers]
    for changed, said in (
        (with_layer(late, 0, output_error=0.5), f"layers: 1 of 624, first {names[0]}.output_error "),
        (
            with_report(late, blocks=[BlockRecord(0, 0.5), *run.report.blocks[1:]]),
            "blocks: 1 of 8, first block 0.output_error ",
        ),
        (
            with_layer(late, names.index("model.layers.3.mlp.down_proj"), output_error=0.5),
            "codes: 1 of 28, first model.layers.3.mlp.down_proj",
        ),
        (with_file("checkpoint/config.json")(late), "codes: 1 of 28"),
    ):
        [line] = [line for line in conclusion(compare(run, changed)) if line.startswith("it begins with: ")]
        assert line.startswith(f"it begins with: {said}")


# --- how codes differ


def quantised(codes: list[list[int]], scale: list[float], zero_point: list[int]) -> UniformWeight:
    return UniformWeight(
        codes=torch.tensor(codes, dtype=torch.uint8),
        scale=torch.tensor(scale)[:, None],
        zero_point=torch.tensor(zero_point, dtype=torch.uint8)[:, None],
        permutation=None,
        bits=4,
        symmetric=False,
    )


def test_codes_are_counted_where_both_files_are_there(run: FinishedRun, tmp_path: Path) -> None:
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
    assert first.detail.endswith("; 2 of 6 codes, 1 of 2 scales by up to 5.00 %, 1 of 2 zero-points")
    (tmp_path / "ours" / codes_file(layer)).unlink()
    first = compare(*runs).first_difference
    assert first is not None
    assert first.detail.endswith(f"first {layer} 0000000000000000 → 1111111111111111")


@pytest.mark.parametrize("content", [b"", b"cut", b"\xff" * 500])
def test_a_file_that_cannot_be_read_costs_its_own_detail_alone(
    content: bytes, run: FinishedRun, tmp_path: Path
) -> None:
    turned = RotationRecord("R1", "", [], 0.0, "ours", [], [], [], INVARIANCE, 0, 0)
    for path in (codes_file(run.report.layers[0].name), "rotation/rotation.safetensors"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_bytes(content)
    ours = replace(with_report(run, rotation=turned), directory=tmp_path)
    theirs = with_file(codes_file(run.report.layers[0].name))(ours)
    theirs = with_report(theirs, rotation=replace(turned, hash="theirs"))
    details = {step.name: step.detail for step in compare(ours, theirs).steps}
    assert details["rotation"] == "sha256 ours → theirs; (file cannot be read)"
    assert details["codes"].endswith("; (file cannot be read)")


# --- tolerance


@pytest.mark.parametrize("figure", ["original", "quantized", "divergence"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_each_figure_has_to_keep_to_the_tolerance(figure: str, sign: int, run: FinishedRun) -> None:
    rounded = elsewhere(CHANGES["codes"](run))
    for share, verdict in ((0.049, WITHIN_TOLERANCE), (0.051, DIFFERENT)):
        assert compare(run, with_figures(rounded, **{figure: 1 + sign * share}), 0.05).verdict == verdict
        assert compare(run, with_figures(rounded, **{figure: 1 + sign * share})).verdict == DIFFERENT


def test_no_tolerance_makes_another_question_the_same(run: FinishedRun) -> None:
    for step in compare(run, run).steps:
        if step.part == REQUESTED:
            assert compare(run, elsewhere(CHANGES[step.name](run)), 0.99).verdict == DIFFERENT
    assert compare(run, run, 0.0).verdict == IDENTICAL


CANNOT_ROUND_OTHERWISE: dict[str, dict[str, Any]] = {
    "nothing": {},
    "another commit": {"commit": "1" * 40},
    "another platform": {"platform": "Linux"},
    "more cores that were not used": {"cpu_count": 64},
    "a processor that is not recorded": {"cpu": None},
}
CAN_ROUND_OTHERWISE: dict[str, dict[str, Any]] = {
    "cpu": {"cpu": "Z80"},
    "gpu": {"gpu": "H100"},
    "device": {"device": "cuda:0"},
    "threads": {"threads": 3},
    "processes": {"processes": 2},
}


@pytest.mark.parametrize("case", CANNOT_ROUND_OTHERWISE)
def test_a_tolerance_does_not_excuse_what_no_hardware_or_library_explains(case: str, run: FinishedRun) -> None:
    other = with_manifest(CHANGES["codes"](run), **CANNOT_ROUND_OTHERWISE[case])
    found = compare(run, other, 0.05)
    assert (found.verdict, found.rounding) == (DIFFERENT, [])
    assert "is for other hardware or libraries, and none are recorded" in conclusion(found)[0]


@pytest.mark.parametrize("library", ["jointq", "python"])
def test_a_version_of_what_does_not_round_is_no_reason_for_a_tolerance(library: str, run: FinishedRun) -> None:
    other = with_manifest(CHANGES["codes"](run), versions=run.manifest.versions | {library: "9.9"})
    assert compare(run, other, 0.05).verdict == DIFFERENT


@pytest.mark.parametrize("name", [*CAN_ROUND_OTHERWISE, "torch"])
def test_a_tolerance_names_the_hardware_or_library_that_it_is_for(name: str, run: FinishedRun) -> None:
    changes = CAN_ROUND_OTHERWISE.get(name, {"versions": run.manifest.versions | {name: "9.9"}})
    found = compare(run, with_manifest(CHANGES["codes"](run), **changes), 0.05)
    assert found.verdict == WITHIN_TOLERANCE
    assert [text.split()[0] for text in found.rounding] == [name]
    assert conclusion(found)[-1].startswith(f"machine, libraries or code differ: {name} ")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_is_no_number_is_within_no_tolerance(value: float, run: FinishedRun) -> None:
    broken = with_figures(run, divergence=value)
    for ours, theirs in ((run, broken), (broken, run), (broken, CHANGES["codes"](broken))):
        found = compare(ours, elsewhere(theirs), 0.99)
        assert found.verdict == DIFFERENT
        assert conclusion(found)[0] == "different by more than 99.00 %: KL divergence moved most, by inf"
    assert compare(broken, broken).verdict == IDENTICAL


# --- why


def elsewhere(run: FinishedRun) -> FinishedRun:
    versions = run.manifest.versions | {"torch": "9.9"}
    return with_manifest(run, versions=versions, threads=64, cpu="Z80", gpu="H100", commit="1" * 40)


def test_every_difference_of_the_surroundings_is_named(run: FinishedRun) -> None:
    changes = compare(run, elsewhere(run)).surroundings
    assert [line.split()[0] for line in changes] == ["torch", "commit", "gpu", "cpu", "threads"]
    assert changes[0] == f"torch {run.manifest.versions['torch']} → 9.9"


def test_other_surroundings_are_told_whatever_differs_and_without_any_something_is_not_deterministic(
    run: FinishedRun,
) -> None:
    for changed in (run, CHANGES["codes"](run), CHANGES["config"](run)):
        assert conclusion(compare(run, elsewhere(changed)))[-1].startswith("machine, libraries or code differ: torch")
    assert "not deterministic" in conclusion(compare(run, CHANGES["codes"](run)))[-1]
    assert "deterministic" not in " ".join(conclusion(compare(run, CHANGES["config"](run))))


@pytest.mark.parametrize("commit", ["1" * 40 + "-dirty", None])
def test_code_that_no_commit_tells_is_not_known_to_be_the_same(commit: str | None, run: FinishedRun) -> None:
    ours = with_manifest(run, commit=commit)
    theirs = CHANGES["codes"](ours)
    assert len(conclusion(compare(ours, ours))) == 1
    assert conclusion(compare(ours, theirs))[-1].startswith("not known to be the same: the code (")
    assert not any("not deterministic" in line for line in conclusion(compare(ours, theirs)))
    other = with_manifest(theirs, threads=3)
    assert [line.split(":")[0] for line in conclusion(compare(ours, other))[-2:]] == [
        "machine, libraries or code differ",
        "not known to be the same",
    ]


def test_what_is_wrong_with_the_replay_is_told_beside_the_verdict(run: FinishedRun) -> None:
    broken = CHANGES["reload check"](run)
    found = compare(broken, broken)
    assert found.verdict == IDENTICAL
    assert conclusion(found)[1].startswith("the replay itself: the checkpoint reloaded from disk differs")


def test_pydoc_of_another_python_is_named_as_such(run: FinishedRun) -> None:
    texts = run.manifest.texts | {"calibration": run.manifest.texts["calibration"] | {"revision": "python 3.12.1"}}
    other = with_manifest(with_hash("calibration tokens")(run), texts=texts)
    first = compare(run, other).first_difference
    assert first is not None
    revision = run.manifest.texts["calibration"]["revision"]
    assert first.detail.endswith(f"; revision {revision} → python 3.12.1")


def test_lines_and_markdown_have_every_step_and_the_json_comes_back(run: FinishedRun, tmp_path: Path) -> None:
    found = compare(run, elsewhere(CHANGES["codes"](run)), 0.05)
    document = reproduction_document(found)
    with Console(stream=(stream := io.StringIO())) as console:
        console.show(document)
    for text in (stream.getvalue(), document_markdown(document)):
        assert all(step.name in text for step in found.steps)
        assert "it begins with: codes: 1 of 28, first model.layers.2.mlp.up_proj " in text
        assert "; everything before it is identical" in text
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
            read_finished_run(directory)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "nowhere", "no such directory")
    refused(tmp_path, r"has no manifest\.json")
    run = copied(tmp_path)
    change_manifest(run, command=["jointq", "rotate"])
    refused(run, "is a run of jointq rotate; only one of jointq quantize")
    change_manifest(run, command=["jointq", "quantize"], threads="two")
    refused(run, r"Expected `int`, got `str` - at `\$.threads`")


def test_a_manifest_of_before_hashes_were_kept_needs_the_files(run: FinishedRun, tmp_path: Path) -> None:
    directory = copied(tmp_path)
    change_manifest(directory, files=None, cpu=None)

    def refused(said: str) -> None:
        with pytest.raises(JointqError, match=said):
            read_finished_run(directory)

    refused(r"has no hash of codes/model\.layers\.0\.self_attn\.q_proj\.safetensors, and the file is not there")
    for name in ["checkpoint/config.json", *(codes_file(layer.name) for layer in run.report.layers)]:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text('{"model_type": "llama"}')
    refused(r"has no hash of checkpoint/\*\.safetensors")
    save_tensors(directory / "checkpoint" / "model.safetensors", {"x": torch.ones(2)})
    found = read_finished_run(directory)
    assert len(found.files) == 30
    assert compare(found, found).verdict == IDENTICAL


@pytest.mark.parametrize(
    "name", ["checkpoint/model-00001-of-00005.safetensors", codes_file("model.layers.0.mlp.up_proj")]
)
def test_a_file_that_was_changed_after_the_run_is_no_evidence(name: str, run: FinishedRun, tmp_path: Path) -> None:
    directory = copied(tmp_path)
    (directory / name).parent.mkdir()
    (directory / name).write_bytes(b"weights")
    change_manifest(directory, files=run.files | {name: hashlib.sha256(b"weights").hexdigest()})
    assert read_finished_run(directory).files[name] != run.files[name]
    (directory / name).write_bytes(b"Weights")
    with pytest.raises(JointqError, match=f"{name}: was changed after the run; its sha256 is"):
        read_finished_run(directory)


def test_a_recipe_that_is_not_the_manifests_is_no_evidence(tmp_path: Path) -> None:
    directory = copied(tmp_path)
    change_manifest(directory, recipe_sha256=hashlib.sha256((directory / "recipe.yaml").read_bytes()).hexdigest())
    read_finished_run(directory)
    with (directory / "recipe.yaml").open("a") as recipe:
        recipe.write("# another run has begun here\n")
    with pytest.raises(JointqError, match=r"recipe\.yaml: is not the recipe of manifest\.json"):
        read_finished_run(directory)


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


def asked_again(run: FinishedRun, fresh: Path, *overrides: str) -> tuple[Recipe, Job]:
    jobs: list[tuple[Recipe, Job]] = []
    replay(run, fresh, list(overrides), ["reproduce"], lambda recipe, job: jobs.append((recipe, job)))
    [job] = jobs
    return job


@pytest.mark.parametrize("name", ["fresh", "a b", "it's, here", "x=1", "[a]{b}"])
def test_a_replay_asks_for_the_same_in_its_own_directory(
    name: str, run: FinishedRun, tmp_path: Path, at_the_root: None
) -> None:
    recipe, job = asked_again(run, tmp_path / name)
    assert job.directory == tmp_path / name
    assert Path(recipe.store) == tmp_path / name / "store"
    (tmp_path / "recipe.yaml").write_text(job.config, encoding="utf-8")
    for file in ("manifest.json", "report.json"):
        shutil.copyfile(PUBLISHED / file, tmp_path / file)
    change_manifest(tmp_path, commit="0" * 40)  # by whose code there may be further settings
    assert compare(run, read_finished_run(tmp_path)).verdict == IDENTICAL


def test_a_replay_computes_where_the_run_did_unless_told_otherwise(
    run: FinishedRun, tmp_path: Path, at_the_root: None
) -> None:
    recipe, _ = asked_again(run, tmp_path / "a")
    assert (recipe.runtime.device, recipe.runtime.num_threads) == ("cpu", run.manifest.threads)
    assert recipe.runtime.num_threads == 2
    recipe, _ = asked_again(run, tmp_path / "b", "runtime.num_threads=1", "model.path=./tests")
    assert (recipe.runtime.device, recipe.runtime.num_threads, recipe.model.path) == ("cpu", 1, "./tests")


def test_a_replay_reads_old_keys_silently_and_takes_them_as_overrides(
    run: FinishedRun, tmp_path: Path, at_the_root: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "  waiting_gb: 4.0" in (PUBLISHED / "recipe.yaml").read_text(encoding="utf-8")
    assert run.settings["runtime.suspended_activations_gb"] == "4.0"
    recipe, _ = asked_again(run, tmp_path / "a")
    assert capsys.readouterr().err == ""
    assert recipe.runtime.suspended_activations_gb == 4
    recipe, _ = asked_again(run, tmp_path / "b", "runtime.waiting_gb=1")
    assert capsys.readouterr().err.startswith("runtime.waiting_gb is now ")
    assert recipe.runtime.suspended_activations_gb == 1


def test_an_interrupted_replay_does_not_promise_to_continue(
    run: FinishedRun, tmp_path: Path, at_the_root: None
) -> None:
    def stopped(recipe: Recipe, job: Job) -> None:
        raise Interrupted("the same command continues here")

    with pytest.raises(Interrupted, match="starts from the beginning") as caught:
        replay(run, tmp_path / "fresh", [], ["reproduce"], stopped)
    assert "continues" not in str(caught.value)


def recorded(place: Path, *words: str) -> FinishedRun:
    """A run with this config, everything else being the published one's."""
    jobs: list[Job] = []
    made = ["recipe=ci_smoke", *words, f"output_dir={place}", f"hydra.run.dir={place}/made"]
    launch("quantize", made, lambda recipe, job: jobs.append(job))
    directory = copied(place)
    (directory / "recipe.yaml").write_text(jobs[0].config, encoding="utf-8")
    return read_finished_run(directory)


def own_activations(place: Path, layer_bits: str) -> list[str]:
    (place / "mine" / "activations").mkdir(parents=True)
    text = (ROOT / "configs/activations/none.yaml").read_text(encoding="utf-8").replace("{}", layer_bits)
    (place / "mine" / "activations" / "own.yaml").write_text(text, encoding="utf-8")
    return ["activations=own", "--config-dir", str(place / "mine")]


@pytest.mark.parametrize("layer_bits", ["{}", "{o_proj: 6}", "{down_proj: 6, o_proj: 6}"])
def test_an_option_of_ones_own_replays_as_what_it_was(layer_bits: str, tmp_path: Path) -> None:
    run = recorded(tmp_path, *own_activations(tmp_path, layer_bits))
    recipe, job = asked_again(run, tmp_path / "fresh")
    assert recipe.activations.layer_bits == yaml.safe_load(layer_bits)
    assert deciding_differences(run.settings, parse_settings(job.config, tmp_path)) == []


def test_an_option_that_lost_an_entry_replays_without_it(tmp_path: Path) -> None:
    run = recorded(tmp_path, "activations=a4", "~activations.layer_bits.down_proj")
    recipe, _ = asked_again(run, tmp_path / "fresh")
    assert recipe.activations.layer_bits == {}
    assert recipe.activations.bits == 4


def test_an_option_that_is_bundled_stays_the_one_that_is_named(tmp_path: Path) -> None:
    assert recorded(tmp_path, "activations=a4").settings["activations"] == "a4"


def test_a_recipe_that_does_not_give_its_config_again_is_refused_before_anything_is_computed(
    run: FinishedRun, tmp_path: Path, at_the_root: None
) -> None:
    directory = copied(tmp_path)
    text = (directory / "recipe.yaml").read_text(encoding="utf-8")
    older = text.replace("override /activations: none", "override /activations: a4")  # whose entries are added
    (directory / "recipe.yaml").write_text(older, encoding="utf-8")
    with pytest.raises(JointqError, match=r"again: .*activations\.layer_bits\.down_proj not there → 8") as caught:
        asked_again(read_finished_run(directory), tmp_path / "fresh")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "fresh").exists()


@pytest.mark.parametrize("error", [None, UntrustedResult("NaN"), NumericsError("layer x"), KeyError("a bug")])
def test_the_store_of_a_replay_is_gone_however_it_ends(
    error: Exception | None, run: FinishedRun, tmp_path: Path, at_the_root: None
) -> None:
    def task(recipe: Recipe, job: Job) -> None:
        Store(Path(recipe.store)).reuse("stage", "0" * 64, lambda scratch: None)
        (job.directory / "log.txt").touch()
        if error is not None:
            raise error

    trusted = error is None or isinstance(error, UntrustedResult)
    with contextlib.nullcontext() if trusted else pytest.raises(type(error)):  # type: ignore[arg-type]
        replay(run, tmp_path / "fresh", [], ["reproduce"], task)
    assert [path.name for path in (tmp_path / "fresh").iterdir()] == ["log.txt"]


@pytest.mark.parametrize("existed", [True, False])
def test_a_replay_that_fails_before_its_first_stage_leaves_nothing(
    existed: bool, run: FinishedRun, tmp_path: Path, at_the_root: None
) -> None:
    def task(recipe: Recipe, job: Job) -> None:
        Store(Path(recipe.store))
        (job.directory / "log.txt").touch()
        raise TextError("calibration.path: is empty")

    fresh = tmp_path / "fresh"
    if existed:
        fresh.mkdir()
    with pytest.raises(TextError, match="is empty"):
        replay(run, fresh, [], ["reproduce"], task)
    assert list(tmp_path.rglob("*")) == [fresh] * existed


def test_a_replay_is_recorded_as_it_was_typed(run: FinishedRun, tmp_path: Path, at_the_root: None) -> None:
    seen: list[list[str]] = []
    typed = ["reproduce", "run", "--tolerance", "0.05"]
    replay(run, tmp_path / "fresh", [], typed, lambda recipe, job: seen.append(sys.argv))
    assert seen == [["jointq", *typed]]


def test_what_the_recipe_left_to_the_hub_is_replayed_at_the_commits_that_were_read(
    run: FinishedRun, tmp_path: Path, at_the_root: None
) -> None:
    commits = [digit * 40 for digit in "123"]  # which would be numbers
    texts = {
        section: run.manifest.texts[section] | {"repository": "a/b", "revision": commit}
        for section, commit in (("calibration", commits[1]), ("evaluation", commits[2]))
    }
    known = with_manifest(run, texts=texts, model={"from": "hub", "revision": commits[0]})
    recipe, job = asked_again(known, tmp_path / "a")
    assert [part.revision for part in (recipe.model, recipe.calibration, recipe.evaluation)] == commits
    assert deciding_differences(run.settings, parse_settings(job.config, tmp_path)) == []
    recipe, _ = asked_again(known, tmp_path / "b", "model.revision=main", "calibration.revision=v1")
    assert (recipe.model.revision, recipe.calibration.revision) == ("main", "v1")
    asked = replace(known, settings=known.settings | {"model.revision": "main"})
    recipe, _ = asked_again(asked, tmp_path / "c")
    assert recipe.model.revision is None  # as the recipe has it: here none, since only the settings were changed
    recipe, _ = asked_again(run, tmp_path / "d")
    assert recipe.calibration.revision is None  # "python 3.11.7" is no revision


def test_a_commit_that_was_read_is_not_looked_for_in_another_place(
    run: FinishedRun, tmp_path: Path, at_the_root: None
) -> None:
    known = with_manifest(run, model={"from": "hub", "revision": "1" * 40})
    recipe, _ = asked_again(known, tmp_path / "a", "model.path=org/copy")
    assert recipe.model.revision is None


@pytest.mark.parametrize("pattern", ["nowhere.txt", "nowhere/*.txt"])
def test_a_text_that_is_not_there_is_told_before_anything_is_computed(
    pattern: str, run: FinishedRun, tmp_path: Path, at_the_root: None
) -> None:
    with pytest.raises(TextError, match=f"evaluation.path={re.escape(pattern)}: not there, seen from"):
        asked_again(run, tmp_path / "fresh", f"evaluation.path={pattern}")
    assert not (tmp_path / "fresh").exists()


def test_a_model_that_lay_on_the_disk_is_not_looked_for_on_the_hub(
    run: FinishedRun, tmp_path: Path, at_the_root: None
) -> None:
    directory = copied(tmp_path)
    text = (directory / "recipe.yaml").read_text(encoding="utf-8")
    (directory / "recipe.yaml").write_text(text.replace("path: pocket", "path: models/mine"), encoding="utf-8")
    assert asked_again(read_finished_run(directory), tmp_path / "a")  # of before that was recorded: perhaps the hub's
    change_manifest(directory, model={"from": "disk"})
    with pytest.raises(JointqError, match=r"model\.path=models/mine: the model of .* is not there, seen from"):
        asked_again(read_finished_run(directory), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_replay_lies_beside_its_run_wherever_it_is_named_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copied(tmp_path)
    (directory / "checkpoint").mkdir()
    monkeypatch.chdir(directory / "checkpoint")
    assert fresh_beside(Path("..")).parent == tmp_path


def test_two_replays_of_one_second_lie_in_two_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Noon(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Noon":
            return cls(2026, 1, 1, 12)

    monkeypatch.setattr("jointq_cli.cli.commands.reproduce.datetime", Noon)
    assert fresh_beside(tmp_path / "run") != fresh_beside(tmp_path / "run")


def test_a_replay_leaves_alone_what_another_is_writing(
    run: FinishedRun, tmp_path: Path, at_the_root: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store").mkdir()  # the other one has begun after this one found the directory empty
    monkeypatch.setattr("jointq_cli.cli.replay._check_fresh", lambda directory, run: None)
    with pytest.raises(JointqError, match=r"--directory=.*: another replay is writing there"):
        asked_again(run, tmp_path)
    assert (tmp_path / "store").is_dir()


@pytest.mark.parametrize("place", [".", "codes/again", "../run/x"])
def test_a_replay_does_not_go_into_the_run_that_it_checks(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copied(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JointqError, match=r"--directory=.*: lies in the run that it would be compared with"):
        asked_again(read_finished_run(directory), Path("run") / place)
    assert {path.name for path in directory.iterdir()} == {path.name for path in PUBLISHED.iterdir()}


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_several_processes_are_refused_once(
    rank: str, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    assert main(["reproduce", str(PUBLISHED)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == lines
    assert error.startswith("error: WORLD_SIZE=2: a replay is run by one process" * lines)


def test_the_script_refuses_a_directory_that_has_been_used(tmp_path: Path) -> None:
    (tmp_path / "one_thread").mkdir()
    done = subprocess.run([ROOT / "scripts/reproduce_ci_smoke", tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path}: must be new or empty, since nothing may be reused\n"


REFUSED = {
    "quantizer.bits=3": "quantizer.bits=3: a replay takes quantizer.bits from the run; it can change runtime.device,",
    "runtime.dtype=float32": "runtime.dtype=float32: a replay takes runtime.dtype from the run",
    "store=x": "store=x: a replay takes store from the run",
    "model=smollm2_135m": "model=smollm2_135m: a replay takes model from the run",
    "runtime=default": "runtime=default: a replay takes runtime from the run",
    "runtime={dtype:float32}": "runtime={dtype:float32}: a replay takes runtime from the run",
    "+runtime.num_threads=1": "+runtime.num_threads=1: a replay takes",
    "+quantizer.bits=3": "+quantizer.bits=3: a replay takes",
    "quantizer": "quantizer: settings are written KEY=VALUE; a replay takes runtime.device,",
    "model.path=./nowhere": "model.path=./nowhere: the model of ",
    "model.path=mine/model.gguf": "model.path=mine/model.gguf: the model of ",
    "calibration.tokens=nowhere": "calibration.tokens=nowhere: not there, seen from ",
    "evaluation.path=nowhere.txt": "calibration.tokens=tests/published/ci_smoke/tokens.safetensors: not there",
    "--directory=full": "--directory=full: must be new or empty",
    "--directory=file": "--directory=file: must be new or empty",
    "--against=full": "full: has no manifest.json",
    "--against=full --directory=x": "--against compares two finished runs; --directory and KEY=VALUE are for",
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
    output = capsys.readouterr()
    assert output.err.startswith(f"error: {REFUSED[words]}")
    assert output.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_two_runs_are_compared_without_running_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = copied(tmp_path)
    assert main(["reproduce", str(PUBLISHED), "--against", str(other)]) == 0
    assert "identical: the same bits were computed" in capsys.readouterr().out
    files = read_finished_run(PUBLISHED).files
    change_manifest(other, files={**files, codes_file("model.layers.1.mlp.up_proj"): "0"})
    assert main(["reproduce", str(PUBLISHED), "--against", str(other)]) == 1
    assert "it begins with: codes: 1 of 28, first model.layers.1.mlp.up_proj" in capsys.readouterr().out
    words = ["reproduce", str(PUBLISHED), "--against", str(other), "--tolerance", "0.01"]
    assert main(words) == 1
    assert "is for other hardware or libraries, and none are recorded" in capsys.readouterr().out
    change_manifest(other, threads=3)
    assert main(words) == 0
    assert "machine, libraries or code differ: threads 2 → 3" in capsys.readouterr().out
    assert not (other / "reproduction.json").exists()


@pytest.mark.parametrize("share", ["2", "-0.1", "some", "nan"])
def test_a_tolerance_is_a_share(share: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["reproduce", str(PUBLISHED), f"--tolerance={share}"])
    assert "must be a share from 0 to 1" in capsys.readouterr().err
