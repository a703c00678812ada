"""What a tracking service receives of a run: by a tracker that remembers, and by each library itself, offline."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from jointq_cli.cli.compose import launch
from jointq_cli.errors import ConfigError, NumericsError, ResourceError
from jointq_cli.records import LayerRecord
from jointq_cli.report import Console
from jointq_cli.tracking import (
    MlflowTracking,
    TensorboardTracking,
    Tracker,
    Tracking,
    WandbTracking,
    base,
    tracked,
)

RECIPE = {"quantizer.bits": "3", "layers.overrides.re:.*[0]": "keep"}


class Remembering(Tracker):
    def __init__(self) -> None:
        self.received: list[object] = []

    def parameters(self, values: Mapping[str, str]) -> None:
        self.received.append(dict(values))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.received.append((step, sorted(values)))

    def figures(self, values: Mapping[str, float]) -> None:
        self.received.append(sorted(values))

    def files(self, paths: Sequence[Path]) -> None:
        self.received.append([path.name for path in paths])

    def close(self, problem: str) -> None:
        self.received.append(problem)


class ToTracker:
    """Settings of a service; not derived from Tracking, whose subclasses are options of a recipe."""

    name = "mine"

    def __init__(self, tracker: Tracker | None = None) -> None:
        self.tracker = tracker

    def require_installed(self) -> None:
        pass

    def open(self, run: str, sweep: str, directory: Path) -> Tracker:
        if self.tracker is None:
            raise OSError("nobody\nanswers")
        return self.tracker


def layer(block: int) -> LayerRecord:
    name = f"model.layers.{block}.mlp.up_proj"
    return LayerRecord(name, block, "up_proj", 8, 8, 3, 8, 3.5, 0.01, 0.02, None, 0.1, "ok")


def run_with(tracking: Any, directory: Path, *, error: Exception | None = None) -> Console:
    """One stage with two layers, and a report's file."""
    directory.mkdir(parents=True)
    console = Console(directory / "log.txt", quiet=True)
    with console, tracked(tracking, directory, RECIPE, console, in_sweep=True):
        with console.stage("file hashes"):
            console.layer(layer(0))
            console.layer(layer(1))
        if error:
            raise error
        (directory / "report.md").write_text("# a run", encoding="utf-8")
        (directory / "report.html").write_text("<p>a run</p>", encoding="utf-8")
    return console


def test_layers_are_points_of_a_curve_over_the_blocks(tmp_path: Path) -> None:
    tracker = Remembering()
    run_with(ToTracker(tracker), tmp_path / "sweep" / "3")
    metrics = ["bits_per_weight/mlp.up_proj", "output_error/mlp.up_proj", "weight_error/mlp.up_proj"]
    files = ["report.html", "report.md", "log.txt"]
    assert tracker.received == [RECIPE, (0, metrics), (1, metrics), ["seconds/file_hashes"], files, ""]


def test_a_failed_run_is_told_with_its_reason(tmp_path: Path) -> None:
    tracker = Remembering()
    with pytest.raises(NumericsError):
        run_with(ToTracker(tracker), tmp_path / "run", error=NumericsError("block 1: NaN"))
    assert tracker.received[-2:] == [["log.txt"], "NumericsError: block 1: NaN"]


def test_a_service_that_does_not_answer_refuses_the_run_at_its_start(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"^tracking=mine: OSError: nobody answers$"):
        run_with(ToTracker(), tmp_path / "run")


def test_a_service_that_fails_later_is_a_warning(tmp_path: Path) -> None:
    class Failing(Remembering):
        def metrics(self, values: Mapping[str, float], step: int) -> None:
            raise OSError("gone")

    tracker = Failing()
    console = run_with(ToTracker(tracker), tmp_path / "run")
    assert console.warnings == ["tracking=mine: OSError: gone; the run goes on without it"]
    assert tracker.received == [RECIPE]


@pytest.mark.parametrize("settings", [MlflowTracking, WandbTracking, TensorboardTracking])
def test_a_library_that_is_missing_is_named_with_its_extra(
    settings: type[Tracking], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_is_installed", lambda module: False)
    with pytest.raises(ConfigError, match=rf"tracking={settings.name}: .*pip install 'jointq\[{settings.name}\]'"):
        run_with(settings(), tmp_path / "run")


def test_a_folder_that_is_called_like_a_library_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_service").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not base._is_installed("a_service")
    assert base._is_installed("json")


def test_the_recipe_of_a_run_does_not_say_where_it_was_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = []
    launch("quantize", ["tracking=mlflow"], lambda recipe, job: found.append((recipe.tracking, job.config)))
    [(tracking, config)] = found
    assert tracking == MlflowTracking()
    assert "tracking" not in config


# --- the libraries themselves


@pytest.mark.slow  # its import takes seconds
def test_mlflow_keeps_a_failed_run_in_its_file_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # set here to be unset afterwards
    store = f"file:{tmp_path / 'mlruns'}"
    settings = MlflowTracking(uri=store, experiment="mine")
    with pytest.raises(NumericsError):
        run_with(settings, tmp_path / "sweep" / "0", error=NumericsError("block 1: NaN"))
    run_with(settings, tmp_path / "sweep" / "1")
    client = mlflow.MlflowClient(store)
    finished, failed = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert [run.info.status for run in (failed, finished)] == ["FAILED", "FINISHED"]
    assert [run.info.run_name for run in (failed, finished)] == ["sweep/0", "sweep/1"]
    assert failed.data.tags["problem"] == "NumericsError: block 1: NaN"
    assert finished.data.tags["sweep"] == "sweep"
    assert finished.data.params == {"quantizer.bits": "3", "layers.overrides.re:.__0_": "keep"}
    history = client.get_metric_history(failed.info.run_id, "output_error/mlp.up_proj")
    assert [(point.step, point.value) for point in history] == [(0, 0.01), (1, 0.01)]
    assert {file.path for file in client.list_artifacts(finished.info.run_id)} == {
        "report.html",
        "report.md",
        "log.txt",
    }


@pytest.mark.slow
def test_tensorboard_reads_the_event_files(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_with(TensorboardTracking(), tmp_path / "run")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(point.step, round(point.value, 6)) for point in events.Scalars("output_error/mlp.up_proj")] == [
        (0, 0.01),
        (1, 0.01),
    ]
    assert "seconds/file_hashes" in events.Tags()["scalars"]
    assert {"recipe/text_summary", "report/text_summary"} <= set(events.Tags()["tensors"])


@pytest.mark.slow
def test_wandb_keeps_runs_for_a_later_synchronisation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(NumericsError):
        run_with(WandbTracking(), tmp_path / "0", error=NumericsError("block 1: NaN"))
    run_with(WandbTracking(), tmp_path / "1")
    for run in "01":
        [kept] = tmp_path.glob(f"{run}/wandb/offline-run-*/run-*.wandb")
        for _ in range(100):  # another process writes it
            content = kept.read_bytes()
            if b"output_error/mlp.up_proj" in content:
                break
            time.sleep(0.1)
        assert b"output_error/mlp.up_proj" in content
        assert (b"block 1: NaN" in content) == (run == "0")
