"""The tokenizer of a checkpoint: loaded from its directory, and identified by what decides its ids."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jointq_cli.errors import ModelError

if TYPE_CHECKING:  # transformers takes more than a second to import
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(directory: Path, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint directory; never from the hub. Raises ModelError when there is none."""
    from transformers import AutoTokenizer

    if not any(directory.glob("*token*")) and not (directory / "vocab.json").is_file():
        raise ModelError(f"{directory}: has no tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=trust_remote_code, local_files_only=True
        )
    # A damaged file raises whatever its parser raises; the Rust parser raises plain Exception.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{directory}: the tokenizer cannot be loaded ({reason})") from error
    # Without a vocabulary file, transformers builds a tokenizer of the special tokens alone.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ModelError(f"{directory}: the tokenizer has no vocabulary; its tokenizer.json is missing")
    return tokenizer


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """sha256, 64 hex digits, of everything that decides how a text is encoded; independent of paths.

    Excludes names, the chat template, and padding and truncation, which jointq never uses.
    """
    state = {"rules": _rules(tokenizer), "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _rules(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python: its vocabulary, and the special tokens it adds
        around = tokenizer("a", verbose=False)["input_ids"]
        return {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), "around": around}
    rules: dict[str, Any] = json.loads(backend.to_str())
    return {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
