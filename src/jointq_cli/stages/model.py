"""The model that a command starts from: downloaded or converted where needed, hashed, and free of NaN and Inf."""

from pathlib import Path

from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.gguf_file import GGUF_DTYPE, convert_gguf
from jointq_cli.models.skeleton import check_finite
from jointq_cli.models.sources import ModelSource, fetch
from jointq_cli.stages.base import Context, Stage
from jointq_cli.system.files import file_hash


def fetch_model(context: Context, source: ModelSource) -> Checkpoint:
    """The checkpoint that a recipe names. Reads every byte: raises NumericsError for the first NaN or Inf in a tensor
    that the model uses."""

    def converted(file: Path) -> Path:
        digest = file_hash(file)
        context.note_hash(file, [file], digest)
        return context.reuse(conversion(file, digest)).path

    with context.timed("model"):
        checkpoint = fetch(source, converted)
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
