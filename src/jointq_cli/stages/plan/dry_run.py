"""What a run would do, stage by stage: its own stage functions, asked of a store that is only looked at.

Reads configs, headers and texts; neither weights nor the hub. `estimates` says what a stage costs, `caveats` what may
be regretted; here both are brought together with what the machine has.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from jointq_cli.data.calibration import Calibration
from jointq_cli.data.text import HUB
from jointq_cli.data.token_file import Tokens
from jointq_cli.errors import ResourceError
from jointq_cli.evaluation.windows import Evaluation, ScoredWindows
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.sources import ModelSource, fetch
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.hessian_cache import Hessians
from jointq_cli.quantization.settings import LoopSettings
from jointq_cli.quantization.workspace import finished_blocks
from jointq_cli.recipe import Recipe
from jointq_cli.records import RunEstimate, StageEstimate
from jointq_cli.report.console.console import Console, Stage
from jointq_cli.stages import rotate as rotation_stages
from jointq_cli.stages.base import Quantized, Stages, selected_layers
from jointq_cli.stages.plan.costs import Cost, Windows, Workload, total
from jointq_cli.stages.plan.dry_store import Catalogue, NotRead, NotThere, Unread
from jointq_cli.stages.plan.model_sizes import shapes_of
from jointq_cli.stages.plan.preflight import caveats
from jointq_cli.stages.plan.throughput import measure_speeds
from jointq_cli.system import machine
from jointq_cli.system.files import nearest_existing
from jointq_cli.system.hash_cache import cached_hash
from jointq_cli.system.interrupts import Interrupts

ARTIFACTS = {
    "activations": "activations",
    "rotate": "rotated",
    "hessians": "hessians",
    "quantize": "quantize",
    "evaluate original": "hidden",
    "evaluate quantized": "scores",
}
"""Stage -> what it is called in the store, in the order of the road."""

LEAST_SHARE = 0.02  # of a stage whose blocks are all done: the checkpoint is to be written
EVALUATIONS = ("evaluate original", "evaluate quantized")
TO_MAKE, TO_FETCH, REUSED, UNKNOWN, ALWAYS = "to make", "to fetch", "reused", "unknown", "every run"
RUN_DIRECTORY = "run directory"
HUB_TOKENS = 300_000  # of an evaluation text that is not here yet: about WikiText-2's test split


@dataclass(frozen=True)
class StageStatus:
    """How far a stage is. share: of its work that is left."""

    state: str
    share: float


class Survey(Stages):
    """The stages of a run, none of which makes anything."""

    def __init__(self, recipe: Recipe) -> None:
        self.catalogue = Catalogue(Path(recipe.store))
        super().__init__(self.catalogue, Console(quiet=True), recipe.runtime, Interrupts())
        self.statuses: dict[str, StageStatus] = {}
        self.unread: Path | None = None  # whose weights no run has read yet
        self.unseen: str | None = None  # a hub's text for evaluation, which only runs ask for
        self._blocks = 1

    def source(self, model: ModelSource) -> Checkpoint:
        """Raises ResourceError where the model is not on this machine, or not converted yet."""
        try:
            return fetch(model, self.catalogue, self._hash_of, offline=True)
        except NotThere:
            raise ResourceError(
                f"model.path={model.path}: is to be converted first; nothing more can be told before a run has done it"
            ) from None

    def model(self, checkpoint: Checkpoint, source: ModelSource) -> StreamedModel:
        model = super().model(Unread(checkpoint.directory, self.catalogue.root), source)
        self._blocks = len(model)
        return model

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Notes how far the stage is, whatever becomes of it."""
        self.catalogue.found = None
        try:
            with super().stage(name) as stage:
                yield stage
        finally:
            self._note(name)

    def calibration(self, calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> Tokens | None:
        """None where they are a hub's that no run has fetched."""
        with suppress(NotThere):
            return self.calibration_tokens(calibration, tokenizer)
        self.statuses["calibration tokens"] = StageStatus(TO_FETCH, 1.0)
        return None

    def evaluation(self, evaluation: Evaluation, tokenizer: PreTrainedTokenizerBase) -> ScoredWindows | None:
        """None where the text is a hub's."""
        if evaluation.dataset in HUB and not evaluation.path:
            self.statuses["evaluation tokens"] = StageStatus(TO_FETCH, 1.0)
            self.unseen = f"evaluation.dataset={evaluation.dataset}"
            return None
        return self.evaluation_windows(evaluation, tokenizer)

    def look(
        self, recipe: Recipe, original: StreamedModel, tokens: Tokens | None, windows: ScoredWindows | None
    ) -> None:
        """Walks the road as far as it is known. Raises what the run would raise before computing."""
        selected_layers(original, recipe)
        quantized = self._quantized(recipe, original, tokens or _stand_in(recipe.calibration))
        if tokens is None:  # what the run would refuse is refused by now
            self._forget("activations", "rotate", "hessians", "quantize")
        if windows is None:
            return
        with self._as_far_as_known():
            hidden = self.final_hidden(original, windows)
            if quantized is not None and tokens is not None:
                self.score(original, hidden, quantized, windows, tokens, recipe)

    def _quantized(self, recipe: Recipe, original: StreamedModel, tokens: Tokens) -> Quantized | None:
        rotated = quantized = None
        with self._as_far_as_known():
            rotated = rotation_stages.rotate(self, original, tokens, recipe).model
        with self._as_far_as_known():
            # Yet to be rotated, a model has the shapes of the original: what the run would refuse is refused now.
            quantized = self.quantize(rotated or original, tokens, recipe)
        if rotated is None:
            self._forget("hessians", "quantize")
            return None
        return quantized

    @contextmanager
    def _as_far_as_known(self) -> Iterator[None]:
        try:
            yield
        except NotRead as error:
            self.unread = Path(str(error))
        except NotThere:
            pass

    def _forget(self, *names: str) -> None:
        """What was told of them is not of this run."""
        for name in names:
            self.statuses.pop(name, None)

    def _hash_of(self, file: Path) -> str:
        noted = cached_hash(self.catalogue.root, file, [file])
        if noted is None:
            raise NotRead(str(file))
        return noted

    def _note_hash(self, checkpoint: Checkpoint) -> None:
        """Nothing was read, and nothing is written."""

    def status(self, name: str) -> StageStatus:
        """Of a stage that was not come to: what it depends on is yet to be made, or its key is not known."""
        blind = self.unread or (self.unseen and name in EVALUATIONS)
        guessed = UNKNOWN if blind and self.catalogue.has_any(ARTIFACTS[name]) else TO_MAKE
        return self.statuses.get(name, StageStatus(guessed, 1.0))

    def _hessians(self, model: StreamedModel, tokens: Tokens, plan: LoopSettings, names: list[str]) -> Hessians | None:
        """Not opened: where they are yet to be made, quantising is too."""
        with suppress(NotThere):
            return super()._hessians(model, tokens, plan, names)
        return None

    def _note(self, name: str) -> None:
        found = self.catalogue.found
        if found is None:
            return
        if found.reused:
            self.statuses[name] = StageStatus(REUSED, 0.0)
        elif found.scratch is None:
            self.statuses[name] = StageStatus(TO_MAKE, 1.0)
        else:
            done = finished_blocks(found.scratch)
            at = f" at block {done + 1} of {self._blocks}" if 0 < done < self._blocks else " after all blocks"
            share = max(1.0 - done / self._blocks, LEAST_SHARE)
            self.statuses[name] = StageStatus(f"continues{at if done else ''}", share)


def _stand_in(calibration: Calibration) -> Tokens:
    """As many as are asked for."""
    return Tokens(torch.zeros(calibration.num_samples, calibration.seqlen, dtype=torch.int64), {})


def estimate_run(
    survey: Survey, recipe: Recipe, original: StreamedModel, tokens: Tokens | None, windows: ScoredWindows | None
) -> RunEstimate:
    """Every stage of the road with what is left of it and what that costs, and what speaks against beginning."""
    process = float(machine.peak_memory())  # before anything large: what the run's own process will be without stages
    load = _load(recipe, original, tokens, windows)
    prospects = _prospects(survey, recipe, load)
    work = total([cost for _, _, cost in prospects])
    on_gpu = original.device.type == "cuda"
    outlook = RunEstimate(
        stages=[
            StageEstimate(name, status.state, cost.seconds, cost.memory + (not on_gpu) * process, cost.disk)
            for name, status, cost in prospects
        ],
        seconds=work.seconds,
        memory=work.memory + (not on_gpu) * process,
        memory_there=torch.cuda.mem_get_info(original.device)[0] if on_gpu else machine.available_memory(),
        disk=work.disk,
        scratch=work.scratch,
        disk_there=machine.free_disk(Path(recipe.store)),
        warnings=[
            *survey.console.warnings,
            *caveats(
                recipe, original, load.shapes, load.calibration.tokens, int(windows.scored.sum()) if windows else None
            ),
        ],
        notes=_notes(survey, original, prospects),
    )
    return replace(outlook, warnings=[*outlook.warnings, *_shortages(outlook, recipe)])


def _load(recipe: Recipe, original: StreamedModel, tokens: Tokens | None, windows: ScoredWindows | None) -> Workload:
    shapes = shapes_of(original, selected_layers(original, recipe))
    calibration, evaluation = recipe.calibration, recipe.evaluation
    asked = Windows(calibration.num_samples, calibration.seqlen)
    most = max(1, HUB_TOKENS // evaluation.seqlen)
    guessed = Windows(min(evaluation.max_windows or most, most), evaluation.seqlen)
    return Workload(
        shapes=shapes,
        recipe=recipe,
        calibration=asked if tokens is None else Windows(*tokens.windows.shape),
        evaluation=guessed if windows is None else Windows(*windows.ids.shape),
        element=original.dtype.itemsize,
        dtype=original.checkpoint.dtype,
        speeds=measure_speeds(original.device, original.dtype, shapes.hidden, shapes.widest),
    )


def _prospects(survey: Survey, recipe: Recipe, load: Workload) -> list[tuple[str, StageStatus, Cost]]:
    """(stage, how far it is, what is left of its cost), in the order of the road."""
    always = StageStatus(ALWAYS, 1.0)
    wanted = load.collects_ahead and survey.status("quantize").state != REUSED
    rotates = recipe.rotation.parts or recipe.smoothing.places
    made = {
        "activations": load.activations() if rotates else None,
        "rotate": load.rotate() if rotates else None,
        "hessians": load.hessians() if wanted else None,
        "quantize": load.quantize(),
        "evaluate original": load.evaluate_original(),
        "evaluate quantized": load.evaluate_quantized(),
    }
    return [
        ("model", always, load.model()),
        ("calibration tokens", survey.statuses.get("calibration tokens", always), load.text(load.calibration)),
        ("evaluation tokens", survey.statuses.get("evaluation tokens", always), load.text(load.evaluation)),
        *(
            (name, status, cost.left(status.share))
            for name, cost in made.items()
            if cost is not None
            for status in [survey.status(name)]
        ),
        ("file hashes", always, load.file_hashes()),
        ("audit", always, load.audit()),
        (RUN_DIRECTORY, always, load.run_directory(linked=_one_disk(recipe))),
    ]


def _one_disk(recipe: Recipe) -> bool:
    """Whether run directories can be hard links to the store."""
    places = [nearest_existing(Path(place)) for place in (recipe.store, recipe.output_dir)]
    return len({place.stat().st_dev for place in places}) == 1


def _notes(survey: Survey, original: StreamedModel, prospects: list[tuple[str, StageStatus, Cost]]) -> list[str]:
    notes = []
    if any(status.state == UNKNOWN for _, status, _ in prospects):
        if survey.unread:
            notes.append(f"unknown until a run has read the weights once: what the store has of {survey.unread}")
        if survey.unseen:
            notes.append(f"unknown, since a plan asks no hub: what the store has of {survey.unseen}")
    if original.device.type == "cuda":
        notes.append("memory is that of the GPU; that of the process is not foreseen")
    return notes


def _shortages(outlook: RunEstimate, recipe: Recipe) -> list[str]:
    found = []
    if outlook.memory > outlook.memory_there:
        stage = max(outlook.stages, key=lambda stage: stage.memory).name
        runtime = recipe.runtime
        suspended = f"runtime.suspended_activations_gb={runtime.suspended_activations_gb:g}"
        keys = f"{suspended}, runtime.batch_tokens={runtime.batch_tokens}"
        found.append(
            f"{keys}: stage {stage} takes about {outlook.memory / 1e9:.3g} GB of memory, and "
            f"{outlook.memory_there / 1e9:.3g} GB are free; lower these, or calibration.num_samples"
        )
    copied = 0.0 if _one_disk(recipe) else next(stage.disk for stage in outlook.stages if stage.name == RUN_DIRECTORY)
    places = (
        ("store", recipe.store, outlook.disk - copied + outlook.scratch, outlook.disk_there),
        ("output_dir", recipe.output_dir, copied, machine.free_disk(Path(recipe.output_dir))),
    )
    for key, place, written, there in places:
        if written > there:
            found.append(
                f"{key}={place}: the run writes about {written / 1e9:.3g} GB there, and {there / 1e9:.3g} GB are free; "
                f"give {key}=DIR on another disk"
            )
    return found
