"""Perplexity: the windows are the protocol's, the figures and errors those of a textbook computation."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_checkpoint
from transformers import AutoModelForCausalLM

from jointq_cli.errors import ConfigError, TextError
from jointq_cli.evaluation.perplexity import HiddenPredictions, Scores, compare, perplexity, score
from jointq_cli.evaluation.windows import Evaluation, ScoredWindows, cut_windows
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.forward import final_hidden
from jointq_cli.models.streamed import StreamedModel

CPU = torch.device("cpu")


def evaluation(**changes: object) -> Evaluation:
    return Evaluation(**{"seqlen": 8, **changes})  # type: ignore[arg-type]


def targets(windows: ScoredWindows) -> list[int]:
    """The scored tokens in order; ids are positions in the text, so these are the positions scored."""
    return windows.ids[windows.scored].tolist()


TEXT = torch.arange(100, 130)


def test_plain_windows_score_every_token_but_the_first_of_each() -> None:
    windows = cut_windows(TEXT, evaluation(), bos_id=None)
    assert windows.ids.shape == (3, 8)
    assert targets(windows) == [t for t in range(100, 124) if (t - 100) % 8]


def test_overlapping_windows_score_every_token_once() -> None:
    for stride in (1, 3, 7):
        windows = cut_windows(TEXT, evaluation(stride=stride), bos_id=None)
        last = int(windows.ids[-1, -1])
        assert targets(windows) == list(range(101, last + 1))


def test_bos_first_stands_once_before_the_text() -> None:
    windows = cut_windows(TEXT, evaluation(bos="first"), bos_id=1)
    assert windows.ids[:, 0].tolist() == [1, 107, 115]
    assert targets(windows)[:7] == list(range(100, 107))


def test_bos_each_scores_every_token_of_every_window() -> None:
    windows = cut_windows(TEXT, evaluation(bos="each"), bos_id=1)
    assert windows.ids[:, 0].tolist() == [1] * len(windows.ids)
    assert targets(windows) == list(range(100, 100 + 7 * len(windows.ids)))


def test_max_windows_keeps_the_first() -> None:
    assert torch.equal(
        cut_windows(TEXT, evaluation(max_windows=2), None).ids, cut_windows(TEXT, evaluation(), None).ids[:2]
    )


def test_a_text_shorter_than_a_window_says_how_long_it_is() -> None:
    with pytest.raises(TextError, match=r"evaluation.seqlen=64: the text has 30 tokens"):
        cut_windows(TEXT, evaluation(seqlen=64), None)


def test_a_bos_that_the_tokenizer_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.bos=each: this tokenizer has no BOS token"):
        cut_windows(TEXT, evaluation(bos="each"), None)


@pytest.mark.parametrize("changes", [{"seqlen": 1}, {"stride": 0}, {"stride": 9}, {"max_windows": 0}, {"bos": "yes"}])
def test_settings_out_of_range_are_refused_by_key(changes: dict[str, object]) -> None:
    [key] = changes
    with pytest.raises(ConfigError, match=f"^evaluation.{key}={changes[key]}: "):
        evaluation(**changes)


def two_models(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and one whose weights were disturbed."""
    one = write_checkpoint(tmp_path / "one")
    two = write_checkpoint(tmp_path / "two")
    tensors = load_file(two / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        tensors[name] = tensor * (1 + 0.1 * torch.randn(tensor.shape, generator=generator))
    save_file(tensors, two / "model.safetensors", {"format": "pt"})
    return one, two


@torch.no_grad()
def scores_and_logits(tmp_path: Path, windows: ScoredWindows) -> tuple[Scores, list[torch.Tensor]]:
    directories = two_models(tmp_path)
    models = [StreamedModel(Checkpoint(directory), CPU, torch.float32) for directory in directories]
    hidden = [final_hidden(model, windows.ids, batch=2) for model in models]
    expected = [
        AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32).eval()(windows.ids).logits for d in directories
    ]
    return score(*map(HiddenPredictions, models, hidden), windows), expected


def test_scores_are_those_of_a_textbook_computation(tmp_path: Path) -> None:
    ids = torch.randint(3, 256, (61,), generator=torch.Generator().manual_seed(3))
    windows = cut_windows(ids, evaluation(seqlen=16, stride=5), None)
    scores, (one, two) = scores_and_logits(tmp_path, windows)
    p, q = (logits[:, :-1].double().log_softmax(-1) for logits in (one, two))
    mask, target = windows.scored[:, 1:], windows.ids[:, 1:, None]
    expected = {
        "tokens": mask.double(),
        "original_nll": -p.gather(2, target)[..., 0],
        "quantized_nll": -q.gather(2, target)[..., 0],
        "kl": (p.exp() * (p - q)).sum(-1),
        "agreements": (p.argmax(-1) == q.argmax(-1)).double(),
    }
    for name, per_token in expected.items():
        torch.testing.assert_close(getattr(scores, name), (per_token * mask).sum(1), rtol=1e-5, atol=1e-5)


def test_a_model_does_not_differ_from_itself(tmp_path: Path) -> None:
    windows = cut_windows(torch.randint(3, 256, (64,)), evaluation(seqlen=16), None)
    model = StreamedModel(Checkpoint(write_checkpoint(tmp_path)), CPU, torch.float32)
    with torch.no_grad():
        hidden = final_hidden(model, windows.ids, 4)
        predictions = HiddenPredictions(model, hidden)
        same = compare(score(predictions, predictions, windows))
    assert (same.nll_increase, same.kl_divergence, same.top1_agreement) == (0.0, 0.0, 1.0)


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    tokens = torch.tensor([10.0, 20.0, 5.0], dtype=torch.float64)
    uniform = perplexity(math.log(256) * tokens, tokens)
    assert uniform.value == pytest.approx(256)
    assert uniform.standard_error == pytest.approx(0, abs=1e-9)


def test_the_standard_error_is_the_spread_over_repeated_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = 2 + 0.3 * torch.randn(2000, 25, generator=generator, dtype=torch.float64)
    tokens = torch.full((25,), 100.0, dtype=torch.float64)
    estimates = [perplexity(draw * tokens, tokens) for draw in draws]
    spread = torch.tensor([estimate.nll for estimate in estimates]).std().item()
    claimed = torch.tensor([estimate.nll_standard_error for estimate in estimates]).mean().item()
    assert claimed == pytest.approx(spread, rel=0.1)


def test_a_token_that_the_original_rules_out_costs_no_divergence(tmp_path: Path) -> None:
    from jointq_cli.evaluation.perplexity import _sums

    p = torch.tensor([[0.5, 0.5, 0.0]]).log()
    q = torch.tensor([[0.25, 0.5, 0.25]]).log()
    _, _, _, kl, _ = _sums(p, q, torch.tensor([0]))
    assert kl.item() == pytest.approx(0.5 * math.log(2))
