"""From text to tokens: the windows that a model is calibrated on, and the one long text it is evaluated on.

Knows how windows are cut. Knows no model and no device, and not where text comes from. No padding anywhere: a window is
`seqlen` consecutive tokens of real text.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from jointq_cli.data.text import Corpus, TextSource, read, text_hash
from jointq_cli.data.token_file import Tokens, load_tokens
from jointq_cli.data.token_weights import TokenWeights
from jointq_cli.data.tokenizer import tokenizer_hash
from jointq_cli.errors import TextError
from jointq_cli.setting_rules import setting

if TYPE_CHECKING:  # transformers takes more than a second to import
    from transformers import PreTrainedTokenizerBase

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

    split: str = setting("calibration")
    num_samples: int = setting(64, least=1)
    seqlen: int = setting(512, least=1)
    seed: int = setting(0, least=0, most=2**63 - 1)
    strategy: str = setting("concat_chunk", choices=("concat_chunk", "concat_rand", "drop_head", "drop_rand"))
    tokens: str | None = setting(None, place=True)
    inputs: str = setting("quantized", choices=("original", "quantized"))
    token_weighting: str = setting("residual", choices=("uniform", "input", "residual"))
    token_power: float = setting(2.0, least=0, most=4)  # beyond, float32 runs out of range
    first_token_weight: float = setting(1.0, least=0, most=4)

    @property
    def weights(self) -> TokenWeights:
        return TokenWeights(self.token_weighting, self.token_power, self.first_token_weight)

    def describe(self) -> str:
        """The windows that are asked for, as `Tokens` tells of those that there are."""
        text = f"{self.dataset}/{self.split} {self.num_samples} x {self.seqlen} tokens"
        return f"{text} {self.strategy} seed {self.seed}"

    def describe_statistics(self) -> str:
        """What the statistics are made of, such as "inputs=quantized token_weighting=residual^-2"."""
        told = [f"inputs={self.inputs}"]
        if self.token_weighting != "uniform":
            told.append(f"token_weighting={self.token_weighting}^-{self.token_power:g}")
        told += [f"first_token_weight={self.first_token_weight:g}"] if self.first_token_weight != 1 else []
        return " ".join(told)

    def tokens_only(self) -> "Calibration":
        """The same tokens, with nothing said about what becomes of them."""
        return replace(self, inputs="original", token_weighting="uniform", token_power=0.0, first_token_weight=1.0)


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
