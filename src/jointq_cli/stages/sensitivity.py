"""What each layer's candidates do to the loss of the model, measured once for all budgets."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jointq_cli.data.token_file import Tokens
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.gradients import Gradients
from jointq_cli.quantization.hessian_cache import Hessians
from jointq_cli.quantization.hidden_states import HiddenStateFile
from jointq_cli.quantization.quantizers.base import Quantizer
from jointq_cli.quantization.sensitivity import CandidateWalk, LossFiles, measure_fisher, measure_kfac
from jointq_cli.quantization.settings import LoopSettings
from jointq_cli.stages.base import Context, Stage
from jointq_cli.stages.gradients import find_gradients
from jointq_cli.stages.hessians import share_hessians, statistics_spec
from jointq_cli.stages.plan.allocation_cost import sensitivity_cost

SENSITIVITY = "sensitivity"


def measure(
    context: Context,
    model: StreamedModel,
    tokens: Tokens,
    loop: LoopSettings,
    candidates: Mapping[str, Sequence[Quantizer]],
    sensitivity: str,
) -> Stage:
    """Runs `sensitivity_stage`, and before it the gradients if `loop` needs them, and the Hessians where the store has
    room for them."""
    stage = sensitivity_stage(model, tokens, loop, candidates, sensitivity)
    if not context.has(stage):
        gradients = find_gradients(context, model, tokens, loop)
        hessians = share_hessians(context, model, tokens, loop, gradients)
        stage = sensitivity_stage(model, tokens, loop, candidates, sensitivity, gradients, hessians)
    context.run(stage)
    return stage


def sensitivity_stage(
    model: StreamedModel,
    tokens: Tokens,
    loop: LoopSettings,
    candidates: Mapping[str, Sequence[Quantizer]],
    sensitivity: str,
    gradients: Gradients | None = None,
    hessians: Hessians | None = None,
) -> Stage:
    """loop: of layers that are solved for inputs of the original model, with the curvature that `gradients` are of.
    candidates: of each of its layers. sensitivity: as `allocation.sensitivity`. The gradients follow from what is in
    the key, and so do the Hessians; whoever computes the stage has the former where they are needed."""
    measure, passes = (measure_fisher, 2) if sensitivity == "fisher" else (measure_kfac, 1)

    def make(scratch: Path, context: Context) -> None:
        files = LossFiles(scratch)
        walk = CandidateWalk(
            model, tokens.windows, loop, candidates, gradients, hessians, files, context.pause, context.team
        )
        with context.console.bar(SENSITIVITY, total=passes * len(model)) as bar:
            bar.advance(files.hidden.finished_blocks() + Gradients(files.fisher).finished_blocks())
            measure(walk, bar.advance)

    return Stage(
        name=SENSITIVITY,
        kind=SENSITIVITY,
        spec={
            "candidates": {name: list(each) for name, each in candidates.items()},
            "curvature": loop.curvature,
            **({} if sensitivity == "kfac" else {"sensitivity": sensitivity}),
            **statistics_spec(model, loop),
        },
        inputs=(*model.identity, tokens.hash),
        make=make,
        cost=sensitivity_cost,
        resumable=True,
        together=True,
        finished_blocks=lambda scratch: HiddenStateFile(scratch).finished_blocks(),
    )
