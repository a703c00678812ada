"""A stage is a value with a key, and a context runs it at most once."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export_cases import write_quantized
from tiny_models import write_checkpoint

from jointq_cli.errors import ModelError
from jointq_cli.evaluation.windows import ScoredWindows
from jointq_cli.formats.export import exporter_of
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.sources import ModelSource
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.quantizers import RTN
from jointq_cli.report import Console
from jointq_cli.stages import model as model_stage
from jointq_cli.stages.base import Context, Stage, open_context, windows_per_pass
from jointq_cli.stages.hidden import hidden_stage
from jointq_cli.stages.model import fetch_model
from jointq_cli.system import artifact_key
from jointq_cli.system.distributed import SINGLE_PROCESS
from jointq_cli.system.hash_cache import cached_hash
from jointq_cli.system.settings import Runtime
from jointq_cli.system.torchrun import process_group

RUNTIME = Runtime(
    device="cpu", dtype="auto", num_threads=None, batch_tokens=64, suspended_activations_gb=1.0, hessians_gb=1.0
)  # fmt: skip


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Context]:
    with open_context(str(tmp_path / "store"), RUNTIME, Console(quiet=True), SINGLE_PROCESS) as opened:
        yield opened


def stage(made: list[Path], *inputs: str | None) -> Stage:
    def make(scratch: Path, context: Context) -> None:
        made.append(scratch)
        (scratch / "result").write_text("1")

    return Stage("some step", "kind", {"bits": 4}, inputs, make)


def test_a_stage_runs_once_and_is_recorded_each_time(context: Context) -> None:
    made: list[Path] = []
    step = stage(made, "input")
    assert not context.has(step)
    results = [context.run(step) for _ in range(2)]
    assert [result.reused for result in results] == [False, True]
    assert len(made) == 1
    assert context.has(step)
    assert (context.directory(step) / "result").read_text() == "1"
    assert [(record.name, record.reused) for record in context.records] == [("some step", False), ("some step", True)]


def test_a_stage_without_a_key_is_not_run(context: Context) -> None:
    unknown = stage([], "input", None)
    assert unknown.key is None
    assert replace(unknown, inputs=("input", "other")).key is not None
    with pytest.raises(AssertionError, match="before its inputs were hashed"):
        context.run(unknown)


def test_a_model_that_no_run_has_hashed_gives_a_stage_no_key(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")

    def key(checkpoint: Checkpoint) -> str | None:
        model = StreamedModel(checkpoint, torch.device("cpu"), torch.float32)
        return hidden_stage(model, windows, batch=2).key

    ids = torch.zeros(4, 8, dtype=torch.int64)
    windows = ScoredWindows(ids, ids == 0, stride=8)
    read = Checkpoint(directory)
    assert key(read) is None
    assert read.content_hash == read.known_hash
    assert key(read) is not None
    assert key(read) == key(Checkpoint(directory, read.content_hash))
    assert key(Checkpoint(directory, "another hash")) not in (None, key(read))


def test_a_gguf_file_is_converted_once_and_its_hash_noted(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, converted = tmp_path / "tiny.gguf", []

    def convert(source: Path, target: Path) -> None:
        converted.append(source)
        write_checkpoint(target)

    monkeypatch.setattr(model_stage, "convert_gguf", convert)
    file.write_bytes(b"GGUF")
    source = ModelSource(str(file), revision=None, trust_remote_code=False)
    first, second = (fetch_model(context, source) for _ in range(2))
    assert converted == [file]
    assert first.directory == second.directory
    assert cached_hash(context.store.root, file, [file]) is not None
    assert cached_hash(context.store.root, first.directory, first.hashed_files) == first.content_hash


def test_a_packed_checkpoint_is_dequantised_once(context: Context, tmp_path: Path) -> None:
    model = write_quantized(tmp_path / "model", "llama", RTN(bits=4, group_size=32))
    packed = tmp_path / "packed"
    packed.mkdir()
    exporter_of("compressed-tensors").write(model, packed)
    source = ModelSource(str(packed), revision=None, trust_remote_code=False)
    first, second = (fetch_model(context, source, packed=True) for _ in range(2))
    assert first.directory == second.directory
    assert all(model.checkpoint.same_bytes(first, name) for name in model.checkpoint.tensors)
    with pytest.raises(ModelError, match="is quantised already"):
        fetch_model(context, source)


def test_weights_are_checked_again_for_other_code_of_the_model(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[bool] = []
    monkeypatch.setattr(model_stage, "check_finite", lambda checkpoint, code: checked.append(code))
    directory = write_checkpoint(tmp_path / "model")

    def fetch(*, trusted: bool) -> None:
        fetch_model(context, ModelSource(str(directory), revision=None, trust_remote_code=trusted))

    fetch(trusted=False)
    fetch(trusted=True)
    fetch(trusted=True)
    (directory / "modeling_own.py").write_text("uses_more = True\n")
    fetch(trusted=True)
    fetch(trusted=False)
    assert checked == [False, True, True]


def test_the_collectives_are_code_of_what_several_processes_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[str]] = []
    monkeypatch.setattr(artifact_key, "code_version", lambda modules: asked.append(modules) or "")
    alone = stage([], "input")
    for step in (alone, replace(alone, together=True)):
        assert step.key is not None
    assert [asked[1] - asked[0], asked[0] - asked[1]] == [{process_group.__module__}, set()]


@pytest.mark.parametrize(("length", "expected"), [(16, 4), (64, 1), (65, 1), (1000, 1)])
def test_a_pass_takes_as_many_windows_as_its_tokens_allow_and_one_at_least(length: int, expected: int) -> None:
    assert windows_per_pass(RUNTIME, torch.zeros(100, length)) == expected
