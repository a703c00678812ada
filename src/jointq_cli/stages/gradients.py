"""The gradients of a model's loss, collected once for all quantizers."""

from pathlib import Path

from jointq_cli.data.token_file import Tokens
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.curvature import Kfac
from jointq_cli.quantization.gradients import Gradients, collect_gradients
from jointq_cli.quantization.settings import LoopSettings
from jointq_cli.stages.base import Context, Stage
from jointq_cli.stages.plan.costs import Workload


def find_gradients(context: Context, model: StreamedModel, tokens: Tokens, loop: LoopSettings) -> Gradients | None:
    """Those in the store, collected if they are missing; None where the settings need none."""
    if not isinstance(loop.curvature, Kfac):
        return None
    return Gradients(context.run(gradients_stage(model, tokens, loop)).path)


def gradients_stage(model: StreamedModel, tokens: Tokens, loop: LoopSettings) -> Stage:
    """Those of all linear layers of the blocks, for sampled labels."""
    assert isinstance(loop.curvature, Kfac)
    seed = loop.curvature.seed

    def make(scratch: Path, context: Context) -> None:
        gradients = Gradients(scratch)
        with context.console.bar("gradients", total=len(model)) as bar:
            bar.advance(gradients.finished_blocks())
            collect_gradients(
                model, tokens.windows, seed, loop.batch, gradients, bar.advance, context.pause, context.team
            )

    return Stage(
        name="gradients",
        kind="gradients",
        spec={"seed": seed, "batch": loop.batch, "dtype": str(model.dtype), "device": model.device.type},
        inputs=(*model.identity, tokens.hash),
        make=make,
        cost=Workload.gradients,
        resumable=True,
        together=True,
        finished_blocks=lambda scratch: Gradients(scratch).finished_blocks(),
    )
