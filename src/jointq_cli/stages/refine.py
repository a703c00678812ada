"""The quantised model refined by gradients: a directory of the same form as the quantise stage's."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from jointq_cli.data.token_file import Tokens
from jointq_cli.errors import ConfigError, ResourceError
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.assembly import assemble
from jointq_cli.quantization.hidden_states import HiddenStateFile
from jointq_cli.quantization.quantizers.base import Quantizer
from jointq_cli.quantization.refinement.settings import GradientRefinement, ModelRefinement, Refinement
from jointq_cli.quantization.refinement.variables import RefinableWeight
from jointq_cli.quantization.refinement.walk import RefinementWalk, load_courses, load_gains
from jointq_cli.quantization.workspace import Workspace
from jointq_cli.records import RefinementRecord
from jointq_cli.stages.base import Context, Stage
from jointq_cli.stages.generated_tokens import generated_stage, read_generated
from jointq_cli.stages.plan.refinement_cost import refinement_cost
from jointq_cli.stages.quantize import Quantized, open_quantized
from jointq_cli.system.files import link_files
from jointq_cli.system.machine import available_memory

REFINE = "refine"
GENERATED_SEED = 1_000_003  # added to the refinement's: other windows than those of `calibration.add_generated`


@dataclass(frozen=True)
class RefinedModel:
    """The model to go on with: the refined one and its record, or the quantised one and no record."""

    quantized: Quantized
    record: RefinementRecord | None = None

    @property
    def gains(self) -> dict[str, Tensor]:
        """The gains of norms that were trained, as they are stored, by their stored names."""
        return load_gains(self.quantized.directory) if self.record else {}


def refine(
    context: Context,
    model: StreamedModel,
    quantized: Quantized,
    tokens: Tokens,
    refinement: Refinement,
    batch: int,
    generated: Stage | None,
) -> RefinedModel:
    """Runs `refine_stage`, if these settings refine anything. model: the one that was quantised. generated: the
    stage of `further_windows`."""
    if not isinstance(refinement, GradientRefinement):
        return RefinedModel(quantized)
    layers = [layer.name for layer in quantized.layers]
    if generated is not None:
        context.run(generated)
    stage = refine_stage(model, quantized.stage, layers, tokens, refinement, batch, generated)
    context.run(stage)
    refined = open_quantized(context, stage, layers)
    sizes = [layer.out_features * layer.in_features for layer in refined.layers]
    changed = sum(layer.notes["refined_codes"] * size for layer, size in zip(refined.layers, sizes, strict=True))
    record = RefinementRecord(
        refinement=refinement.describe(),
        codes_changed=changed / sum(sizes),
        norms=sorted(load_gains(refined.directory)),
        courses=load_courses(refined.directory),
    )
    return RefinedModel(refined, record)


def refine_stage(
    model: StreamedModel,
    quantize: Stage,
    layers: list[str],
    tokens: Tokens,
    refinement: GradientRefinement,
    batch: int,
    generated: Stage | None,
) -> Stage:
    """model: the one that the stage `quantize` quantises. tokens: (windows, tokens) to train on. batch: windows per
    forward pass where nothing is trained. generated: the stage with further windows, if any. Raises ConfigError for too
    few windows."""
    refinement.heldout(len(tokens.windows))
    code = model.trust_remote_code

    def make(scratch: Path, context: Context) -> None:
        quantized = open_quantized(context, quantize, layers)
        start = context.open_model(quantized.checkpoint, code)
        if isinstance(refinement, ModelRefinement):
            codes = sum(layer.out_features * layer.in_features for layer in quantized.layers)
            require_memory(start, codes, refinement)
        windows = tokens.windows
        if generated is not None:
            windows = torch.cat([windows, read_generated(context.directory(generated))])
        workspace = Workspace(scratch)
        parts = 1 if isinstance(refinement, ModelRefinement) else len(model)
        with context.console.bar(REFINE, total=parts * refinement.steps) as bar:

            def on_step(name: str, step: int, loss: float, least: float) -> None:
                bar.advance(status=f"{name} loss {loss:.4g}, held out {least:.4g}")
                context.pause()

            walk = RefinementWalk(
                original=model,
                start=start,
                codes=quantized.codes,
                records=quantized.layers,
                windows=windows,
                batch=batch,
                probe=min(batch, len(tokens.windows)),  # those that the reload check runs again
                settings=refinement,
                workspace=workspace,
                on_step=on_step,
                pause=context.pause,
            )
            walk.run()
        link_files(quantized.importance, workspace.importance)
        assemble(start, workspace, scratch / "checkpoint", code=code, outer=walk.outer_tensors())
        walk.clear()

    return Stage(
        name=REFINE,
        kind="refined",
        spec={
            "refinement": refinement,
            "layers": layers,
            "batch": batch,
            "dtype": str(model.dtype),
            "device": model.device.type,
        },
        inputs=(quantize.key, tokens.hash, *([generated.key] if generated else [])),
        make=make,
        cost=refinement_cost,
        resumable=True,
        finished_blocks=lambda scratch: HiddenStateFile(scratch).finished_blocks(),
    )


def further_windows(
    original: StreamedModel, tokenizer: PreTrainedTokenizerBase, tokens: Tokens, refinement: Refinement
) -> Stage | None:
    """The windows that the original model writes as continuations of `tokens`; None where none are asked for."""
    if not isinstance(refinement, GradientRefinement) or not refinement.generated:
        return None
    return generated_stage(
        original, tokenizer, refinement.generated, tokens.windows.shape[1], refinement.seed + GENERATED_SEED, tokens
    )


def check_refinable(
    model: StreamedModel, layers: Mapping[str, Quantizer], refinement: Refinement, windows: int
) -> None:
    """Raises ConfigError for too few windows, and where a layer will be stored on another grid than a uniform one: both
    before the model is quantised."""
    if not isinstance(refinement, GradientRefinement):
        return
    refinement.heldout(windows)
    linear = model.linear_layers()
    for name, quantizer in layers.items():
        form = quantizer.storage(linear[name].out_features, linear[name].in_features, model.checkpoint.dtype)
        if not isinstance(form, RefinableWeight):
            raise ConfigError(
                f"refinement={refinement.scope}: {name} is stored as {form.label}, and only uniform grids are refined; "
                "refinement=none"
            )


def require_memory(model: StreamedModel, codes: int, refinement: GradientRefinement) -> None:
    """Raises ResourceError where the complete model and what Adam keeps of so many codes do not fit."""
    needed = model.checkpoint.parameters * model.dtype.itemsize + refinement.state_bytes(codes)
    on_gpu = model.device.type == "cuda"
    free = torch.cuda.mem_get_info(model.device)[0] if on_gpu else available_memory()
    if needed > free:
        raise ResourceError(
            f"refinement=model: takes at least {needed / 1e9:.3g} GB of memory for all weights and Adam's state, and "
            f"{free / 1e9:.3g} GB are free; refinement=block, or refinement.train=[scales,norms]"
        )
