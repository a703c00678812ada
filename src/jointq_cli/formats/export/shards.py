"""Writes a packed checkpoint as safetensors: the shards of the dequantised one, with each quantised weight replaced."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from jointq_cli.formats.export.base import QuantizedModel
from jointq_cli.models.checkpoint import INDEX, SINGLE, copy_companions, write_index
from jointq_cli.system.tensor_files import save_tensors

CONFIG = "config.json"


Converted = Callable[[str], Mapping[str, Tensor]]  # name of a weight -> the tensors, by name, that replace it


def write_shards(model: QuantizedModel, directory: Path, packed: Converted, plain: Converted | None = None) -> None:
    """Fills `directory` with weights, index and tokenizer; `write_config` adds config.json.

    packed: of quantised weights. plain: of all others; None copies them. One shard is in memory at a time.
    """
    checkpoint = model.checkpoint
    files = sorted({info.file for info in checkpoint.tensors.values()})
    for file in files:
        tensors: dict[str, Tensor] = {}
        for name in (name for name, info in checkpoint.tensors.items() if info.file == file):
            tensors |= packed(name) if name in model.forms else plain(name) if plain else checkpoint.read([name])
        save_tensors(directory / file.name, tensors)
    copy_companions(checkpoint, directory, code=True)
    (directory / CONFIG).unlink(missing_ok=True)
    if [file.name for file in files] != [SINGLE]:
        (directory / INDEX).unlink(missing_ok=True)
        write_index(directory, [directory / file.name for file in files])


def write_config(model: QuantizedModel, directory: Path, further: Mapping[str, Any]) -> None:
    """config.json of the dequantised checkpoint with the keys of the format."""
    text = json.dumps({**model.checkpoint.config, **further}, indent=2, ensure_ascii=False)
    (directory / CONFIG).write_text(text + "\n", encoding="utf-8")
