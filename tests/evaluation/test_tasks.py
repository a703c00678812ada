"""Tasks of lm-eval: figures are those of a textbook computation, and what cannot be measured is refused in one line."""

import functools
import importlib.util
import json
import math
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jointq_cli.errors import ConfigError, Interrupted, ResourceError
from jointq_cli.evaluation import tasks
from jointq_cli.evaluation.tasks import (
    LoadedTask,
    NotDownloaded,
    TaskMeasurement,
    load_tasks,
    measure_task,
    task_records,
)
from jointq_cli.evaluation.windows import Evaluation
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.online_rotation import with_online
from jointq_cli.models.sources import BUNDLED
from jointq_cli.models.streamed import StreamedModel

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "pydoc_task.py"))
NAME = SCRIPT["NAME"]
SAMPLES = 12

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
ignores_its_warnings = pytest.mark.filterwarnings("ignore:::lm_eval")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task of scripts/pydoc_task.py, and groups of two copies of it."""
    place: Path = tmp_path_factory.mktemp("tasks")
    SCRIPT["write_task"](place, SAMPLES)
    for part in ("first", "second"):
        (place / f"{part}.yaml").write_text(SCRIPT["YAML"].replace(f"task: {NAME}", f"task: {part}"))
    (place / "loose.yaml").write_text("group: loose\ntask: [first, second]\n")
    (place / "joined.yaml").write_text(
        "group: joined\ntask: [first, second]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    return place


@pytest.fixture(scope="module")
def model() -> StreamedModel:
    return StreamedModel(Checkpoint(BUNDLED), torch.device("cpu"), torch.float32)


def load(directory: Path, name: str = NAME, limit: int | None = None) -> LoadedTask:
    [task] = load_tasks(Evaluation(tasks=[name], tasks_dir=str(directory), tasks_limit=limit))
    return task


def measure(task: LoadedTask, model: StreamedModel) -> dict[str, TaskMeasurement]:
    with torch.no_grad():
        return {f"{one.task} {one.metric}": one for one in measure_task(task, model, 16, lambda requests: None)}


def right_answers(directory: Path) -> list[float]:
    """Whether the right continuation is the likeliest, by log-probabilities that are summed here."""
    network: Any = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    found = []
    for line in (directory / f"{NAME}.jsonl").read_text().splitlines():
        row = json.loads(line)
        start = len(tokenizer(row["beginning"])["input_ids"])
        likelihoods = []
        for end in row["continuations"]:
            ids = torch.tensor(tokenizer(f"{row['beginning']} {end}")["input_ids"])
            with torch.no_grad():
                rows = torch.log_softmax(network(ids[None]).logits[0].float(), -1)
            likelihoods.append(rows[start - 1 : -1].gather(1, ids[start:, None]).sum().item())
        found.append(float(likelihoods.index(max(likelihoods)) == row["answer"]))
    return found


@needs_harness
@ignores_its_warnings
def test_an_accuracy_is_that_of_log_probabilities_summed_by_hand(directory: Path, model: StreamedModel) -> None:
    expected = right_answers(directory)
    assert 0 < sum(expected) < SAMPLES
    [before] = [one for name, one in measure(load(directory), model).items() if name == f"{NAME} acc"]
    assert before.by_sample == expected
    assert before.value == pytest.approx(sum(expected) / SAMPLES)
    assert before.samples == SAMPLES


@needs_harness
@ignores_its_warnings
def test_a_group_has_one_figure_or_those_of_its_tasks(directory: Path, model: StreamedModel) -> None:
    joined = measure(load(directory, "joined", limit=4), model)
    assert list(joined) == ["joined acc"]
    assert joined["joined acc"].samples == 8
    assert joined["joined acc"].value == pytest.approx(sum(joined["joined acc"].by_sample) / 8)
    loose = measure(load(directory, "loose", limit=2), model)
    assert list(loose) == ["first acc", "first acc_norm", "second acc", "second acc_norm"]


@needs_harness
@ignores_its_warnings
def test_a_task_is_known_by_its_content_and_not_by_its_place(directory: Path, tmp_path: Path) -> None:
    SCRIPT["write_task"](tmp_path / "elsewhere", SAMPLES)
    digests = [load(directory).hash, load(tmp_path / "elsewhere").hash]
    assert digests[0] == digests[1]
    path = tmp_path / "elsewhere" / f"{NAME}.jsonl"
    path.write_text(path.read_text().replace('"answer": 0', '"answer": 1', 1))
    others = [load(tmp_path / "elsewhere").hash, load(directory, limit=4).hash, load(directory, "joined").hash]
    assert len({digests[0], *others, load(directory, "loose").hash}) == 5


@needs_harness
@ignores_its_warnings
def test_a_run_can_be_stopped_at_every_forward_pass(directory: Path, model: StreamedModel) -> None:
    def stop(requests: int) -> None:
        assert requests == 8
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        measure_task(load(directory, limit=4), model, 8, stop)


def measurement(values: list[float], value: float | None = None) -> TaskMeasurement:
    mean = sum(values) / len(values) if value is None else value
    return TaskMeasurement("mine", "acc", mean, 4, 0, values)


def test_the_error_of_a_change_is_that_of_paired_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "harness_version", lambda: "lm-eval")
    task = LoadedTask("mine", {}, None, "0" * 64, 4, [], rolling=False)
    original, quantized = measurement([1.0, 1.0, 0.0, 0.0]), measurement([1.0, 0.0, 0.0, 0.0])
    [record] = task_records(task, [quantized], [original])
    assert record.score.standard_error == pytest.approx(math.sqrt(0.75 / 3 / 4))
    assert record.change_standard_error == pytest.approx(math.sqrt(0.75 / 3 / 4))  # of 0, -1, 0, 0
    assert record.original is not None
    assert record.original.standard_error == pytest.approx(math.sqrt(1 / 3 / 4))
    [unpaired] = task_records(task, [measurement([], value=math.nan)], [original])
    assert unpaired.change_standard_error is None
    [alone] = task_records(task, [measurement([], value=0.3)], [])
    assert (alone.original, alone.score.standard_error, alone.change_standard_error) == (None, None, None)


# --- refusals


@pytest.fixture
def _one_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval looks through its 14 000 tasks once for all tests, which takes seconds."""
    import lm_eval.tasks

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", _manager)


