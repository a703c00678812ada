"""Calibration windows that the model to be quantised writes itself: they need no text."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from jointq_cli.data.token_file import Tokens
from jointq_cli.data.tokenizer import tokenizer_hash
from jointq_cli.errors import ModelError, ResourceError
from jointq_cli.models.sampling import FAILURES, complete_bytes, sample
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.stages.base import Context, Stage
from jointq_cli.stages.plan.costs import Windows
from jointq_cli.system import machine
from jointq_cli.system.files import write_atomically
from jointq_cli.system.tensor_files import save_tensors

GENERATED = "generated tokens"
FILE = "windows.safetensors"
EXCERPT = 8  # of such a part of a window is the excerpt of a text that it continues
WINDOWS_AT_ONCE = 64  # written side by side; a stopped run continues behind the last that many


def generated_windows(
    context: Context,
    model: StreamedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seqlen: int,
    seed: int,
    text: Tokens | None = None,
) -> Tensor:
    """`count` windows (count, seqlen) int64 that the model writes; from the store where it has them. See
    `generated_stage`."""
    return read_generated(context.run(generated_stage(model, tokenizer, count, seqlen, seed, text)).path)


def generated_stage(
    model: StreamedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seqlen: int,
    seed: int,
    text: Tokens | None = None,
) -> Stage:
    """Windows drawn from the model's own distribution.

    With a text they continue excerpts of its windows in turn, an eighth of `seqlen` long. Without one each begins with
    a token drawn from the vocabulary without its special tokens (LLM-QAT, arXiv 2305.17888, section 3.1, without its
    greedy beginning).

    `make` raises ModelError where the model cannot write, and ResourceError where the memory does not hold it.
    """
    special = set(tokenizer.all_special_ids)
    vocabulary = min(len(tokenizer), model.module.config.get_text_config().vocab_size)
    first = torch.tensor([token for token in range(vocabulary) if token not in special])

    def make(scratch: Path, context: Context) -> None:
        check_memory(model, count, seqlen)
        batches = [slice(start, start + WINDOWS_AT_ONCE) for start in range(0, count, WINDOWS_AT_ONCE)]
        parts = [scratch / f"part{number}.safetensors" for number in range(len(batches))]
        with context.console.bar(GENERATED, total=count) as bar:
            for number, (batch, part) in enumerate(zip(batches, parts, strict=True)):
                size = len(range(count)[batch])
                if not part.exists():
                    own = _seed(seed, number)
                    draw = torch.Generator().manual_seed(own)
                    begin = first[torch.randint(len(first), (size, 1), generator=draw)]
                    if text is not None:
                        begin = _excerpts(text.windows, range(count)[batch], max(1, seqlen // EXCERPT), draw)
                    windows = _write(model, begin, seqlen, vocabulary, own)
                    _save(part, windows)
                    context.pause()
                bar.advance(size)
        windows = torch.cat([load_file(part)["windows"] for part in parts])
        _save(scratch / FILE, windows)
        for part in parts:
            part.unlink()

    return Stage(
        name=GENERATED,
        kind="windows",
        spec={
            "count": count,
            "seqlen": seqlen,
            "seed": seed,
            "dtype": str(model.dtype),
            "device": model.device.type,
        },
        inputs=(*model.identity, tokenizer_hash(tokenizer), *([] if text is None else [text.hash])),
        make=make,
        cost=lambda load: load.write(Windows(count, seqlen), WINDOWS_AT_ONCE, _memory(model, count, seqlen)),
        resumable=True,
    )


def read_generated(directory: Path) -> Tensor:
    """The result of `generated_stage`."""
    return load_file(directory / FILE)["windows"]


def _memory(model: StreamedModel, count: int, seqlen: int) -> float:
    return complete_bytes(model, min(count, WINDOWS_AT_ONCE), seqlen)


def _save(path: Path, windows: Tensor) -> None:
    write_atomically(path, lambda scratch: save_tensors(scratch, {"windows": windows}))


def check_memory(model: StreamedModel, count: int, seqlen: int) -> None:
    """Raises ResourceError where there is too little memory for the complete model."""
    on_gpu = model.device.type == "cuda"
    free = torch.cuda.mem_get_info(model.device)[0] if on_gpu else machine.available_memory()
    needed = _memory(model, count, seqlen)
    if needed > free:
        raise ResourceError(
            f"a model that writes windows is in memory as a whole, needing {needed / 1e9:.3g} GB, and "
            f"{free / 1e9:.3g} GB are free; take calibration.tokens=FILE that `jointq calibrate` wrote, without "
            "calibration.dataset=generated, calibration.add_generated and refinement.generated"
        )


def _seed(seed: int, batch: int) -> int:
    """Of one batch; those of neighbouring seeds differ."""
    return int.from_bytes(hashlib.sha256(f"{seed} {batch}".encode()).digest()[:8]) >> 1


def _excerpts(windows: Tensor, numbers: range, length: int, generator: torch.Generator) -> Tensor:
    """Of the windows of these numbers, taken in turn, `length` tokens each from a random position."""
    length = min(length, windows.shape[1])
    starts = torch.randint(windows.shape[1] - length + 1, (len(numbers),), generator=generator).tolist()
    pairs = zip(numbers, starts, strict=True)
    return torch.stack([windows[number % len(windows), start : start + length] for number, start in pairs])


def _write(model: StreamedModel, begin: Tensor, seqlen: int, vocabulary: int, seed: int) -> Tensor:
    generator = torch.Generator(model.device).manual_seed(seed)
    try:
        return sample(model, begin, seqlen, vocabulary, generator)
    except torch.OutOfMemoryError:  # on another day there may be enough
        raise
    except FAILURES as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ModelError(
            f"calibration: {type(model.module).__name__} cannot write its own text in transformers ({reason}); take "
            "another text"
        ) from error
