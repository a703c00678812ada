"""Writes a model in another basis block by block, and checks that it still computes the same function.

Every tensor is computed once, in float64. Before it is rounded to the dtype in which it is stored, it runs in float32
on a few calibration tokens: the logits must be those of the original. Then the model as stored runs on the same tokens.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from jointq_cli.errors import NumericsError
from jointq_cli.models.checkpoint import INDEX, Checkpoint, write_index
from jointq_cli.models.forward import final_hidden
from jointq_cli.models.streamed import BlockwiseModel, StreamedModel
from jointq_cli.records import Invariance
from jointq_cli.system.tensor_files import save_tensors
from jointq_cli.transforms.basis import RotatedTensors

PROBE_TOKENS = 128  # a wrong merge shows on the first ones
MERGE_LIMIT = 1e-4  # see `check_invariance`, as the next
STORED_LIMIT = 0.2


def write_rotated(rotated: RotatedTensors, probe: Tensor, on_block: Callable[[], None]) -> Tensor:
    """Writes a checkpoint to the directory of `rotated`, in the original's dtypes, and returns the logits of its
    tensors before they were rounded: (tokens, vocabulary) float32.

    probe: (1, tokens) int64. on_block is called after each block and may raise.
    """
    rotated.write_companions()
    model = BlockwiseModel(rotated, rotated.model.device, torch.float32, rotated.model.trust_remote_code)
    count = len(model) + 1
    shards = [rotated.directory / f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    outer = model.outer_tensors()
    _save(rotated, shards[0], outer)
    with model.outer(outer):  # not over the blocks: on a GPU both would be in memory
        hidden = model.embed(probe)
    for index, shard in enumerate(shards[1:]):
        tensors = model.block_tensors(index)
        with model.block(index, tensors):
            model.run_all(index, hidden, batch=1)
        _save(rotated, shard, tensors)
        on_block()
    (rotated.directory / INDEX).unlink(missing_ok=True)
    write_index(rotated.directory, shards)
    with model.outer(outer):
        return model.logits(hidden)[0].float().cpu()


def check_invariance(original: StreamedModel, rotated: Path, merged: Tensor, probe: Tensor) -> Invariance:
    """Compares the logits on the probe (1, tokens) int64 of the original, of the checkpoint in the directory `rotated`
    and of its tensors before rounding: `merged`, from `write_rotated`.

    Raises NumericsError in two cases. The logits of the unrounded tensors differ from the original's by more than
    MERGE_LIMIT: float32 itself causes 1e-6 on SmolLM2-135M, and less on the bundled model. Or those of the stored model
    differ by more than STORED_LIMIT and three times what rounding does to the original, so the files do not hold what
    was computed: bfloat16 causes about 1e-2, a damaged layer or a config that ties the embeddings again 0.3 or more.
    """

    def logits(checkpoint: Checkpoint, dtype: torch.dtype) -> Tensor:
        model = BlockwiseModel(checkpoint, original.device, dtype, original.trust_remote_code)
        hidden = final_hidden(model, probe, batch=1)
        with model.outer():
            return model.logits(hidden)[0].float().cpu()

    truth = logits(original.checkpoint, torch.float32)
    found = Invariance(
        merge=_relative_difference(merged, truth),
        stored=_relative_difference(logits(Checkpoint(rotated), original.dtype), truth),
        rounding=_relative_difference(logits(original.checkpoint, original.dtype), truth),
        dtype=str(original.dtype).removeprefix("torch."),
        tokens=probe.numel(),
    )
    if not found.merge <= MERGE_LIMIT:
        raise NumericsError(
            f"rotation: the rotated model's logits differ from the original's by {found.merge:.2g} in float32, and may "
            f"by {MERGE_LIMIT:g} at most"
        )
    limit = max(STORED_LIMIT, 3 * found.rounding)
    if not found.stored <= limit:
        raise NumericsError(
            f"rotation: the rotated model's logits as stored differ from the original's by {found.stored:.2g} in "
            f"{found.dtype}, and may by {limit:.2g} at most; what lies on the disk is not what was merged"
        )
    return found


def _save(rotated: RotatedTensors, path: Path, tensors: dict[str, Tensor]) -> None:
    save_tensors(path, {name: tensor.to(rotated.dtype_of(name)) for name, tensor in tensors.items()})


def _relative_difference(found: Tensor, truth: Tensor) -> float:
    """|found - truth| / |truth|, NaN where either holds NaN or Inf."""
    return float((found - truth).norm() / truth.norm())
