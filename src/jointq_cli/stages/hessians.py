"""The Hessians of a model, collected once for all quantizers that need the same ones."""

from pathlib import Path

from jointq_cli.data.token_file import Tokens
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.curvature import Kfac
from jointq_cli.quantization.expert_unit import model_units
from jointq_cli.quantization.gradients import Gradients
from jointq_cli.quantization.hessian_cache import Hessians, bytes_needed, collect_hessians
from jointq_cli.quantization.hidden_states import HiddenStateFile
from jointq_cli.quantization.settings import LoopSettings
from jointq_cli.stages.base import Context, Stage
from jointq_cli.stages.plan.costs import Workload


def share_hessians(
    context: Context, model: StreamedModel, tokens: Tokens, loop: LoopSettings, gradients: Gradients | None = None
) -> Hessians | None:
    """The Hessians in the store, collected if they are missing. None where this quantizer's depend on what it has
    quantised before, and where `runtime.hessians_gb` has no room for them."""
    size, budget = bytes_needed(model, loop), round(context.runtime.hessians_gb * 1e9)
    if not loop.hessians_cacheable or not budget:
        return None
    if not can_share(model, loop, budget):
        _note_no_room(context, f"they take up to {size / 1e9:.3g} GB")
        return None
    stage = hessians_stage(model, tokens, loop, gradients)
    if not context.make_room(stage, budget, size):
        _note_no_room(context, "those of runs that are under way take the rest")
        return None
    return Hessians(context.run(stage).path)


def can_share(model: StreamedModel, loop: LoopSettings, budget: float) -> bool:
    """Whether all quantizers with these settings need the same Hessians, and these fit into a budget of bytes."""
    return loop.hessians_cacheable and bytes_needed(model, loop) <= budget


def hessians_stage(
    model: StreamedModel, tokens: Tokens, loop: LoopSettings, gradients: Gradients | None = None
) -> Stage:
    """Those of the inputs of all layers to quantise. gradients: by which tokens are weighted too."""

    def make(scratch: Path, context: Context) -> None:
        hessians = Hessians(scratch)
        with context.console.bar("hessians", total=len(model)) as bar:
            bar.advance(hessians.hidden.finished_blocks())
            collect_hessians(model, tokens.windows, loop, hessians, bar.advance, context.pause, context.team, gradients)

    return Stage(
        name="hessians",
        kind="hessians",
        spec={**statistics_spec(model, loop), **_energy_spec(loop)},
        inputs=(*model.identity, tokens.hash),
        make=make,
        cost=Workload.hessians,
        resumable=True,
        together=True,
        finished_blocks=lambda scratch: HiddenStateFile(scratch).finished_blocks(),
    )


def statistics_spec(model: StreamedModel, loop: LoopSettings) -> dict[str, object]:
    """What decides the statistics of layer inputs in the original model, besides model and tokens."""
    return {
        "layers": layers_in(model, loop),
        "weights": loop.weights.canonical,
        "heldout_from": loop.heldout_from,
        "batch": loop.batch,
        "dtype": str(model.dtype),
        "device": model.device.type,
        **expert_spec(model, loop),
        **loop.precision_spec,
    }


def expert_spec(model: StreamedModel, loop: LoopSettings) -> dict[str, str]:
    """What of the settings for experts decides the result: nothing where none are quantised."""
    if next(model_units(model, loop.layers), None) is None:
        return {}
    followed = {"routing": loop.experts.routing} if loop.corrects else {}
    return {"experts": loop.experts.calibration, **followed}


def _energy_spec(loop: LoopSettings) -> dict[str, float]:
    """What of the curvature decides the Hessians: nothing where it does not weigh tokens."""
    curvature = loop.curvature
    if not isinstance(curvature, Kfac) or not curvature.token_mix:
        return {}
    return {"token_mix": curvature.token_mix, "labels": curvature.seed}


def layers_in(model: StreamedModel, loop: LoopSettings) -> list[str]:
    """Names of the layers to quantise, in the order of the model."""
    return [name for name in model.linear_layers() if name in loop.layers]


def _note_no_room(context: Context, reason: str) -> None:
    budget = f"runtime.hessians_gb={context.runtime.hessians_gb:g}"
    context.console.note(f"Hessians are not kept for other runs: {reason}, and {budget}")
