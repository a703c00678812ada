"""Windows of tokens, and the file that freezes them for a machine without a network connection.

How windows are cut from text is in `calibration`.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from jointq_cli.data.tokenizer import tokenizer_hash
from jointq_cli.errors import TextError
from jointq_cli.system.files import check_utf8, translated_disk_errors, write_atomically

if TYPE_CHECKING:  # transformers takes more than a second to import
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Tokens:
    """Calibration windows (num_samples, seqlen) int64, and where they come from."""

    windows: Tensor
    provenance: dict[str, str]

    @cached_property
    def hash(self) -> str:
        """sha256 of shape and ids, 64 hex digits."""
        digest = hashlib.sha256(repr(tuple(self.windows.shape)).encode())
        digest.update(self.windows.contiguous().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def warning(self) -> str:
        """A warning about the windows to show to the user; empty if there is none."""
        return self.provenance.get("warning", "")

    @property
    def generated(self) -> int:
        """How many windows, the last ones, a model has written."""
        return int(self.provenance.get("generated", 0))

    def with_generated(self, windows: Tensor, origin: dict[str, str]) -> "Tokens":
        """These and windows that a model has written. origin: which model, and how."""
        count, added = len(self.windows) + len(windows), self.generated + len(windows)
        numbers = {"num_samples": str(count), "generated": str(added)}
        return Tokens(torch.cat([self.windows, windows]), {**self.provenance, **origin, **numbers})

    def describe(self) -> str:
        """A line such as "pydoc/calibration 128 x 512 tokens concat_chunk seed 0 tokens=0123456789abcdef"."""
        origin = self.provenance
        count, seqlen = self.windows.shape
        text = f"{origin['dataset']}/{origin['split']} {count} x {seqlen} tokens"
        text += " through the chat template" if "chat_template_sha256" in origin else ""
        text += f" ({self.generated} generated)" if 0 < self.generated < count else ""
        return f"{text} {origin['strategy']} seed {origin['seed']} tokens={self.hash[:16]}"


def save_tokens(path: Path, tokens: Tokens) -> None:
    """Writes `tokens` as safetensors with the tensor `windows`, and the provenance as JSON; the same bytes each time.

    Raises ResourceError when the file cannot be written.
    """
    # One metadata key only: safetensors writes several in no fixed order.
    metadata = {"provenance": json.dumps(tokens.provenance, sort_keys=True)}
    content = save({"windows": tokens.windows.contiguous()}, metadata)
    with translated_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda scratch: _write(scratch, content))


def load_tokens(path: Path, tokenizer: "PreTrainedTokenizerBase | None") -> Tokens:
    """Reads what `save_tokens` wrote. With a tokenizer, the tokens must be that tokenizer's.

    Raises TextError when the file is missing, is not of this kind, or belongs to another tokenizer.
    """
    windows, provenance = _read_frozen(path)
    if windows.dtype != torch.int64 or windows.dim() != 2 or not windows.numel():
        shape = f"{windows.dtype} of shape {tuple(windows.shape)}"
        raise _bad_file(path, f"windows must be int64 of shape (number, tokens), not {shape}")
    if tokenizer is not None:
        _check_tokenizer(path, windows, provenance, tokenizer)
    return Tokens(windows, provenance)


def _read_frozen(path: Path) -> tuple[Tensor, dict[str, str]]:
    if not path.is_file():
        raise _bad_file(path, "no such file")
    check_utf8(path)
    try:
        with safe_open(path, framework="pt") as file:
            provenance = json.loads((file.metadata() or {})["provenance"])
            return file.get_tensor("windows"), {str(key): str(value) for key, value in provenance.items()}
    except OSError as error:
        raise _bad_file(path, f"cannot be read ({error.strerror or error})") from error
    except (SafetensorError, KeyError, ValueError, AttributeError) as error:
        rule = "is not a file of frozen tokens, as `jointq calibrate` writes them"
        raise _bad_file(path, rule) from error


def _check_tokenizer(
    path: Path, windows: Tensor, provenance: dict[str, str], tokenizer: "PreTrainedTokenizerBase"
) -> None:
    theirs, ours = provenance.get("tokenizer_sha256", "unknown"), tokenizer_hash(tokenizer)
    if theirs != ours:
        raise _bad_file(path, f"was made with tokenizer {theirs[:16]}, but the model's is {ours[:16]}")
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= len(tokenizer):
        last = len(tokenizer) - 1
        raise _bad_file(path, f"has ids from {low} to {high}, but the tokenizer knows 0 to {last}")


def _bad_file(path: Path, rule: str) -> TextError:
    return TextError(f"calibration.tokens={path}: {rule}")


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
