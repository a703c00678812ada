"""Writes the quantised checkpoint, an ordinary Hugging Face directory.

One shard holds what belongs to no block, then follows one shard per block, moved from the workspace: no weight is
copied, and none is in memory with another block's.
"""

import os
from pathlib import Path

from torch import Tensor

from jointq_cli.models.checkpoint import INDEX, copy_companions, write_index
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.workspace import Workspace
from jointq_cli.system.tensor_files import save_tensors


def assemble(
    model: StreamedModel, workspace: Workspace, target: Path, *, code: bool, outer: dict[str, Tensor] | None = None
) -> None:
    """Fills `target` with shards, index, config and tokenizer; with `code` also with the model's Python files.

    outer: the tensors outside of the blocks by stored name, where they are not the model's.

    Can be repeated after an interruption at any point.
    """
    target.mkdir(exist_ok=True)
    count = len(model) + 1
    shards = [target / f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    save_tensors(shards[0], model.outer_tensors() if outer is None else outer)
    for index, shard in enumerate(shards[1:]):
        if workspace.shard(index).exists():
            os.replace(workspace.shard(index), shard)
    copy_companions(model.checkpoint, target, code=code)
    (target / INDEX).unlink(missing_ok=True)
    write_index(target, shards)
