"""Assembles the checkpoint of the quantised model from the shards of a finished workspace."""

import os
from pathlib import Path

from jointq_cli.models.checkpoint import INDEX, copy_companions, write_index
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.workspace import Workspace
from jointq_cli.system.tensor_files import save_tensors


def assemble(model: StreamedModel, workspace: Workspace, target: Path, *, code: bool) -> None:
    """Fills `target` with shards, index, config and tokenizer. May be called again after a kill at any point."""
    target.mkdir(exist_ok=True)
    count = len(model) + 1
    shards = [target / f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    save_tensors(shards[0], model.outer_tensors())
    for index, shard in enumerate(shards[1:]):
        if workspace.shard(index).exists():
            os.replace(workspace.shard(index), shard)
    copy_companions(model.checkpoint, target, code=code)
    (target / INDEX).unlink(missing_ok=True)
    write_index(target, shards)
