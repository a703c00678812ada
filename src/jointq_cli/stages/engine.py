"""How well a model predicts the evaluation text as an inference engine computes it."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from jointq_cli.evaluation.engine_model import EngineModel
from jointq_cli.evaluation.engines import ENGINES, EnginePredictions, opened
from jointq_cli.evaluation.perplexity import HiddenPredictions, Scores, score
from jointq_cli.evaluation.windows import ScoredWindows
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.sources import gguf_in
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.stages.base import Context, windows_per_pass
from jointq_cli.stages.hidden import hidden_stage, read_hidden

TOKENIZED = 8  # windows whose text the engine tokenizes too


@dataclass(frozen=True)
class EngineScores:
    """engine: with its version. problems: what it does otherwise than transformers."""

    engine: str
    scores: Scores
    problems: list[str]


def score_in_engine(
    context: Context,
    name: str,
    path: Path,
    reference: StreamedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    windows: ScoredWindows,
) -> EngineScores:
    """The scores of the model at `path` against `reference`, or against itself. The store does not keep them, since the
    engine's build decides them too. Raises as `opened` does."""
    engine, batch = ENGINES[name], windows_per_pass(context.runtime, windows.ids)
    expected = None
    if reference is not None:
        hidden = hidden_stage(reference, windows, batch, "evaluate reference")
        context.run(hidden)
        expected = HiddenPredictions(reference, read_hidden(context, hidden, windows, batch))
    with context.timed(f"score in {name}"), opened(name, path) as model:
        problems = tokenizer_problems(name, model, tokenizer, windows)
        found = EnginePredictions(model, windows)
        with context.console.bar("score", total=len(windows.ids)) as bar:

            def on_window() -> None:
                bar.advance()
                context.pause()

            scores = score(expected or found, found, windows, on_window)
    return EngineScores(f"{name} ({engine.version})", scores, problems)


def engine_path(source: str, checkpoint: Checkpoint) -> Path:
    """What an engine opens: the directory or GGUF file that `model.path` names, or where the hub's model lies."""
    local = Path(source).expanduser()
    return gguf_in(local) if local.exists() else checkpoint.directory


def tokenizer_problems(
    name: str, model: EngineModel, tokenizer: PreTrainedTokenizerBase, windows: ScoredWindows
) -> list[str]:
    """Where the engine has a tokenizer of its own: whether it gives other ids for the evaluation text."""
    texts = [str(tokenizer.decode(ids)) for ids in windows.ids[:TOKENIZED]]
    found = [(model.tokenize(text), tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    different = sum(ids is not None and ids != expected for ids, expected in found)
    return [f"{name} tokenizes {different} of {len(texts)} windows of text otherwise"] if different else []
