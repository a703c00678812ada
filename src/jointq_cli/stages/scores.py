"""How well a model predicts the evaluation text, compared with a reference."""

import dataclasses
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from jointq_cli.evaluation.perplexity import HiddenPredictions, Scores, score
from jointq_cli.evaluation.windows import ScoredWindows
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.stages.base import Context, Stage, windows_per_pass
from jointq_cli.stages.hidden import hidden_stage, own_hidden, read_hidden
from jointq_cli.system.tensor_files import save_tensors

_FILE = "scores.safetensors"


def score_model(context: Context, model: StreamedModel, reference: StreamedModel, windows: ScoredWindows) -> Scores:
    """The scores of a model against a reference, which may be the same model."""
    batch = windows_per_pass(context.runtime, windows.ids)
    name = "evaluate" if reference is model else "evaluate reference"
    hidden = hidden_stage(reference, windows, batch, name)
    context.run(hidden)
    return load_scores(context.run(_scores_stage(model, reference, hidden, windows, batch)).path)


def _scores_stage(
    model: StreamedModel, reference: StreamedModel, hidden: Stage, windows: ScoredWindows, batch: int
) -> Stage:
    def make(scratch: Path, context: Context) -> None:
        first = read_hidden(context, hidden, windows, batch)
        second = first if model is reference else own_hidden(context, model, windows.ids, batch)
        scores = score_together(context, reference, first, model, second, windows, batch)
        context.team.on_rank0(save_scores, scratch, scores)

    return Stage(
        name="score",
        kind="scores",
        spec={"batch": batch, "dtype": str(model.dtype)},
        inputs=(*model.identity, hidden.key),
        make=make,
        together=True,
    )


def score_together(
    context: Context,
    original: StreamedModel,
    first: Tensor,
    model: StreamedModel,
    second: Tensor,
    windows: ScoredWindows,
    batch: int,
) -> Scores:
    """The scores on all windows, on every process. first, second: final hidden states (windows, tokens, hidden) of both
    models on this process's part of the windows."""
    own = windows.part(context.team.part(len(windows.ids), batch))
    with context.console.bar("score", total=len(own.ids)) as bar:

        def on_window() -> None:
            bar.advance()
            context.pause()

        expected = HiddenPredictions(original, first)
        found = expected if model is original else HiddenPredictions(model, second)
        return Scores.joined(context.team.gather(score(expected, found, own, on_window)))


def save_scores(directory: Path, scores: Scores) -> None:
    tensors = {field.name: getattr(scores, field.name) for field in dataclasses.fields(scores)}
    save_tensors(directory / _FILE, tensors)


def load_scores(directory: Path) -> Scores:
    return Scores(**load_file(directory / _FILE))
