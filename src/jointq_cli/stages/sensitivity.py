"""What each layer's candidates do to the loss of the model, measured once for all budgets."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jointq_cli.data.token_file import Tokens
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.gradients import Gradients
from jointq_cli.quantization.hessian_cache import Hessians
from jointq_cli.quantization.hidden_states import HiddenStateFile
from jointq_cli.quantization.quantizers.base import Quantizer
from jointq_cli.quantization.sensitivity import LossFiles, measure_losses
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
) -> Stage:
    """Runs `sensitivity_stage`, and before it the gradients, and the Hessians where the store has room for them."""
    stage = sensitivity_stage(model, tokens, loop, candidates)
    if not context.has(stage):
        gradients = find_gradients(context, model, tokens, loop)
        hessians = share_hessians(context, model, tokens, loop, gradients)
        stage = sensitivity_stage(model, tokens, loop, candidates, gradients, hessians)
    context.run(stage)
    return stage


def sensitivity_stage(
    model: StreamedModel,
    tokens: Tokens,
    loop: LoopSettings,
    candidates: Mapping[str, Sequence[Quantizer]],
    gradients: Gradients | None = None,
    hessians: Hessians | None = None,
) -> Stage:
    """loop: of layers that are solved for inputs of the original model, with the curvature that `gradients` are of.
    candidates: of each of its layers. The gradients follow from what is in the key, and so do the Hessians; whoever
    computes the stage has the former."""

    def make(scratch: Path, context: Context) -> None:
        assert gradients is not None
        files = LossFiles(scratch)
        with context.console.bar(SENSITIVITY, total=len(model)) as bar:
            bar.advance(files.hidden.finished_blocks())
            measure_losses(
                model,
                tokens.windows,
                loop,
                candidates,
                gradients,
                hessians,
                files,
                bar.advance,
                context.pause,
                context.team,
            )

    return Stage(
        name=SENSITIVITY,
        kind=SENSITIVITY,
        spec={
            "candidates": {name: list(each) for name, each in candidates.items()},
            "curvature": loop.curvature,
            **statistics_spec(model, loop),
        },
        inputs=(*model.identity, tokens.hash),
        make=make,
        cost=sensitivity_cost,
        resumable=True,
        together=True,
        finished_blocks=lambda scratch: HiddenStateFile(scratch).finished_blocks(),
    )
