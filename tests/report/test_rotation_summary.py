"""The report of a rotated model with simulated activations: it says what is stored, what is not, and what is wrong."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest

from jointq_cli.records import RotationRecord, RotationTraining, RunReport, Simulation
from jointq_cli.report import Console, encode, load_record, load_report, rotation_summary, summary, write_report
from jointq_cli.report.console.final_summary import quantize_summary, rotate_summary
from jointq_cli.report.pages.run import run_html, run_markdown
from jointq_cli.system.run_directory import RunDirectory

SIMULATED = "A4 asymmetric per token clip=searched down_proj=A8; not in the checkpoint"
ROTATED = (
    "SmoothQuant alpha=0.5 o_proj+down_proj + R1+R2 learned range2 lie from random_hadamard seed=0: "
    "SQNR of activations at 4 bits 15.0 → 19.0 dB, logits the same within 8.3e-07"
)


@pytest.fixture(scope="session")
def record(rotated: RunReport) -> RotationRecord:
    assert rotated.rotation is not None
    return rotated.rotation


def final_summary(report: RunReport) -> str:
    stream = io.StringIO()
    with Console(stream=stream) as console:
        console.show(quantize_summary(report, Path("runs/x")))
    return stream.getvalue()


# --- in every form


def test_a_rotated_report_comes_back_from_its_json_as_it_was(rotated: RunReport, tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    write_report(rotated, directory)
    assert load_report(directory.report_json) == rotated


def test_a_rotation_comes_back_from_its_json_as_it_was(record: RotationRecord, tmp_path: Path) -> None:
    (tmp_path / "rotation.json").write_text(encode(record), encoding="utf-8")
    assert load_record(RotationRecord, tmp_path / "rotation.json") == record
    (tmp_path / "training.json").write_text(encode(record.courses), encoding="utf-8")
    assert load_record(list[RotationTraining], tmp_path / "training.json") == record.courses


def test_the_headline_distinguishes_what_is_stored_from_what_is_simulated(
    report: RunReport, rotated: RunReport
) -> None:
    assert summary.headline(rotated).startswith("4.31 bits per weight stored, A4 simulated; perplexity 18.27 → 19.34")
    assert "stored" not in summary.headline(report)
    only_keys = replace(report, simulation=Simulation("KV4 R3", {}))
    assert "stored, KV4 simulated" in summary.headline(only_keys)


def test_every_form_of_a_report_names_the_basis_and_what_is_not_in_the_checkpoint(rotated: RunReport) -> None:
    for text in (run_markdown(rotated), run_html(rotated), final_summary(rotated)):
        assert "stored, A4 simulated" in text
        assert SIMULATED in text
        assert ROTATED in text


def test_a_report_without_rotation_and_simulation_names_neither(report: RunReport) -> None:
    plain = replace(report, stages=[])  # one of the stages is called rotate
    for text in (run_markdown(plain), final_summary(plain)):
        words = set(re.findall(r"\w+", text.lower()))
        assert words.isdisjoint({"rotation", "simulated", "online", "smoothquant"})


def test_a_checkpoint_that_needs_r4_says_so_in_every_form(rotated: RunReport, record: RotationRecord) -> None:
    online = replace(rotated, rotation=replace(record, online=["R4"]))
    for text in (run_markdown(online), final_summary(online)):
        assert "R4: needed whenever the model runs, so plain transformers refuses the checkpoint" in text
    assert "R4" not in final_summary(rotated)


# --- problems


def test_a_sound_rotation_is_no_problem(rotated: RunReport) -> None:
    assert summary.problems(rotated) == []


@pytest.mark.parametrize("moved", [0.0, 3e-7])  # float32 rounds a start that it cannot hold
def test_rotations_that_stayed_where_they_started_are_a_problem(
    rotated: RunReport, record: RotationRecord, moved: float
) -> None:
    courses = record.courses
    idle = [replace(course, moved=moved, best_step=0) for course in courses]

    def problems(courses: list[RotationTraining]) -> list[str]:
        return summary.problems(replace(rotated, rotation=replace(record, courses=courses)))

    assert problems([*courses[:2], idle[2], *courses[3:]]) == ["nothing was learned for R2 of block 1"]
    assert problems(idle) == ["nothing was learned for R1, R2 of block 0, R2 of block 1, and 28 more"]


def test_a_rotation_that_was_not_to_be_learned_is_no_problem(record: RotationRecord) -> None:
    assert rotation_summary.problems(replace(record, courses=[])) == []


@pytest.mark.parametrize(("ratio", "is_problem"), [(0.5, False), (1.49, False), (1.51, True), (300.0, True)])
def test_a_rotated_model_that_rounds_more_than_the_original_is_a_problem(
    rotated: RunReport, record: RotationRecord, ratio: float, is_problem: bool
) -> None:
    invariance = replace(record.invariance, stored=ratio * record.invariance.rounding)
    found = summary.problems(replace(rotated, rotation=replace(record, invariance=invariance)))
    line = f"the rotated model rounds {ratio:.1f} x as much as the original in bfloat16"
    assert found == ([line] if is_problem else [])


def test_in_float32_there_is_no_rounding_to_compare_with(record: RotationRecord) -> None:
    exact = replace(record, invariance=replace(record.invariance, rounding=0.0, dtype="float32"))
    assert rotation_summary.problems(exact) == []
    assert "rounding" not in {metric.label for metric in rotation_summary.metrics(exact)}


def test_problems_of_a_rotation_are_reported_in_every_form(rotated: RunReport, record: RotationRecord) -> None:
    idle = replace(rotated, rotation=replace(record, courses=[replace(record.courses[0], moved=0.0)]))
    for text in (run_markdown(idle), run_html(idle), final_summary(idle)):
        assert "nothing was learned for R1" in text


# --- jointq rotate


def test_the_final_summary_of_a_rotation_says_how_it_was_constructed_and_its_effect(record: RotationRecord) -> None:
    stream = io.StringIO()
    with Console(stream=stream) as console:
        console.show(rotate_summary(record, Path("runs/x")))
    text = stream.getvalue()
    values = {line.split("  ")[0]: "  ".join(line.split("  ")[1:]).strip() for line in text.splitlines()}
    assert ROTATED in text
    assert values["SQNR of attention"] == "14.0 → 21.0 dB  max/rms 5.5 → 2.8"
    assert values["SQNR of down_proj"] == "11.0 → 13.0 dB  max/rms 11.8 → 5.9"
    assert values["learned R1"] == "150 steps, that of 140 kept; loss 31.10 → 19.70, moved 0.35"
    assert values["weights"] == "326 MB, +21.0 % (input and output embeddings are untied)"
    assert values["rounding"] == "5.1e-03         as stored in bfloat16; the original's own rounding 4.9e-03"
    assert values["built of"] == "R2: Hadamard 64"
    assert values["basis hash"] == record.hash


def test_a_model_of_the_same_size_has_no_row_for_its_growth(record: RotationRecord) -> None:
    same = replace(record, rotated_bytes=record.source_bytes + 4000)  # other shards have other headers
    assert "weights" not in dict(rotation_summary.provenance(same))
