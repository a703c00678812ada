"""From text to tokens: the windows that a model is calibrated on, and the one long text it is evaluated on.

Knows how windows are cut, but no model, no device, and not where the text comes from. There is no padding: a window is
`seqlen` consecutive tokens of text.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from jointq_cli.data.chat import Chat, chat_text, template_of
from jointq_cli.data.corpus import open_corpus
from jointq_cli.data.text import DATASETS, GENERATED, Corpus, TextSource, text_hash
from jointq_cli.data.token_file import Tokens, load_tokens
from jointq_cli.data.token_weights import TokenWeights
from jointq_cli.data.tokenizer import tokenizer_hash
from jointq_cli.errors import ConfigError, TextError
from jointq_cli.setting_rules import setting

if TYPE_CHECKING:  # transformers takes more than a second to import
    from transformers import PreTrainedTokenizerBase

# How much of a practically endless text is read, as a multiple of the requested number of tokens.
CONCAT_POOL: Final = 4  # concat_rand draws from so much
DROP_POOL: Final = 64  # drop_* give up after so much


@dataclass(frozen=True)
class Calibration(TextSource):
    """The calibration text, and how `num_samples` windows of `seqlen` tokens are cut from it.

    strategy:
      concat_chunk  the documents concatenated and cut into consecutive windows, the first num_samples of them
      concat_rand   the documents concatenated, windows at distinct random positions (they may overlap)
      drop_head     the first seqlen tokens of each document that has as many; shorter documents are dropped
      drop_rand     like drop_head, from a random position in each document
    drop_head and drop_rand take the first num_samples documents that are long enough. Windows come in the
    order of the text, except in concat_rand. Of C4 on the hub, concat_rand sees the first
    4 x num_samples x seqlen tokens.

    Document boundaries: each document is encoded as the tokenizer encodes a text of its own (most Llamas: with a
    BOS first). If the tokenizer adds no special tokens, concatenation appends its EOS to each document, or a blank
    line if it has no EOS. Conversations have the special tokens of the chat template alone. WikiText-2 consists of
    lines, not of documents: concatenation joins them with a blank line and encodes them at once, as GPTQ does.

    dataset `generated`: num_samples windows that the model to be quantised writes itself, see stages/generated_tokens.
    add_generated: so many in addition to the windows of the text, or of `tokens`, which continue excerpts of these.

    tokens: a file of frozen tokens to use instead of the text; seqlen must be that of the file, and its first
    num_samples windows are taken. inputs: the activations that statistics are computed from, those of the original
    model or `quantized`, those after the layers that have already been quantised. token_weighting, token_power,
    first_token_weight: see token_weights.TokenWeights. matmul_precision: of the products that statistics are sums of,
    see accumulator.Accumulator.

    A text with fewer than num_samples windows is used with a warning, one without a window is an error.
    """

    dataset: str = setting("pydoc", choices=(*DATASETS, GENERATED))
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
    add_generated: int | None = setting(None, least=1, null="for none")
    matmul_precision: str | None = setting(None, choices=("high", "medium"), null="for float32")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset == GENERATED and self.add_generated:
            rule = f"adds to a text; with calibration.dataset={GENERATED} use null, and raise num_samples"
            raise ConfigError(f"calibration.add_generated={self.add_generated}: {rule}")

    @property
    def is_generated(self) -> bool:
        """Whether the model writes all windows."""
        return self.dataset == GENERATED and not self.tokens

    @property
    def generated(self) -> int:
        """How many windows the model writes."""
        return self.num_samples if self.is_generated else self.add_generated or 0

    @property
    def windows(self) -> int:
        """How many windows are asked for."""
        return self.num_samples + (self.add_generated or 0)

    @property
    def weights(self) -> TokenWeights:
        return TokenWeights(self.token_weighting, self.token_power, self.first_token_weight)

    def describe(self) -> str:
        """The requested windows, in the format of `Tokens.describe`."""
        text = f"{self.dataset}/{self.split} {self.num_samples} x {self.seqlen} tokens"
        added = f" and {self.add_generated} generated" if self.add_generated else ""
        return f"{text} {self.strategy} seed {self.seed}{added}"

    def describe_statistics(self) -> str:
        """How statistics are computed from the tokens, such as "inputs=quantized token_weighting=residual^-2"."""
        words = [f"inputs={self.inputs}"]
        if self.token_weighting != "uniform":
            words.append(f"token_weighting={self.token_weighting}^-{self.token_power:g}")
        if self.first_token_weight != 1:
            words.append(f"first_token_weight={self.first_token_weight:g}")
        if self.matmul_precision:
            words.append(f"matmul_precision={self.matmul_precision}")
        return " ".join(words)

    def tokens_only(self) -> "Calibration":
        """These settings with defaults for all that does not decide which tokens they select."""
        return replace(
            self,
            inputs="original",
            token_weighting="uniform",
            token_power=0.0,
            first_token_weight=1.0,
            add_generated=None,
            matmul_precision=None,
        )


def calibration_tokens(config: Calibration, tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    """The windows that `config` selects, (num_samples or fewer, seqlen) int64; a function of text, tokenizer and seed.

    Raises TextError when the text has no complete window or a frozen file does not fit, and what `open_corpus` raises.
    """
    if config.tokens is not None:
        return _frozen_tokens(config, tokenizer)
    text = TokenizedCorpus(open_corpus(config), tokenizer)
    generator = torch.Generator().manual_seed(config.seed)
    windows = STRATEGIES[config.strategy](text, config, generator)
    provenance = {
        **text.provenance(),
        "strategy": config.strategy,
        "seed": str(config.seed),
        "num_samples": str(len(windows)),
        "seqlen": str(config.seqlen),
    }
    if warning := _warning(config, len(windows), text):
        provenance["warning"] = warning
    return Tokens(windows, provenance)


def evaluation_ids(source: TextSource, tokenizer: "PreTrainedTokenizerBase") -> tuple[Tensor, dict[str, str]]:
    """The complete text as ids (tokens,) int64, encoded at once, and its provenance.

    Documents are joined by a blank line (C4, as in GPTQ: the first 1100 by a space). Neither BOS nor EOS is
    added; the evaluation protocol decides about these. Raises TextError for an empty text, and what `open_corpus`
    raises.
    """
    text = TokenizedCorpus(open_corpus(source), tokenizer)
    ids = text.running_text(special=False)
    if not len(ids):
        raise TextError(f"{source.section}: {source.dataset}/{source.split} has no text")
    return ids, text.provenance()


class TokenizedCorpus:
    """A corpus that is tokenised as it is iterated, with a record of what has been read so far."""

    def __init__(self, corpus: Corpus, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.documents_read: list[str] = []
        self.tokens = 0
        self.longest = 0  # tokens of the longest document
        self.chat_template: str | None = None  # where a conversation has been read

    def documents(self) -> Iterator[Tensor]:
        """Each document as ids (tokens,) int64, encoded as a text of its own."""
        for text in self._texts(None):
            yield self._counted(self._encode(text, special=True))

    def stream(self) -> Iterator[Tensor]:
        """Pieces whose concatenation is the text as one sequence, with document boundaries as in `Calibration`."""
        if self.corpus.running:
            yield self.running_text(special=True)
            return
        for text in self._texts(None):
            yield self._counted(torch.cat([self._encode(text, special=True), self._separator]))

    def running_text(self, special: bool) -> Tensor:
        """The evaluation text, joined and encoded at once: ids (tokens,) int64. special: with BOS or EOS."""
        texts = list(self._texts(self.corpus.evaluated))
        joined = ("" if self.chat_template else self.corpus.joint).join(texts)
        return self._counted(self._encode(joined, special))

    def provenance(self) -> dict[str, str]:
        template = self.chat_template
        chat = {} if template is None else {"chat_template_sha256": hashlib.sha256(template.encode()).hexdigest()}
        return {
            **self.corpus.provenance,
            **chat,
            "documents": str(len(self.documents_read)),
            "text_tokens": str(self.tokens),
            "text_sha256": text_hash(self.documents_read),
            "tokenizer_sha256": tokenizer_hash(self.tokenizer),
        }

    def _texts(self, limit: int | None) -> Iterator[str]:
        for document in self.corpus.documents:
            text = document if isinstance(document, str) else self._chat_text(document)
            self.documents_read.append(text)
            yield text
            if limit is not None and len(self.documents_read) >= limit:
                return

    def _chat_text(self, chat: Chat) -> str:
        if self.chat_template is None:
            self.chat_template = template_of(self.tokenizer, self.corpus.column)
        return chat_text(chat, self.tokenizer, self.corpus.column)

    def _counted(self, ids: Tensor) -> Tensor:
        self.tokens += len(ids)
        self.longest = max(self.longest, len(ids))
        return ids

    @cached_property
    def _separator(self) -> Tensor:
        """The ids after each document: none where the tokenizer itself, or a chat template, adds special tokens."""
        if self.chat_template is not None or self.tokenizer.num_special_tokens_to_add(pair=False):
            return torch.empty(0, dtype=torch.int64)
        if self.tokenizer.eos_token_id is not None:
            return torch.tensor([self.tokenizer.eos_token_id])
        return self._encode("\n\n", special=False)

    def _encode(self, text: str, special: bool) -> Tensor:
        special = special and self.chat_template is None  # a template writes its own
        # verbose=False: no warning about a text longer than the model's context, which is intended.
        encoded = self.tokenizer(text, add_special_tokens=special, truncation=False, padding=False, verbose=False)
        return torch.tensor(encoded["input_ids"], dtype=torch.int64)


# --- strategies: (text, config, generator) -> windows (num_samples or fewer, seqlen) int64


def concat_chunk(text: TokenizedCorpus, config: Calibration, generator: torch.Generator) -> Tensor:
    """Consecutive windows from the start of the text; reads no further than needed."""
    ids = _concatenated(text, config.num_samples * config.seqlen)
    count = min(config.num_samples, len(ids) // config.seqlen)
    if not count:
        raise _too_short(config, text)
    return ids[: count * config.seqlen].reshape(count, config.seqlen)


def concat_rand(text: TokenizedCorpus, config: Calibration, generator: torch.Generator) -> Tensor:
    """Windows at distinct random positions of the text."""
    limit = CONCAT_POOL * config.num_samples * config.seqlen if text.corpus.streamed else None
    ids = _concatenated(text, limit)
    places = len(ids) - config.seqlen + 1
    if places < 1:
        raise _too_short(config, text)
    starts = torch.randperm(places, generator=generator)[: config.num_samples].tolist()
    return torch.stack([ids[start : start + config.seqlen] for start in starts])


def drop_head(text: TokenizedCorpus, config: Calibration, generator: torch.Generator) -> Tensor:
    """The beginnings of the documents that are long enough."""
    return torch.stack([ids[: config.seqlen] for ids in _long_documents(text, config)])


def drop_rand(text: TokenizedCorpus, config: Calibration, generator: torch.Generator) -> Tensor:
    """A random window of each document that is long enough."""
    windows = []
    for ids in _long_documents(text, config):
        start = int(torch.randint(len(ids) - config.seqlen + 1, (), generator=generator))
        windows.append(ids[start : start + config.seqlen])
    return torch.stack(windows)


Strategy = Callable[[TokenizedCorpus, Calibration, torch.Generator], Tensor]
STRATEGIES: Final[dict[str, Strategy]] = {
    strategy.__name__: strategy for strategy in (concat_chunk, concat_rand, drop_head, drop_rand)
}


def _concatenated(text: TokenizedCorpus, limit: int | None) -> Tensor:
    """The text as one sequence, (tokens,) int64: all of it, or as many documents as reach `limit` tokens."""
    pieces = [torch.empty(0, dtype=torch.int64)]
    for ids in text.stream():
        pieces.append(ids)
        if limit is not None and text.tokens >= limit:
            break
    return torch.cat(pieces)


def _long_documents(text: TokenizedCorpus, config: Calibration) -> list[Tensor]:
    kept: list[Tensor] = []
    limit = DROP_POOL * config.num_samples * config.seqlen if text.corpus.streamed else None
    for ids in text.documents():
        if len(ids) >= config.seqlen:
            kept.append(ids)
        if len(kept) == config.num_samples or (limit is not None and text.tokens >= limit):
            break
    if not kept:
        raise TextError(
            f"calibration.seqlen={config.seqlen}: the longest of {len(text.documents_read)} documents of "
            f"{config.dataset}/{config.split} has {text.longest} tokens; lower calibration.seqlen or take "
            f"calibration.strategy=concat_chunk instead of {config.strategy}"
        )
    return kept


def _too_short(config: Calibration, text: TokenizedCorpus) -> TextError:
    return TextError(
        f"calibration.seqlen={config.seqlen}: {config.dataset}/{config.split} has only {text.tokens} "
        "tokens, not one window; lower calibration.seqlen or give a longer text"
    )


def _warning(config: Calibration, count: int, text: TokenizedCorpus) -> str:
    key = f"calibration.num_samples={config.num_samples}"
    if count < config.num_samples:
        return f"{key}: the text gives only {count} windows of {config.seqlen} tokens"
    if config.strategy == "concat_rand" and text.tokens < count * config.seqlen:
        return f"{key}: windows of {config.seqlen} tokens overlap, the text has only {text.tokens} tokens"
    return ""


def _frozen_tokens(config: Calibration, tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    path = Path(config.tokens or "").expanduser()
    tokens = load_tokens(path, tokenizer)
    count, seqlen = tokens.windows.shape
    if seqlen != config.seqlen:
        raise TextError(f"calibration.seqlen={config.seqlen}: the windows of {path} have {seqlen} tokens")
    taken = min(count, config.num_samples)
    provenance = {**tokens.provenance, "num_samples": str(taken)}
    if tokens.generated:  # these come last
        provenance["generated"] = str(max(0, tokens.generated - (count - taken)))
    if count < config.num_samples:
        key = f"calibration.num_samples={config.num_samples}"
        provenance["warning"] = f"{key}: {path.name} has only {count} windows"
    return Tokens(tokens.windows[:taken], provenance)
