"""Tasks in a run: measured on the original and the quantised model, planned, reused, and in every report."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import write_checkpoint

from jointq_cli import pipeline
from jointq_cli.cli.compose import launch
from jointq_cli.cli.main import main
from jointq_cli.evaluation.activation_settings import Activations
from jointq_cli.evaluation.tasks import LoadedTask
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.records import RunEstimate
from jointq_cli.report import Console
from jointq_cli.stages.tasks import SizedTask, task_stage, task_warnings, with_tokenizer

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "pydoc_task.py"))
NAME = SCRIPT["NAME"]
BOTH = [f"{NAME} original", f"{NAME} quantized"]


def planned(words: list[str]) -> RunEstimate:
    found: list[RunEstimate] = []
    launch("plan", words, lambda recipe, job: found.append(pipeline.plan(recipe, Console(quiet=True))))
    return found[0]


@pytest.mark.filterwarnings("ignore:::lm_eval")
def test_both_models_are_measured_once_as_planned_and_the_figures_are_in_the_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jointq_cli.stages.plan.throughput.MEASURED_SECONDS", 0.001)
    monkeypatch.setattr("jointq_cli.report.figures.run.run_figures", lambda report: [])
    SCRIPT["write_task"](tmp_path / "mine", 6)
    model = write_checkpoint(tmp_path / "model", max_position_embeddings=512)
    words = [
        "recipe=ci_smoke", f"model.path={model}", "quantizer=rtn", "quantizer.bits=2",
        "quantizer.group_size=32", "qep=none", "calibration.num_samples=8", "calibration.seqlen=32",
        "evaluation.seqlen=32", "evaluation.max_windows=4", f"evaluation.tasks=[{NAME}]", "evaluation.tasks_dir=mine",
    ]  # fmt: skip

    before = planned(words)
    stages = {stage.name: stage for stage in before.stages}
    assert [stages[name].state for name in BOTH] == ["to make"] * 2
    assert all(stages[name].seconds > 0 and stages[name].memory > 0 for name in BOTH)
    assert any("6 samples only" in warning for warning in before.warnings)
    assert any("complete model in memory" in note for note in before.notes)

    assert main(["quantize", *words, "hydra.run.dir=run"]) == 0
    report: dict[str, Any] = json.loads(Path("run/report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == [stage.name for stage in before.stages[:-1]]
    assert [(task["task"], task["metric"]) for task in report["tasks"]] == [(NAME, "acc"), (NAME, "acc_norm")]
    assert all(0 <= task[part]["value"] <= 1 for task in report["tasks"] for part in ("score", "original"))
    for text in (capsys.readouterr().out, Path("run/report.md").read_text(), Path("run/report.html").read_text()):
        assert f"{NAME} acc" in text
        assert "6 samples only" in text

    assert {stage.name: stage.state for stage in planned(words).stages}[BOTH[0]] == "reused"
    words = [
        "model.path=run/checkpoint",
        "reference=model",
        *(word for word in words if word.startswith("evaluation.")),
        "hydra.run.dir=alone",
    ]
    assert main(["evaluate", *words]) == 0
    alone = json.loads(Path("alone/evaluation.json").read_text())
    assert alone["tasks"] == report["tasks"]
    assert {stage["name"]: stage["reused"] for stage in alone["stages"]}[f"{NAME} reference"]


def sized(samples: int = 500, longest: int = 10, *, rolling: bool = False) -> SizedTask:
    task = LoadedTask("mine", {}, None, "0" * 64, samples, [], rolling)
    return SizedTask(task, mean=10, longest=longest, most=100, batch=4)


@pytest.mark.parametrize(
    ("task", "activations", "words"),
    [
        (sized(), Activations(), None),
        (sized(samples=25), Activations(), "25 samples only; the standard error of an accuracy will be up to 0.10"),
        (sized(longest=101), Activations(), "up to 101 tokens, which are cut to the last 100"),
        (sized(longest=101, rolling=True), Activations(), None),  # measured in windows
        (sized(), Activations(bits=4), "activations are not quantised"),
    ],
)
def test_what_makes_a_figure_less_is_said_before_it_is_measured(
    task: SizedTask, activations: Activations, words: str | None
) -> None:
    found = task_warnings([task], activations)
    assert len(found) == (words is not None)
    assert words is None or words in found[0]


@pytest.mark.filterwarnings("ignore:::lm_eval")
def test_another_tokenizer_is_another_measurement(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    directory = write_checkpoint(tmp_path / "model")

    def key() -> str | None:
        checkpoint = Checkpoint(directory)
        assert checkpoint.content_hash
        model = StreamedModel(checkpoint, torch.device("cpu"), torch.float32)
        return task_stage(sized(), model, with_tokenizer(model), "").key

    first = key()
    assert first is not None
    assert key() == first
    (directory / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    assert key() != first
