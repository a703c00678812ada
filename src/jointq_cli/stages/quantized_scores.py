"""How well the quantised checkpoint, as it lies on disk, predicts the evaluation text, compared with its original."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from jointq_cli.data.token_file import Tokens
from jointq_cli.evaluation.activation_quantization import search_clips, simulated
from jointq_cli.evaluation.activation_settings import Activations
from jointq_cli.evaluation.perplexity import Scores
from jointq_cli.evaluation.windows import ScoredWindows
from jointq_cli.models.forward import final_hidden
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.settings import LoopSettings
from jointq_cli.records import IDENTICAL, Simulation
from jointq_cli.stages.base import Context, Stage
from jointq_cli.stages.hessians import layers_in
from jointq_cli.stages.hidden import own_hidden, read_hidden
from jointq_cli.stages.plan.costs import Workload
from jointq_cli.stages.quantize import open_quantized
from jointq_cli.stages.scores import load_scores, save_scores, score_together

_CLIPS, _RELOAD = "clips.json", "reload.txt"


@dataclass(frozen=True)
class QuantizedScores:
    """The quantised checkpoint's scores, whether it computes on disk what it did in memory, and what was simulated."""

    scores: Scores
    reload_check: str
    simulation: Simulation | None


def quantized_scores_stage(
    original: StreamedModel,
    hidden: Stage,
    quantize: Stage,
    loop: LoopSettings,
    tokens: Tokens,
    windows: ScoredWindows,
    batch: int,
    activations: Activations,
) -> Stage:
    """Scores the result of the stage `quantize`, with quantised activations where the settings say so.

    hidden: the stage of the original's hidden states. tokens: of calibration; on the first batch of them clip ratios
    are searched, and the checkpoint is compared with what it was in memory.
    """

    def make(scratch: Path, context: Context) -> None:
        quantized = open_quantized(context, quantize, layers_in(original, loop))
        reloaded = context.open_model(quantized.checkpoint, original.trust_remote_code)
        names = [layer.name for layer in quantized.layers]
        clips = search_clips(reloaded, activations, names, tokens.windows, loop.batch, context.pause)
        with simulated(reloaded, activations, names, clips):
            found = own_hidden(context, reloaded, windows.ids, batch)
        expected = read_hidden(context, hidden, windows, batch)
        scores = score_together(context, original, expected, reloaded, found, windows, batch)

        def write() -> None:
            (scratch / _CLIPS).write_text(json.dumps(clips), encoding="utf-8")
            first = final_hidden(reloaded, tokens.windows[: loop.batch], loop.batch, pause=context.pause)
            (scratch / _RELOAD).write_text(_difference(first.cpu(), quantized.probe), encoding="utf-8")
            save_scores(scratch, scores)

        context.team.on_rank0(write)

    return Stage(
        name="evaluate quantized",
        kind="scores",
        spec={"batch": batch, "activations": activations if activations.simulates else None},
        inputs=(quantize.key, hidden.key),
        make=make,
        cost=Workload.evaluate_quantized,
        together=True,
    )


def read_quantized_scores(directory: Path, activations: Activations) -> QuantizedScores:
    """The result of `quantized_scores_stage`."""
    clips = json.loads((directory / _CLIPS).read_text(encoding="utf-8"))
    return QuantizedScores(
        scores=load_scores(directory),
        reload_check=(directory / _RELOAD).read_text(encoding="utf-8"),
        simulation=Simulation(activations.describe(), clips) if activations.simulates else None,
    )


def _difference(found: Tensor, expected: Tensor) -> str:
    if torch.equal(found, expected):
        return IDENTICAL
    return f"differs by up to {(found.float() - expected.float()).abs().max().item():.3g} in the final hidden states"
