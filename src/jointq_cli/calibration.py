"""From text to tokens: the windows that a model is calibrated on, and the one long text it is evaluated on.

Knows tokenizers, how windows are cut, and the file in which they are frozen. Knows no model and no device,
and not where text comes from. No padding anywhere: a window is `seqlen` consecutive tokens of real text.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from jointq_cli.errors import ConfigError, ModelError, ResourceError, TextError
from jointq_cli.statistics import TokenWeights
from jointq_cli.text import Corpus, TextSource, read, text_hash

if TYPE_CHECKING:  # transformers takes more than a second to import
    from transformers import PreTrainedTokenizerBase

INPUTS: Final = ("original", "quantized")
WEIGHTINGS: Final = ("uniform", "input", "residual")
# How much of a practically endless text is looked at, in multiples of the tokens that are asked for.
CONCAT_POOL: Final = 4  # concat_rand draws from so much
DROP_POOL: Final = 64  # drop_* give up after so much


@dataclass(frozen=True)
class Calibration(TextSource):
    """Which text statistics are taken from, and how `num_samples` windows of `seqlen` tokens are cut from it.

    strategy:
      concat_chunk  all documents one after another, in consecutive windows, the first num_samples of them
      concat_rand   all documents one after another, windows at random, distinct places (they may overlap)
      drop_head     the first seqlen tokens of each document that has as many; the shorter ones are dropped
      drop_rand     like drop_head, from a random place in each document
    drop_head and drop_rand take the first num_samples documents that are long enough. Windows come in the
    order of the text, except in concat_rand. Of C4 on the hub, concat_rand sees the first
    4 x num_samples x seqlen tokens.

    Where one document ends and the next begins: each is encoded as the tokenizer encodes a fresh text (most
    Llamas: a BOS in front). A tokenizer that adds nothing gets its EOS behind each document when they are
    concatenated, one without EOS a blank line. WikiText-2 consists of lines, not of documents: concatenation
    joins them with a blank line and encodes them at once, as GPTQ does.

    tokens: a file of frozen tokens to use instead of the text; seqlen must be that of the file, and its first
    num_samples windows are taken. inputs: original, or quantized, which is what a layer sees behind layers
    that have already been quantised. token_weighting, token_power, first_token_weight: see statistics.TokenWeights.

    A text that gives fewer than num_samples windows is used with a warning, one that gives none is an error.
    """

    num_samples: int
    seqlen: int
    seed: int
    strategy: str
    tokens: str | None
    inputs: str
    token_weighting: str
    token_power: float
    first_token_weight: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_samples < 1:
            raise ConfigError(f"calibration.num_samples={self.num_samples}: must be at least 1")
        if self.seqlen < 1:
            raise ConfigError(f"calibration.seqlen={self.seqlen}: must be at least 1 token")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"calibration.seed={self.seed}: must be from 0 to 2^63 - 1")
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"calibration.strategy={self.strategy}: must be one of {', '.join(STRATEGIES)}")
        if self.inputs not in INPUTS:
            raise ConfigError(f"calibration.inputs={self.inputs}: must be one of {', '.join(INPUTS)}")
        if self.token_weighting not in WEIGHTINGS:
            raise ConfigError(
                f"calibration.token_weighting={self.token_weighting}: must be one of {', '.join(WEIGHTINGS)}"
            )
        for name in ("token_power", "first_token_weight"):
            value = getattr(self, name)
            if not 0 <= value <= 4:  # beyond, float32 runs out of range
                raise ConfigError(f"calibration.{name}={value}: must be from 0 to 4")

    @property
    def weights(self) -> TokenWeights:
        return TokenWeights(self.token_weighting, self.token_power, self.first_token_weight)

    def describe(self) -> str:
        """The windows that are asked for, as `Tokens` tells of those that there are."""
        text = f"{self.dataset}/{self.split} {self.num_samples} x {self.seqlen} tokens"
        return f"{text} {self.strategy} seed {self.seed}"

    def describe_use(self) -> str:
        """What the statistics are made of, such as "inputs=quantized token_weighting=residual^-2"."""
        told = [f"inputs={self.inputs}"]
        if self.token_weighting != "uniform":
            told.append(f"token_weighting={self.token_weighting}^-{self.token_power:g}")
        told += [f"first_token_weight={self.first_token_weight:g}"] if self.first_token_weight != 1 else []
        return " ".join(told)

    def of_tokens_alone(self) -> "Calibration":
        """The same tokens, with nothing said about what becomes of them."""
        return replace(self, inputs="original", token_weighting="uniform", token_power=0.0, first_token_weight=1.0)


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
        """What a person should know before trusting the windows; empty where there is nothing."""
        return self.provenance.get("warning", "")

    def describe(self) -> str:
        """A line such as "pydoc/calibration 128 x 512 tokens concat_chunk seed 0 tokens=0123456789abcdef"."""
        told = self.provenance
        count, seqlen = self.windows.shape
        text = f"{told['dataset']}/{told['split']} {count} x {seqlen} tokens"
        return f"{text} {told['strategy']} seed {told['seed']} tokens={self.hash[:16]}"


def calibration_tokens(config: Calibration, tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    """The windows that `config` asks for; the same ones whenever text, tokenizer and seed are the same.

    Raises TextError when the text has not one window or a frozen file does not fit, and what `text.read`
    raises.
    """
    if config.tokens is not None:
        return _frozen(config, tokenizer)
    reading = Reading(read(config), tokenizer)
    generator = torch.Generator().manual_seed(config.seed)
    windows = STRATEGIES[config.strategy](reading, config, generator)
    provenance = {
        **reading.provenance(),
        "strategy": config.strategy,
        "seed": str(config.seed),
        "num_samples": str(len(windows)),
        "seqlen": str(config.seqlen),
    }
    if warning := _warning(config, len(windows), reading):
        provenance["warning"] = warning
    return Tokens(windows, provenance)


def evaluation_ids(source: TextSource, tokenizer: "PreTrainedTokenizerBase") -> tuple[Tensor, dict[str, str]]:
    """The whole text as ids (tokens,) int64, encoded once, and its provenance.

    Documents are joined by a blank line (C4, as in GPTQ: the first 1100 by a space). Neither BOS nor EOS is
    added: that is for the protocol to say. Raises TextError for an empty text, and what `text.read` raises.
    """
    reading = Reading(read(source), tokenizer)
    ids = reading.running_text(special=False)
    if not len(ids):
        raise TextError(f"{source.section}: {source.dataset}/{source.split} has no text")
    return ids, reading.provenance()


class Reading:
    """A corpus while it is read through a tokenizer, with the account of what has been read so far."""

    def __init__(self, corpus: Corpus, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.taken: list[str] = []
        self.tokens = 0
        self.longest = 0  # tokens of the longest piece

    def documents(self) -> Iterator[Tensor]:
        """Each document by itself, ids (tokens,) int64, as the tokenizer encodes a fresh text."""
        for text in self._texts(None):
            yield self._counted(self._encode(text, special=True))

    def stream(self) -> Iterator[Tensor]:
        """Pieces whose concatenation is the text as one sequence; document ends as `Calibration` says."""
        if self.corpus.running:
            yield self.running_text(special=True)
            return
        separator = self._separator()
        for text in self._texts(None):
            yield self._counted(torch.cat([self._encode(text, special=True), separator]))

    def running_text(self, special: bool) -> Tensor:
        """All that belongs into an evaluation text, joined and encoded at once: ids (tokens,) int64."""
        joined = self.corpus.joint.join(self._texts(self.corpus.evaluated))
        return self._counted(self._encode(joined, special))

    def provenance(self) -> dict[str, str]:
        return {
            **self.corpus.origin,
            "documents": str(len(self.taken)),
            "text_tokens": str(self.tokens),
            "text_sha256": text_hash(self.taken),
            "tokenizer_sha256": tokenizer_hash(self.tokenizer),
        }

    def _texts(self, limit: int | None) -> Iterator[str]:
        for text in self.corpus.documents:
            self.taken.append(text)
            yield text
            if limit is not None and len(self.taken) >= limit:
                return

    def _counted(self, ids: Tensor) -> Tensor:
        self.tokens += len(ids)
        self.longest = max(self.longest, len(ids))
        return ids

    def _separator(self) -> Tensor:
        """What stands behind each document: nothing where the tokenizer itself marks beginning or end."""
        if self.tokenizer.num_special_tokens_to_add(pair=False):
            return torch.empty(0, dtype=torch.int64)
        if self.tokenizer.eos_token_id is not None:
            return torch.tensor([self.tokenizer.eos_token_id])
        return self._encode("\n\n", special=False)

    def _encode(self, text: str, special: bool) -> Tensor:
        # verbose=False: being longer than the model's context is the point, not a reason to warn.
        encoded = self.tokenizer(text, add_special_tokens=special, truncation=False, padding=False, verbose=False)
        return torch.tensor(encoded["input_ids"], dtype=torch.int64)


# --- strategies: (reading, config, generator) -> windows (num_samples or fewer, seqlen) int64


def concat_chunk(reading: Reading, config: Calibration, generator: torch.Generator) -> Tensor:
    """Consecutive windows from the start of the text; reads no further than it must."""
    ids = _concatenated(reading, config.num_samples * config.seqlen)
    count = min(config.num_samples, len(ids) // config.seqlen)
    if not count:
        raise _too_short(config, reading)
    return ids[: count * config.seqlen].reshape(count, config.seqlen)


def concat_rand(reading: Reading, config: Calibration, generator: torch.Generator) -> Tensor:
    """Windows at distinct random places of the whole text."""
    limit = CONCAT_POOL * config.num_samples * config.seqlen if reading.corpus.streamed else None
    ids = _concatenated(reading, limit)
    places = len(ids) - config.seqlen + 1
    if places < 1:
        raise _too_short(config, reading)
    starts = torch.randperm(places, generator=generator)[: config.num_samples].tolist()
    return torch.stack([ids[start : start + config.seqlen] for start in starts])


def drop_head(reading: Reading, config: Calibration, generator: torch.Generator) -> Tensor:
    """The beginnings of the documents that are long enough."""
    return torch.stack([ids[: config.seqlen] for ids in _long_documents(reading, config)])


def drop_rand(reading: Reading, config: Calibration, generator: torch.Generator) -> Tensor:
    """A random stretch of each document that is long enough."""
    windows = []
    for ids in _long_documents(reading, config):
        start = int(torch.randint(len(ids) - config.seqlen + 1, (), generator=generator))
        windows.append(ids[start : start + config.seqlen])
    return torch.stack(windows)


Strategy = Callable[[Reading, Calibration, torch.Generator], Tensor]
STRATEGIES: Final[dict[str, Strategy]] = {
    strategy.__name__: strategy for strategy in (concat_chunk, concat_rand, drop_head, drop_rand)
}


def _concatenated(reading: Reading, limit: int | None) -> Tensor:
    """The text as one sequence, (tokens,) int64: all of it, or as many documents as reach `limit` tokens."""
    pieces = [torch.empty(0, dtype=torch.int64)]
    for ids in reading.stream():
        pieces.append(ids)
        if limit is not None and reading.tokens >= limit:
            break
    return torch.cat(pieces)


def _long_documents(reading: Reading, config: Calibration) -> list[Tensor]:
    kept: list[Tensor] = []
    limit = DROP_POOL * config.num_samples * config.seqlen if reading.corpus.streamed else None
    for ids in reading.documents():
        if len(ids) >= config.seqlen:
            kept.append(ids)
        if len(kept) == config.num_samples or (limit is not None and reading.tokens >= limit):
            break
    if not kept:
        raise TextError(
            f"calibration.seqlen={config.seqlen}: the longest of {len(reading.taken)} documents of "
            f"{config.dataset}/{config.split} has {reading.longest} tokens; lower calibration.seqlen or take "
            f"calibration.strategy=concat_chunk instead of {config.strategy}"
        )
    return kept


def _too_short(config: Calibration, reading: Reading) -> TextError:
    return TextError(
        f"calibration.seqlen={config.seqlen}: {config.dataset}/{config.split} has only {reading.tokens} "
        "tokens, not one window; lower calibration.seqlen or give a longer text"
    )


def _warning(config: Calibration, count: int, reading: Reading) -> str:
    asked = f"calibration.num_samples={config.num_samples}"
    if count < config.num_samples:
        return f"{asked}: the text gives only {count} windows of {config.seqlen} tokens"
    if config.strategy == "concat_rand" and reading.tokens < count * config.seqlen:
        return f"{asked}: windows of {config.seqlen} tokens overlap, the text has only {reading.tokens} tokens"
    return ""


# --- frozen tokens


def save_tokens(path: Path, tokens: Tokens) -> None:
    """Freezes `tokens`: safetensors with `windows`, and the provenance as JSON; the same bytes each time.

    Raises ResourceError when the file cannot be written.
    """
    # One metadata key only: safetensors writes several in no fixed order.
    metadata = {"provenance": json.dumps(tokens.provenance, sort_keys=True)}
    content = save({"windows": tokens.windows.contiguous()}, metadata)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(content)
        scratch.replace(path)
    except OSError as error:
        with suppress(OSError):
            scratch.unlink()
        raise ResourceError(f"{path}: cannot be written ({error.strerror})") from error


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


def _frozen(config: Calibration, tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    path = Path(config.tokens or "").expanduser()
    tokens = load_tokens(path, tokenizer)
    count, seqlen = tokens.windows.shape
    if seqlen != config.seqlen:
        raise TextError(f"calibration.seqlen={config.seqlen}: the windows of {path} have {seqlen} tokens")
    taken = min(count, config.num_samples)
    provenance = {**tokens.provenance, "num_samples": str(taken)}
    if count < config.num_samples:
        asked = f"calibration.num_samples={config.num_samples}"
        provenance["warning"] = f"{asked}: {path.name} has only {count} windows"
    return Tokens(tokens.windows[:taken], provenance)


def _bad_file(path: Path, rule: str) -> TextError:
    return TextError(f"calibration.tokens={path}: {rule}")


# --- tokenizers


def load_tokenizer(directory: Path, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint directory; never from the hub. Raises ModelError when there is none."""
    from transformers import AutoTokenizer

    if not any(directory.glob("*token*")) and not (directory / "vocab.json").is_file():
        raise ModelError(f"{directory}: has no tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=trust_remote_code, local_files_only=True
        )
    # A damaged file gives whatever its parser raises; the Rust one raises plain Exception.
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise ModelError(f"{directory}: the tokenizer cannot be loaded ({said})") from error
    # Without its vocabulary file, transformers makes a tokenizer out of the special tokens alone.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ModelError(f"{directory}: the tokenizer has no vocabulary; its tokenizer.json is missing")
    return tokenizer


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """sha256, 64 hex digits, of all that decides which ids a text gets; the same wherever the files lie.

    Left out: names, paths, chat template, and padding and truncation, which are never used here.
    """
    state = {"rules": _rules(tokenizer), "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _rules(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python: its vocabulary, and what it does around a text
        around = tokenizer("a", verbose=False)["input_ids"]
        return {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), "around": around}
    rules: dict[str, Any] = json.loads(backend.to_str())
    return {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
