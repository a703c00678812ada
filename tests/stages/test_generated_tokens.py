"""Calibration windows that the model writes itself: seeded, drawn from its distribution, continued where stopped."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import write_checkpoint
from torch import Tensor

from jointq_cli.data.calibration import Calibration
from jointq_cli.data.token_file import load_tokens, save_tokens
from jointq_cli.data.tokenizer import load_tokenizer
from jointq_cli.errors import ConfigError, Interrupted, ModelError, ResourceError
from jointq_cli.evaluation.windows import Evaluation
from jointq_cli.models import sampling
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.report.console.console import Console
from jointq_cli.stages import generated_tokens
from jointq_cli.stages.base import Context, open_context
from jointq_cli.stages.generated_tokens import generated_stage, generated_windows
from jointq_cli.stages.tokens import load_calibration
from jointq_cli.system.distributed import SINGLE_PROCESS
from jointq_cli.system.settings import Runtime


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path, "llama")
    return path


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Context]:
    with open_context(str(tmp_path / "store"), Runtime(device="cpu"), Console(), SINGLE_PROCESS) as opened:
        yield opened


def opened(directory: Path) -> StreamedModel:
    model = StreamedModel(Checkpoint(directory), torch.device("cpu"), torch.float32)
    assert model.checkpoint.content_hash
    return model


def write(context: Context, directory: Path, count: int = 3, seed: int = 0) -> Tensor:
    return generated_windows(context, opened(directory), load_tokenizer(directory, False), count, 12, seed)


def test_windows_depend_on_the_seed_alone_and_are_kept(context: Context, directory: Path, tmp_path: Path) -> None:
    windows = write(context, directory)
    assert windows.shape == (3, 12)
    assert windows.dtype == torch.int64
    assert torch.equal(windows, write(context, directory))
    assert [record.reused for record in context.records] == [False, True]
    assert not torch.equal(windows, write(context, directory, seed=1))
    with open_context(str(tmp_path / "other"), Runtime(device="cpu"), Console(), SINGLE_PROCESS) as other:
        assert torch.equal(windows, write(other, directory))


def test_tokens_are_drawn_from_the_distribution_of_the_model(directory: Path) -> None:
    model = opened(directory)
    first = torch.full((400,), 7)
    with torch.no_grad():
        found = sampling.sample(model, first[:, None], 2, 256, torch.Generator().manual_seed(0))
        with sampling.complete(model):
            likely = model.module(input_ids=first[:1, None]).logits[0, -1].softmax(-1)
        only = sampling.sample(model, first[:20, None], 3, 5, torch.Generator().manual_seed(0))
    assert torch.equal(found[:, 0], first)
    expected = (likely * torch.arange(256)).sum()
    error = (likely * (torch.arange(256) - expected) ** 2).sum().div(400).sqrt()
    assert abs(found[:, 1].double().mean() - expected) < 4 * error
    assert int(only[:, 1:].max()) < 5


def test_a_stopped_stage_continues_behind_the_last_batch(
    context: Context, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generated_tokens, "WINDOWS_AT_ONCE", 2)
    expected = write(context, directory, count=5)
    batches = []
    plain = generated_tokens.sample

    def stopping(model: StreamedModel, begin: Tensor, *more: object) -> Tensor:
        batches.append(len(begin))
        if len(batches) == 2:
            raise Interrupted("stopped")
        return plain(model, begin, *more)

    monkeypatch.setattr(generated_tokens, "sample", stopping)
    stage = generated_stage(opened(directory), load_tokenizer(directory, False), 5, 12, 0)
    scratch = directory.parent / "scratch"
    scratch.mkdir()
    with pytest.raises(Interrupted):
        stage.make(scratch, context)
    stage.make(scratch, context)
    assert batches == [2, 2, 2, 1]
    assert torch.equal(generated_tokens.read_generated(scratch), expected)
    assert [path.name for path in scratch.iterdir()] == [generated_tokens.FILE]


def test_generated_windows_continue_those_of_a_text(context: Context, directory: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h " * 40)
    calibration = Calibration(dataset="text", path=str(text), num_samples=2, seqlen=24, add_generated=3)
    model, tokenizer = opened(directory), load_tokenizer(directory, False)
    tokens = load_calibration(context, calibration, model, tokenizer)
    for number, window in enumerate(tokens.windows[2:]):  # each begins with three tokens of one in turn
        excerpts = tokens.windows[number % 2].unfold(0, 3, 1)
        assert (excerpts == window[:3]).all(dim=1).any()
    assert not torch.equal(tokens.windows[2, 3:], tokens.windows[4, 3:])
    assert "5 x 24 tokens (3 generated)" in tokens.describe()
    assert tokens.provenance["generated_by"] == model.checkpoint.content_hash
    save_tokens(tmp_path / "frozen", tokens)
    assert torch.equal(load_tokens(tmp_path / "frozen", tokenizer).windows, tokens.windows)
    fewer = Calibration(tokens=str(tmp_path / "frozen"), num_samples=3, seqlen=24)
    assert "3 x 24 tokens (1 generated)" in load_calibration(context, fewer, model, tokenizer).describe()


def test_a_calibration_may_be_generated_as_a_whole(context: Context, directory: Path) -> None:
    calibration = Calibration(dataset="generated", split="model", num_samples=3, seqlen=12)
    tokens = load_calibration(context, calibration, opened(directory), load_tokenizer(directory, False))
    assert torch.equal(tokens.windows, write(context, directory))
    assert tokens.describe().startswith("generated/model 3 x 12 tokens sampled seed 0 tokens=")


def test_what_cannot_be_generated_is_refused_in_one_line(
    context: Context, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="add_generated=3: adds to a text"):
        Calibration(dataset="generated", add_generated=3)
    with pytest.raises(ConfigError, match=r"evaluation\.dataset=generated: must be one of"):
        Evaluation(dataset="generated")
    monkeypatch.setattr(generated_tokens, "complete_bytes", lambda *_: 1e18)
    with pytest.raises(ResourceError, match="in memory as a whole"):
        write(context, directory, seed=5)
    monkeypatch.undo()

    def failing(*_: object) -> Tensor:
        raise TypeError("no\ncache")

    monkeypatch.setattr(generated_tokens, "sample", failing)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot write its own text.*TypeError: no cache"):
        write(context, directory, seed=6)
