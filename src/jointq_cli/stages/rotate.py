"""The model smoothed and rotated at full precision: all quantizers of a sweep start from the same one."""

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from jointq_cli.data.token_file import Tokens
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.records import RotationRecord, RotationTraining
from jointq_cli.stages.activations import activations_stage
from jointq_cli.stages.base import Context, Stage, windows_per_pass
from jointq_cli.stages.plan.costs import Workload
from jointq_cli.system.files import file_hash, write_atomically
from jointq_cli.system.record_json import encode, load_record
from jointq_cli.system.tensor_files import save_tensors
from jointq_cli.transforms.activation_metrics import measure_sites
from jointq_cli.transforms.activation_samples import ActivationSamples
from jointq_cli.transforms.architectures import ArchitectureLayout, layout_of
from jointq_cli.transforms.basis import Basis, RotatedTensors
from jointq_cli.transforms.learning import Progress
from jointq_cli.transforms.merge_check import PROBE_TOKENS, check_invariance, write_rotated
from jointq_cli.transforms.settings import Rotation, Smoothing, changes_basis
from jointq_cli.transforms.solve import hadamard_constructions, solve_basis

_RECORD = "rotation.json"
_TENSORS = "rotation.safetensors"
_TRAINING = "training.json"


@dataclass(frozen=True)
class Rotated:
    """The model to quantise: the rotated one and its record, or the original and no record."""

    model: StreamedModel
    record: RotationRecord | None = None
    directory: Path | None = None  # holds rotation.json, rotation.safetensors and checkpoint/


def rotate(
    context: Context, original: StreamedModel, tokens: Tokens, rotation: Rotation, smoothing: Smoothing
) -> Rotated:
    """Runs `rotation_stages`, if these settings change anything."""
    if not changes_basis(rotation, smoothing):
        return Rotated(original)
    batch = windows_per_pass(context.runtime, tokens.windows)
    activations, stage = rotation_stages(original, tokens, rotation, smoothing, batch)
    context.run(activations)
    directory = context.run(stage).path
    record: RotationRecord = load_record(RotationRecord, directory / _RECORD)
    model = context.open_model(rotated_checkpoint(directory), original.trust_remote_code)
    return Rotated(model, record, directory)


def rotation_stages(
    original: StreamedModel, tokens: Tokens, rotation: Rotation, smoothing: Smoothing, batch: int
) -> tuple[Stage, Stage]:
    """The stages activations and rotate; batch: windows per forward pass.

    Raises ModelError where the architecture cannot be rotated like this, ConfigError for too few tokens.
    """
    layout = layout_of(original, r1="R1" in rotation.parts)
    activations = activations_stage(original, layout, tokens, rotation.sampled_tokens, batch)
    return activations, _rotate_stage(original, layout, tokens, rotation, smoothing, activations)


def rotated_checkpoint(directory: Path) -> Checkpoint:
    """The model that the rotate stage has written into a directory."""
    return Checkpoint(directory / "checkpoint")


def _rotate_stage(
    original: StreamedModel,
    layout: ArchitectureLayout,
    tokens: Tokens,
    rotation: Rotation,
    smoothing: Smoothing,
    activations: Stage,
) -> Stage:
    code = original.trust_remote_code

    def make(scratch: Path, context: Context) -> None:
        samples = ActivationSamples(context.directory(activations), len(original))
        basis, training = _basis(context, original, layout, rotation, smoothing, samples, scratch)
        target = scratch / "checkpoint"
        target.mkdir(exist_ok=True)
        rotated = RotatedTensors(original, layout, basis, target)
        probe = tokens.windows[:1, :PROBE_TOKENS]
        with context.console.bar("rotate", total=len(original)) as bar:

            def on_block() -> None:
                bar.advance()
                context.pause()

            merged = write_rotated(rotated, probe, on_block)
        invariance = check_invariance(original, target, merged, probe)
        record = RotationRecord(
            rotation=rotation.describe(),
            smoothing=smoothing.describe(),
            constructions=hadamard_constructions(layout, rotation),
            orthogonality_error=basis.orthogonality_error,
            hash=file_hash(scratch / _TENSORS),
            online=["R4"] if basis.r4 else [],
            courses=training,
            sites=measure_sites(basis, samples, rotated.gains),
            invariance=invariance,
            source_bytes=original.checkpoint.weight_bytes,
            rotated_bytes=Checkpoint(target).weight_bytes,
        )
        (scratch / _RECORD).write_text(encode(record), encoding="utf-8")

    return Stage(
        name="rotate",
        kind="rotated",
        spec={
            "rotation": rotation,
            "smoothing": smoothing,
            "dtype": str(original.dtype),
            "device": original.device.type,
        },
        inputs=(original.checkpoint.known_hash, original.checkpoint.companions_hash(code=code), activations.key),
        make=make,
        cost=Workload.rotate,
        resumable=True,
    )


def _basis(
    context: Context,
    model: StreamedModel,
    layout: ArchitectureLayout,
    rotation: Rotation,
    smoothing: Smoothing,
    samples: ActivationSamples,
    scratch: Path,
) -> tuple[Basis, list[RotationTraining]]:
    """The basis, and how its learned parts were trained; read from `scratch` if an interrupted run has left them."""
    tensors, records = scratch / _TENSORS, scratch / _TRAINING
    if not tensors.exists():
        progress = Progress(context.console.bar, context.pause)
        basis, training = solve_basis(model, layout, rotation, smoothing, samples, progress)
        records.write_text(encode(training), encoding="utf-8")
        write_atomically(tensors, lambda path: save_tensors(path, basis.tensors()))
    basis = Basis(**load_file(tensors), r4="R4" in rotation.parts)
    return basis, load_record(list[RotationTraining], records)
