"""The model that a command starts from: downloaded or converted where needed, hashed, and free of NaN and Inf."""

from pathlib import Path

import torch

from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.sources import GGUF_DTYPE, ModelSource, convert_gguf, fetch
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.stages.base import Context, Stage
from jointq_cli.system.hash_cache import cache_hash
from jointq_cli.system.settings import Runtime
from jointq_cli.system.tensor_files import file_hash


def fetch_model(context: Context, source: ModelSource) -> Checkpoint:
    """The checkpoint that a recipe names. Reads every byte: raises NumericsError for the first NaN or Inf."""

    def converted(file: Path) -> Path:
        digest = file_hash(file)
        context.team.on_rank0(cache_hash, context.store.root, file, [file], digest)
        return context.reuse(conversion(file, digest)).path

    with context.timed("model"):
        checkpoint = fetch(source, converted)
        # Before any computing: a NaN in the last shard should not be found hours later.
        context.reuse(_verification(checkpoint))
        note_hash(context, checkpoint)
    return checkpoint


def open_model(
    checkpoint: Checkpoint, runtime: Runtime, device: torch.device, trust_remote_code: bool
) -> StreamedModel:
    """A checkpoint's model in the dtype of the runtime settings. Reads no weight."""
    return StreamedModel(checkpoint, device, runtime.torch_dtype(checkpoint.dtype, device), trust_remote_code)


def note_hash(context: Context, checkpoint: Checkpoint) -> None:
    """Hashes a checkpoint, so that it can be an input of stages, and notes the hash for plans, which read no weight."""
    digest, files = checkpoint.content_hash, checkpoint.hashed_files
    context.team.on_rank0(cache_hash, context.store.root, checkpoint.directory, files, digest)


def conversion(file: Path, digest: str) -> Stage:
    """A GGUF file, of this sha256, as a directory of safetensors."""
    return Stage(
        name="model",
        kind="convert",
        module=__name__,
        spec={"dtype": str(GGUF_DTYPE)},
        inputs=(digest,),
        make=lambda scratch, context: convert_gguf(file, scratch),
    )


def _verification(checkpoint: Checkpoint) -> Stage:
    """That a checkpoint holds no NaN or Inf: an empty artifact."""
    return Stage(
        name="model",
        kind="verified",
        module=__name__,
        spec={},
        inputs=(checkpoint.content_hash,),
        make=lambda scratch, context: checkpoint.check_finite(),
    )
