"""What the long quantise stage has finished so far, on disk: it continues after a kill as if nothing had happened.

    hidden.safetensors          the hidden states that enter the first unfinished block, and that block's number
    layers/NAME.safetensors     codes, scale, zero-point and permutation of one finished layer
    layers/NAME.json            its record; written last, so a layer with a record is a finished layer
    blocks/00003.json           the record of one finished block
    shards/00003.safetensors    the checkpoint tensors of one finished block

Every file is renamed into place when whole. A block is finished when the hidden states of the next one are there.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from jointq_cli.formats.base import StoredWeight
from jointq_cli.formats.layer_file import load_layer, save_layer
from jointq_cli.records import BlockRecord, LayerRecord
from jointq_cli.system.files import write_atomically
from jointq_cli.system.tensor_files import read_rows, save_tensors

HIDDEN = "hidden.safetensors"


@dataclass(frozen=True)
class Streams:
    """The hidden states that enter a block, (windows, tokens, hidden) each, after the original blocks and after the
    quantised ones.

    The one that no layer is solved for may be as short as the first batch. That batch behind the quantised blocks is
    what the checkpoint must give again when it is read back from disk.
    """

    original: Tensor
    quantized: Tensor

    def first(self, windows: int) -> "Streams":
        return Streams(self.original[:windows], self.quantized[:windows])


class Workspace:
    """The scratch directory of one quantise stage."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._hidden = directory / HIDDEN
        for name in ("layers", "blocks", "shards"):
            (directory / name).mkdir(exist_ok=True)

    def position(self) -> int:
        """The first unfinished block."""
        return finished_blocks(self.directory)

    def streams(self, part: Callable[[int], slice] = slice) -> Streams:
        """The hidden states at `position`, of each stream's windows those that `part` says, given their number. Only
        there once a block has been finished."""
        rows = [part(self.windows(name)) for name in ("original", "quantized")]
        return Streams(read_rows(self._hidden, "original", rows[0]), read_rows(self._hidden, "quantized", rows[1]))

    def windows(self, stream: str) -> int:
        """How many there are of "original" or "quantized" hidden states."""
        with safe_open(self._hidden, framework="pt") as file:
            return int(file.get_slice(stream).get_shape()[0])

    def finish_block(self, record: BlockRecord, tensors: dict[str, Tensor], streams: Streams) -> None:
        """Keeps a block's checkpoint tensors, what is known of it, and the hidden states that enter the next block."""
        write_atomically(self.shard(record.block), lambda path: save_tensors(path, tensors))
        self._write_record(self._block(record.block), record)
        ready = {name: hidden.contiguous() for name, hidden in vars(streams).items()}
        write_atomically(self._hidden, lambda path: save_tensors(path, ready, {"block": str(record.block + 1)}))

    def blocks(self) -> list[BlockRecord]:
        """The records of the finished blocks."""
        paths = [self._block(index) for index in range(self.position())]
        return [BlockRecord(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]

    def _block(self, index: int) -> Path:
        return self.directory / "blocks" / f"{index:05d}.json"

    def shard(self, index: int) -> Path:
        return self.directory / "shards" / f"{index:05d}.safetensors"

    def layer(self, name: str) -> tuple[StoredWeight, LayerRecord] | None:
        """A finished layer, or None."""
        if not self.has_layer(name):
            return None
        return load_layer(self.directory / "layers" / f"{name}.safetensors"), self.record(name)

    def has_layer(self, name: str) -> bool:
        return (self.directory / "layers" / f"{name}.json").exists()

    def record(self, name: str) -> LayerRecord:
        """The record of a finished layer."""
        return LayerRecord(**json.loads((self.directory / "layers" / f"{name}.json").read_text(encoding="utf-8")))

    def keep_layer(self, weight: StoredWeight, record: LayerRecord) -> None:
        path = self.directory / "layers" / f"{record.name}.safetensors"
        write_atomically(path, lambda scratch: save_layer(scratch, weight))
        self._write_record(self.directory / "layers" / f"{record.name}.json", record)

    def _write_record(self, path: Path, record: LayerRecord | BlockRecord) -> None:
        text = json.dumps(dataclasses.asdict(record))
        write_atomically(path, lambda scratch: _write(scratch, text))


def finished_blocks(directory: Path) -> int:
    """How far the workspace in a directory is; makes nothing there."""
    if not (directory / HIDDEN).exists():
        return 0
    with safe_open(directory / HIDDEN, framework="pt") as file:
        return int(file.metadata()["block"])


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")
