"""The model that a command starts from: downloaded or converted where needed, hashed, and free of NaN and Inf."""

from pathlib import Path

from jointq_cli.formats.export.unpack import unpack_checkpoint
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.gguf_file import GGUF_DTYPE, convert_gguf
from jointq_cli.models.skeleton import check_finite
from jointq_cli.models.sources import ModelSource, fetch
from jointq_cli.stages.base import Context, Stage
from jointq_cli.system.files import file_hash


def fetch_model(context: Context, source: ModelSource, *, packed: bool = False) -> Checkpoint:
    """The checkpoint that a recipe names; with `packed` also a quantised one, dequantised. Reads every byte: raises
    NumericsError for the first NaN or Inf in a tensor that the model uses."""

    def converted(place: Path) -> Path:
        if place.is_dir():
            found = Checkpoint(place, packed=True)
            return context.reuse(dequantization(found)).path
        digest = file_hash(place)
        context.note_hash(place, [place], digest)
        return context.reuse(conversion(place, digest)).path

    with context.timed("model"):
        checkpoint = fetch(source, converted, packed=packed)
        # Before any computing: a NaN in the last shard should not be found hours later.
        context.reuse(_verification(checkpoint, source.trust_remote_code))
        context.note_hash(checkpoint.directory, checkpoint.hashed_files, checkpoint.content_hash)
    return checkpoint


def conversion(file: Path, digest: str) -> Stage:
    """A GGUF file, of this sha256, as a directory of safetensors."""
    return Stage(
        name="model",
        kind="convert",
        spec={"dtype": str(GGUF_DTYPE)},
        inputs=(digest,),
        make=lambda scratch, context: convert_gguf(file, scratch),
    )


def dequantization(packed: Checkpoint) -> Stage:
    """A packed checkpoint as an ordinary one."""
    return Stage(
        name="model",
        kind="dequantized",
        spec={},
        inputs=(packed.content_hash, packed.companions_hash(code=True)),
        make=lambda scratch, context: unpack_checkpoint(packed.directory, scratch),
    )


def _verification(checkpoint: Checkpoint, trust_remote_code: bool) -> Stage:
    """That the weights of a checkpoint hold no NaN or Inf: an empty artifact. Which tensors are used depends on the
    model's code."""
    return Stage(
        name="model",
        kind="verified",
        spec={},
        inputs=(checkpoint.content_hash, *([checkpoint.code_hash] if trust_remote_code else [])),
        make=lambda scratch, context: check_finite(checkpoint, trust_remote_code),
    )
