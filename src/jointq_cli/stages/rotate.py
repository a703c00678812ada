"""The part of the road before quantising: activations -> rotated model, both artifacts of the store.

All rotations of a sweep learn from the same activations, and all quantizers start from the same rotated model.
"""

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from jointq_cli.data.token_file import Tokens
from jointq_cli.errors import ConfigError
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.recipe import Recipe
from jointq_cli.records import RotationRecord, RotationTraining
from jointq_cli.report import encode, load_record
from jointq_cli.stages.base import Stages, mark
from jointq_cli.system.files import file_hash, write_atomically
from jointq_cli.system.store import Artifact
from jointq_cli.system.tensor_files import save_tensors
from jointq_cli.transforms.activation_metrics import measure_sites
from jointq_cli.transforms.activation_samples import Reservoir, collect
from jointq_cli.transforms.architectures import Anatomy, examine
from jointq_cli.transforms.basis import Basis, RotatedCheckpoint
from jointq_cli.transforms.learning import Watch
from jointq_cli.transforms.merge_check import PROBE, check, write_rotated
from jointq_cli.transforms.solve import constructions, find_basis

LEAST_TOKENS = 64  # of which an eighth is measured with
_RECORD = "rotation.json"
_TENSORS = "rotation.safetensors"
_COURSES = "courses.json"


@dataclass(frozen=True)
class Rotated:
    """What is quantised: the model in its new basis, and the record of that; or the original, and no record."""

    model: StreamedModel
    record: RotationRecord | None = None
    directory: Path | None = None  # rotation.json, rotation.safetensors, checkpoint/


def rotate(stages: Stages, original: StreamedModel, tokens: Tokens, recipe: Recipe) -> Rotated:
    """The model smoothed and rotated as the recipe says, at full precision.

    Raises ModelError, before any computing, where the architecture does not admit it.
    """
    if not (recipe.rotation.parts or recipe.smoothing.places):
        return Rotated(original)
    anatomy = examine(original, r1="R1" in recipe.rotation.parts)
    activations = _activations(stages, original, anatomy, tokens, recipe)
    code = recipe.model.trust_remote_code
    spec = {
        "rotation": recipe.rotation,
        "smoothing": recipe.smoothing,
        "dtype": str(original.dtype),
        "device": stages.device.type,
    }

    def make(scratch: Path) -> None:
        reservoir = Reservoir(activations.path, len(original))
        basis, courses = _basis(stages, original, anatomy, recipe, reservoir, scratch)
        target = scratch / "checkpoint"
        target.mkdir(exist_ok=True)
        rotated = RotatedCheckpoint(original, anatomy, basis, target, code=code)
        probe = tokens.windows[:1, :PROBE]
        with stages.console.bar("rotate", total=len(original)) as bar:

            def on_block() -> None:
                bar.advance()
                stages.pause()

            merged = write_rotated(rotated, probe, code, on_block)
        invariance = check(original, target, merged, probe, code)
        record = RotationRecord(
            rotation=recipe.rotation.describe(),
            smoothing=recipe.smoothing.describe(),
            constructions=constructions(anatomy, recipe.rotation),
            orthogonality_error=basis.orthogonality_error,
            hash=file_hash(scratch / _TENSORS),
            online=["R4"] if basis.r4 else [],
            courses=courses,
            sites=measure_sites(basis, reservoir, rotated.gains),
            invariance=invariance,
            source_bytes=original.checkpoint.weight_bytes,
            rotated_bytes=Checkpoint(target).weight_bytes,
        )
        (scratch / _RECORD).write_text(encode(record), encoding="utf-8")

    with stages.stage("rotate") as stage:
        companions = original.checkpoint.companions_hash(code=code)
        inputs = [original.checkpoint.content_hash, companions, activations.key]
        artifact = stages.store.reuse("rotated", spec, inputs, make, resumable=True)
        mark(stage, artifact)
        record: RotationRecord = load_record(RotationRecord, artifact.path / _RECORD)
        model = stages.model(Checkpoint(artifact.path / "checkpoint"), recipe.model)
        return Rotated(model, record, artifact.path)


def _activations(stages: Stages, model: StreamedModel, anatomy: Anatomy, tokens: Tokens, recipe: Recipe) -> Artifact:
    """A few activations of every site of the original model."""
    sampled, batch = recipe.rotation.sampled_tokens, stages.batch(tokens.windows)
    if tokens.windows.numel() < LEAST_TOKENS:
        raise ConfigError(
            f"calibration.num_samples={len(tokens.windows)}: must make at least {LEAST_TOKENS} tokens for a rotation, "
            f"not {tokens.windows.numel()}"
        )

    def make(scratch: Path) -> None:
        with stages.console.bar("activations", total=len(model)) as bar:
            reservoir = Reservoir(scratch, len(model))
            collect(model, anatomy, tokens.windows, batch, sampled, reservoir, bar.advance, stages.pause)

    with stages.stage("activations") as stage:
        spec = {"tokens": sampled, "batch": batch, "dtype": str(model.dtype), "device": stages.device.type}
        artifact = stages.store.reuse("activations", spec, [*model.identity, tokens.hash], make)
        mark(stage, artifact)
        return artifact


def _basis(
    stages: Stages, model: StreamedModel, anatomy: Anatomy, recipe: Recipe, reservoir: Reservoir, scratch: Path
) -> tuple[Basis, list[RotationTraining]]:
    """What was found before a kill is not looked for again."""
    kept, courses = scratch / _TENSORS, scratch / _COURSES
    if not kept.exists():
        watch = Watch(stages.console.bar, stages.pause)
        basis, found = find_basis(model, anatomy, recipe.rotation, recipe.smoothing, reservoir, watch)
        courses.write_text(encode(found), encoding="utf-8")
        write_atomically(kept, lambda path: save_tensors(path, basis.tensors()))
    basis = Basis(**load_file(kept), r4="R4" in recipe.rotation.parts)
    return basis, load_record(list[RotationTraining], courses)
