"""The paths of a run on a few tokens before the first block is solved: what would fail after the last, fails now."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from jointq_cli.data.token_file import Tokens
from jointq_cli.errors import ModelError, NumericsError
from jointq_cli.evaluation.activation_quantization import simulated
from jointq_cli.evaluation.activation_settings import Activations
from jointq_cli.evaluation.perplexity import HiddenPredictions, score
from jointq_cli.evaluation.windows import ScoredWindows
from jointq_cli.models.checkpoint import Checkpoint, copy_companions, write_index
from jointq_cli.models.layer_ref import layer_refs
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.accumulator import UNPAIRED
from jointq_cli.quantization.expert_unit import find_units, watching
from jointq_cli.quantization.settings import LoopSettings

TOKENS = 16


def try_paths(
    model: StreamedModel, tokens: Tokens, windows: ScoredWindows, loop: LoopSettings, activations: Activations
) -> None:
    """Embeds a window of each text, runs the first block of each kind, and scores on a few tokens, with the model as it
    is and as its checkpoint will be opened again. One block is loaded at a time.

    Raises what the run would raise later: ModelError for a model that cannot be run so, NumericsError for Inf and NaN
    and for a layer whose inputs QEP cannot pair.
    """
    few = windows.part(slice(1))
    few = ScoredWindows(few.ids[:, :TOKENS], few.scored[:, :TOKENS], few.stride)
    with model.outer():
        model.embed(tokens.windows[:1])
        model.embed(windows.ids[:1])
        hidden = model.embed(few.ids)
    with simulated(model, activations, loop.layers, dict.fromkeys(loop.layers, 1.0)):
        for index in _first_of_each_kind(model.blocks):
            with model.block(index, model.block_tensors(index)):
                hidden = _run(model, index, hidden, loop)
    with TemporaryDirectory() as scratch:
        again = StreamedModel(_as_written(model, Path(scratch)), model.device, model.dtype, model.trust_remote_code)
        score(HiddenPredictions(model, hidden), HiddenPredictions(again, hidden), few)


def _first_of_each_kind(blocks: list[nn.Module]) -> list[int]:
    """The first of the blocks with the same modules and shapes."""
    first: dict[object, int] = {}
    for index, block in enumerate(blocks):
        kind = repr(block), tuple((name, parameter.shape) for name, parameter in block.named_parameters())
        first.setdefault(kind, index)
    return list(first.values())


def _run(model: StreamedModel, index: int, hidden: Tensor, loop: LoopSettings) -> Tensor:
    """The output of a loaded block."""
    received: dict[str, int] = {}
    block, prefix = model.blocks[index], model.prefix(index)
    layers = [layer for name, layer in layer_refs(block, prefix).items() if name in loop.layers]

    def count(name: str, inputs: Tensor) -> None:
        received[name] = inputs.shape[:-1].numel()

    handles = [
        layer.module.register_forward_pre_hook(lambda _, args, name=layer.name: count(name, args[0]))
        for layer in layers
        if loop.qep.corrects(layer.name)
    ]
    try:
        with watching(find_units(block, prefix, layers)) as units:
            output = model.run(index, hidden)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{model.source.directory}: block {index} of {type(model.module).__name__} cannot be run alone: {reason}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    paired = {layer.name for unit in units for layer in unit}
    for name, number in received.items():
        if name not in paired and 0 < number < hidden.shape[:-1].numel():
            raise NumericsError(f"{name}: {UNPAIRED}")
    return output


def _as_written(model: StreamedModel, directory: Path) -> Checkpoint:
    """A checkpoint with the config and code that the quantised one will have, and the weights of the original."""
    copy_companions(model.checkpoint, directory, code=model.trust_remote_code)
    links = []
    for file in sorted({tensor.file.absolute() for tensor in model.checkpoint.tensors.values()}):
        links.append(directory / file.name)
        links[-1].symlink_to(file)
    write_index(directory, links)
    return Checkpoint(directory)
