"""Every selected layer quantised, block by block, and the checkpoint that consists of them."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from jointq_cli.data.token_file import Tokens
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.assembly import assemble
from jointq_cli.quantization.curvature import Kfac
from jointq_cli.quantization.gradients import Gradients
from jointq_cli.quantization.hessian_cache import Hessians
from jointq_cli.quantization.hidden_states import HiddenStateFile
from jointq_cli.quantization.loop import quantize_blocks
from jointq_cli.quantization.settings import LoopSettings
from jointq_cli.quantization.workspace import Workspace
from jointq_cli.records import BlockRecord, LayerRecord
from jointq_cli.stages.base import Context, Stage
from jointq_cli.stages.gradients import find_gradients
from jointq_cli.stages.hessians import expert_spec, layers_in, share_hessians
from jointq_cli.stages.plan.costs import Workload


@dataclass(frozen=True)
class Quantized:
    """The result of `stage`, opened."""

    stage: Stage
    directory: Path
    checkpoint: Checkpoint
    layers: list[LayerRecord]  # in the order of the model
    blocks: list[BlockRecord]

    @property
    def codes(self) -> Path:
        return self.directory / "layers"

    @property
    def importance(self) -> Path:
        return Workspace(self.directory).importance

    @property
    def probe(self) -> Tensor:
        """Final hidden states of the first calibration batch, as they were in memory when the last block was done."""
        return Workspace(self.directory).hidden.read_as_checkpoint()


def quantize(context: Context, model: StreamedModel, tokens: Tokens, loop: LoopSettings) -> Quantized:
    """Runs `quantize_stage`, and before it the gradients, and the Hessians where other runs can share them."""
    checkpoint = model.checkpoint
    context.note_hash(checkpoint.directory, checkpoint.hashed_files, checkpoint.content_hash)
    stage = quantize_stage(model, tokens, loop)
    if not context.has(stage):
        gradients = find_gradients(context, model, tokens, loop)
        hessians = share_hessians(context, model, tokens, loop, gradients)
        stage = quantize_stage(model, tokens, loop, hessians, gradients)
    context.run(stage)
    return open_quantized(context, stage, layers_in(model, loop))


def quantize_stage(
    model: StreamedModel,
    tokens: Tokens,
    loop: LoopSettings,
    hessians: Hessians | None = None,
    gradients: Gradients | None = None,
) -> Stage:
    """hessians: where they were collected ahead. The result is the same bit for bit, so they are no part of the key;
    nor are the gradients, which follow from what is."""
    names = layers_in(model, loop)
    code = model.trust_remote_code

    def make(scratch: Path, context: Context) -> None:
        workspace = Workspace(scratch)
        finished = range(workspace.hidden.finished_blocks())
        with context.console.bar("quantize", total=len(names)) as bar:
            if finished:
                context.console.note(f"continuing at block {len(finished) + 1} of {len(model)}")
                bar.advance(sum(model.block_of(name) in finished for name in names))

            def on_layer(record: LayerRecord) -> None:
                context.console.layer(record)
                bar.advance()

            quantize_blocks(
                model, tokens.windows, loop, workspace, on_layer, context.pause, hessians, context.team, gradients
            )
        context.team.on_rank0(lambda: assemble(model, workspace, scratch / "checkpoint", code=code))

    return Stage(
        name="quantize",
        kind="quantize",
        spec={
            "quantizer": loop.quantizer,
            **({"own": dict(loop.own)} if loop.own else {}),
            "qep": loop.qep,
            **({"curvature": loop.curvature} if isinstance(loop.curvature, Kfac) else {}),
            "layers": names,
            "inputs": loop.inputs,
            "weights": loop.weights,
            "batch": loop.batch,
            "dtype": str(model.dtype),
            **expert_spec(model, loop),
            **loop.precision_spec,
            "device": model.device.type,  # CPU and GPU round differently, and the reload check wants the same bits
        },
        inputs=(model.checkpoint.known_hash, model.checkpoint.companions_hash(code=code), tokens.hash),
        make=make,
        cost=Workload.quantize,
        resumable=True,
        together=True,
        finished_blocks=lambda scratch: HiddenStateFile(scratch).finished_blocks(),
    )


def open_quantized(context: Context, stage: Stage, layers: list[str]) -> Quantized:
    """The result of `quantize_stage`, once it has been run."""
    directory = context.directory(stage)
    workspace = Workspace(directory)
    records = [workspace.record(name) for name in layers]
    return Quantized(stage, directory, Checkpoint(directory / "checkpoint"), records, workspace.blocks())
