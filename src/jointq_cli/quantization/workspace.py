"""What the quantise stage has finished so far, on disk: after a kill it continues without any change to its result.

    hidden.safetensors          see hidden_states; written last, so that it says which blocks are finished
    layers/NAME.safetensors     codes, scale, zero-point and permutation of one finished layer
    layers/NAME.json            its record; written last, so a layer with a record is a finished layer
    importance/                 see importance; of a group, written before its layers
    blocks/00003.json           the record of one block
    shards/00003.safetensors    the checkpoint tensors of one block

Every file is written under another name, and renamed when complete.
"""

import dataclasses
import json
from pathlib import Path

from torch import Tensor

from jointq_cli.formats.base import StoredWeight
from jointq_cli.formats.layer_file import load_layer, save_layer
from jointq_cli.quantization.hidden_states import HiddenStateFile
from jointq_cli.records import BlockRecord, LayerRecord
from jointq_cli.system.files import write_atomically, write_text_atomically
from jointq_cli.system.tensor_files import save_tensors


class Workspace:
    """The scratch directory of one quantise stage."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.hidden = HiddenStateFile(directory)
        self.importance = directory / "importance"
        for name in ("layers", "importance", "blocks", "shards"):
            (directory / name).mkdir(exist_ok=True)

    def write_block(self, record: BlockRecord, tensors: dict[str, Tensor]) -> None:
        """tensors: those of the block in the quantised checkpoint, by their stored names."""
        write_atomically(self.shard(record.block), lambda path: save_tensors(path, tensors))
        _write_record(self._block(record.block), record)

    def blocks(self) -> list[BlockRecord]:
        """The records of the finished blocks."""
        paths = [self._block(index) for index in range(self.hidden.finished_blocks())]
        return [BlockRecord(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]

    def shard(self, index: int) -> Path:
        return self.directory / "shards" / f"{index:05d}.safetensors"

    def write_layer(self, weight: StoredWeight, record: LayerRecord) -> None:
        write_atomically(self._layer(record.name, "safetensors"), lambda scratch: save_layer(scratch, weight))
        _write_record(self._layer(record.name, "json"), record)

    def layer(self, name: str) -> tuple[StoredWeight, LayerRecord] | None:
        """A finished layer, or None."""
        if not self._layer(name, "json").exists():
            return None
        return load_layer(self._layer(name, "safetensors")), self.record(name)

    def record(self, name: str) -> LayerRecord:
        """The record of a finished layer."""
        return LayerRecord(**json.loads(self._layer(name, "json").read_text(encoding="utf-8")))

    def _layer(self, name: str, suffix: str) -> Path:
        return self.directory / "layers" / f"{name}.{suffix}"

    def _block(self, index: int) -> Path:
        return self.directory / "blocks" / f"{index:05d}.json"


def _write_record(path: Path, record: LayerRecord | BlockRecord) -> None:
    write_text_atomically(path, json.dumps(dataclasses.asdict(record)) + "\n")
