"""Event files for TensorBoard, by torch's writer. `tensorboard --logdir runs` finds those of all runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jointq_cli.tracking.base import Tracker, Tracking

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"  # in the run directory


@dataclass(frozen=True)
class TensorboardTracking(Tracking):
    name = "tensorboard"
    module = "tensorboard"

    def open(self, run: str, sweep: str, directory: Path) -> Tracker:
        from torch.utils.tensorboard import SummaryWriter  # not every torch is installed with tensorboard

        return TensorboardRun(SummaryWriter(str(directory / FOLDER)))


class TensorboardRun(Tracker):
    """Files other than text are not copied: they lie beside the events."""

    def __init__(self, writer: "SummaryWriter") -> None:
        self._writer = writer
        self._parameters: dict[str, str] = {}
        self._figures: dict[str, float] = {}

    def parameters(self, values: Mapping[str, str]) -> None:
        self._parameters = dict(values)
        rows = "".join(f"| {key} | {value} |\n" for key, value in values.items())
        self._writer.add_text("recipe", f"| key | value |\n|---|---|\n{rows}")

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def figures(self, values: Mapping[str, float]) -> None:
        self._figures.update(values)

    def files(self, paths: Sequence[Path]) -> None:
        for path in paths:
            if path.suffix == ".md":
                self._writer.add_text(path.stem, path.read_text(encoding="utf-8"))

    def close(self, problem: str) -> None:
        if problem:
            self._writer.add_text("problem", problem)
        # For the tab HParams, which compares runs; a second call would be a second run there.
        self._writer.add_hparams(dict(self._parameters), dict(self._figures), run_name=".")
        self._writer.close()
