"""A model in another basis, written block by block, and the proof that it still computes the same.

Every tensor is merged once, in float64. On its way to the disk it runs, unrounded, on a few calibration tokens: the
logits must be those of the original in float32. Then the model as it lies on the disk runs on the same tokens.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from jointq_cli.errors import NumericsError
from jointq_cli.models.checkpoint import INDEX, Checkpoint, write_index
from jointq_cli.models.forward import final_hidden
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.records import Invariance
from jointq_cli.system.tensor_files import save_tensors
from jointq_cli.transforms.basis import RotatedCheckpoint

PROBE = 128  # tokens; a wrong merge shows on the first ones
MERGE_LIMIT = 1e-4  # see `check`, as the next
STORED_LIMIT = 0.2


def write_rotated(
    rotated: RotatedCheckpoint, probe: Tensor, trust_remote_code: bool, on_block: Callable[[], None]
) -> Tensor:
    """Fills the directory of `rotated` with weights in the source's dtypes, and returns the logits (tokens, vocabulary)
    float32 of its tensors before they were rounded.

    probe: (1, tokens) int64. on_block is called after each block and may raise.
    """
    model = StreamedModel(rotated, rotated.device, torch.float32, trust_remote_code)
    count = len(model) + 1
    shards = [rotated.directory / f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    outer = model.outer_tensors()
    _save(rotated, shards[0], outer)
    with rotated.keeping(outer):  # which the walk needs twice more, and which take longest to merge
        hidden = model.embed_all(probe, batch=1)
        for index, shard in enumerate(shards[1:]):
            tensors = model.block_tensors(index)
            with model.block(index, tensors):
                model.run_all(index, hidden, batch=1)
            _save(rotated, shard, tensors)
            on_block()
        (rotated.directory / INDEX).unlink(missing_ok=True)
        write_index(rotated.directory, shards)
        return _logits(model, hidden)


def check(original: StreamedModel, rotated: Path, merged: Tensor, probe: Tensor, trust_remote_code: bool) -> Invariance:
    """Compares logits on the probe (1, tokens); `merged` are those of `write_rotated`.

    Raises NumericsError where the merge changes the model by more than MERGE_LIMIT: float32 itself makes 1e-6 of
    SmolLM2-135M, and less of the bundled model. Or where what lies on the disk is not what was merged, which shows as
    more than STORED_LIMIT and thrice the rounding: bfloat16 makes some 1e-2, a damaged layer or a config that ties the
    embeddings again 0.3 and more.
    """

    def logits(checkpoint: Checkpoint, dtype: torch.dtype) -> Tensor:
        model = StreamedModel(checkpoint, original.device, dtype, trust_remote_code)
        return _logits(model, final_hidden(model, probe, batch=1))

    truth = logits(original.checkpoint, torch.float32)
    found = Invariance(
        merge=_distance(merged, truth),
        stored=_distance(logits(Checkpoint(rotated), original.dtype), truth),
        rounding=_distance(logits(original.checkpoint, original.dtype), truth),
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


def _save(rotated: RotatedCheckpoint, path: Path, tensors: dict[str, Tensor]) -> None:
    save_tensors(path, {name: tensor.to(rotated.dtype_of(name)) for name, tensor in tensors.items()})


def _logits(model: StreamedModel, hidden: Tensor) -> Tensor:
    with model.outer():
        return model.logits(hidden)[0].float().cpu()


def _distance(found: Tensor, truth: Tensor) -> float:
    """|found - truth| / |truth|, NaN where either is not finite."""
    return float((found - truth).norm() / truth.norm())