@functools.cache
def _manager(**arguments: Any) -> Any:
    from lm_eval.tasks.manager import TaskManager

    return TaskManager(**arguments)


@needs_harness
@ignores_its_warnings
@pytest.mark.usefixtures("_one_scan")
def test_tasks_of_the_hub_are_refused_without_a_network(directory: Path) -> None:
    here = Evaluation(tasks=["arc_easy"], tasks_dir=str(directory))
    with pytest.raises(
        NotDownloaded, match=rf"^evaluation\.tasks=\[arc_easy\]: not in {directory}, and there is no net"
    ):
        load_tasks(here)
    with pytest.raises(ConfigError, match=r"^evaluation\.tasks=\[arc_eazy\]: neither in .* the nearest is arc_easy$"):
        load_tasks(Evaluation(tasks=["arc_eazy"], tasks_dir=str(directory)))


@needs_harness
@ignores_its_warnings
def test_a_task_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(SCRIPT["YAML"].replace(f"task: {NAME}", "task: mine"))  # without its data
    with pytest.raises(ConfigError, match=r"^evaluation\.tasks=\[mine\]: lm-eval cannot load it \(.*\)$"):
        load(tmp_path, "mine")


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"evaluation\.tasks=\[arc_easy\]: .*pip install 'jointq\[tasks\]'"):
        load_tasks(Evaluation(tasks=["arc_easy"]))


def test_a_directory_needs_the_name_of_a_task_and_a_task_its_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"add evaluation\.tasks"):
        Evaluation(tasks_dir=str(tmp_path))
    if importlib.util.find_spec("lm_eval"):
        with pytest.raises(ConfigError, match="no such directory"):
            load_tasks(Evaluation(tasks=["mine"], tasks_dir=str(tmp_path / "absent")))


def test_a_model_with_an_online_rotation_is_refused() -> None:
    config = with_online({"model_type": "llama", "hidden_size": 8}, "mlp.down_proj")
    model: Any = SimpleNamespace(source=SimpleNamespace(config=config, directory="mine"))
    with pytest.raises(ConfigError, match="R4"):
        tasks.check_plain(model)
