"""What a stage is, and what a command runs it with.

A `Stage` is a value: what decides its result (so its key in the store), how it is computed, and what that costs. A
`Context` runs stages: what the store has is reused as it is, and an interrupted stage continues where it was stopped.
`plan` builds the same stages and only asks them for keys and costs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from jointq_cli.errors import PeerProcessError
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.records import StageRecord
from jointq_cli.report.console.console import Console, StageTimer
from jointq_cli.stages.plan.costs import Cost, Workload
from jointq_cli.system.artifact_key import artifact_key
from jointq_cli.system.distributed import SINGLE_PROCESS, Team
from jointq_cli.system.files import translated_disk_errors
from jointq_cli.system.hash_cache import cache_hash
from jointq_cli.system.interrupts import deferred
from jointq_cli.system.settings import Runtime
from jointq_cli.system.store import Artifact, Store


@dataclass(frozen=True, eq=False)
class Stage:
    """One step of a command whose result the store keeps.

    name: as console and report show it. kind: what the store calls such artifacts. module: `__name__` of the module
    whose code computes it, for the code version. spec: the settings that decide the result. inputs: keys of stages and
    hashes of contents that it is computed from; None for one that is not known.

    make(scratch directory, context) computes the result. resumable and together: see `Store.reuse`. cost: of the whole
    stage. finished_blocks: how many blocks a scratch directory has finished.
    """

    name: str
    kind: str
    module: str
    spec: object
    inputs: tuple[str | None, ...]
    make: Callable[[Path, "Context"], None]
    cost: Callable[[Workload], Cost] = lambda workload: Cost()
    resumable: bool = False
    together: bool = False
    finished_blocks: Callable[[Path], int] = lambda scratch: 0

    @cached_property
    def key(self) -> str | None:
        """The key of its artifact; None where an input is not known."""
        known = [key for key in self.inputs if key is not None]
        return artifact_key(self.kind, self.spec, known, self.module) if len(known) == len(self.inputs) else None


@dataclass(frozen=True)
class Context:
    """What the stages of one command share. pause: called wherever stopping loses nothing; may raise Interrupted."""

    store: Store
    console: Console
    runtime: Runtime
    device: torch.device
    team: Team
    pause: Callable[[], None]
    records: list[StageRecord] = field(default_factory=list)  # of the stages so far

    def run(self, stage: Stage) -> Artifact:
        """The result of a stage, from the store or computed; announced and timed."""
        with self.timed(stage.name) as timer:
            artifact = self.reuse(stage)
            if artifact.reused:
                timer.reused()
            return artifact

    def reuse(self, stage: Stage) -> Artifact:
        """The result of a stage that is part of another step, which announces it."""
        return self.store.reuse(
            stage.kind,
            _key(stage),
            lambda scratch: stage.make(scratch, self),
            resumable=stage.resumable,
            together=stage.together,
        )

    def make_room(self, stage: Stage, budget: int, size: int) -> bool:
        """Whether the result of a stage may be kept: see `Store.make_room`."""
        return self.store.make_room(stage.kind, _key(stage), budget=budget, size=size)

    def directory(self, stage: Stage) -> Path:
        """Where the store keeps the result of a stage, once it has been run."""
        return self.store.path(stage.kind, _key(stage))

    def has(self, stage: Stage) -> bool:
        """Whether the store has the result of a stage; the same answer on all processes."""
        return self.team.broadcast_from_rank0(self.directory(stage).is_dir)

    def open_model(self, checkpoint: Checkpoint, trust_remote_code: bool) -> StreamedModel:
        """See the function of this name."""
        return open_model(checkpoint, self.runtime, self.device, trust_remote_code)

    def note_hash(self, place: Path, files: Sequence[Path], digest: str) -> None:
        """Notes what a model's files hash to, for plans, which read no weights."""
        self.team.on_rank0(cache_hash, self.store.root, place, files, digest)

    @contextmanager
    def timed(self, name: str) -> Iterator[StageTimer]:
        """Announces and times one step; stopping is safe at its end."""
        with self.console.stage(name) as timer:
            yield timer
        self.records.append(timer.record())
        self.pause()


@contextmanager
def open_context(store: str, runtime: Runtime, console: Console, team: Team) -> Iterator[Context]:
    """The context of a command, over the store in this directory. Inside, Ctrl-C and the like take effect at the next
    `pause`."""
    root = Path(store)
    with (
        deferred() as interrupts,
        translated_disk_errors(root),
        torch.no_grad(),
        Store(root, interrupts.raise_if_requested, console.note, team) as opened,
    ):
        try:
            yield Context(opened, console, runtime, use_device(runtime, team), team, interrupts.raise_if_requested)
        except PeerProcessError:  # a signal reaches all processes, and one of them has ended before this one noticed
            interrupts.raise_if_requested()
            raise


def use_device(runtime: Runtime, team: Team = SINGLE_PROCESS) -> torch.device:
    """The device that this process computes on. Also sets the number of threads."""
    device, threads = runtime.torch_device(team), runtime.threads(team)
    if threads is not None:
        torch.set_num_threads(threads)
    return device


def open_model(
    checkpoint: Checkpoint, runtime: Runtime, device: torch.device, trust_remote_code: bool
) -> StreamedModel:
    """A checkpoint's model in the dtype of the runtime settings. Reads no weight."""
    return StreamedModel(checkpoint, device, runtime.torch_dtype(checkpoint.dtype, device), trust_remote_code)


def windows_per_pass(runtime: Runtime, windows: Tensor) -> int:
    """How many of `windows` (windows, tokens) go through the model in one forward pass."""
    return max(1, runtime.batch_tokens // windows.shape[1])


def _key(stage: Stage) -> str:
    assert stage.key is not None, f"{stage.name}: run before its inputs were hashed"
    return stage.key
