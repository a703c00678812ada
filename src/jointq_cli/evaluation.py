"""Perplexity by a stated protocol, and how far a quantised model is from its original.

Both models walk block by block over the same windows up to their final hidden states; then logits are made a few
tokens at a time, scored and dropped. Log-likelihoods are computed in float32 from the model's logits and summed in
float64.
"""

import hashlib
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from jointq_cli.errors import ConfigError, TextError
from jointq_cli.model import StreamedModel
from jointq_cli.records import Comparison, Perplexity, Protocol
from jointq_cli.text import TextSource

BOS_CHOICES = ("none", "first", "each")
LOGITS_AT_ONCE = 2**24  # elements of one logits tensor; 64 MiB in float32


@dataclass(frozen=True)
class Evaluation(TextSource):
    """Which text is scored, and how: windows of `seqlen` tokens that start `stride` tokens apart (default: seqlen).

    Every token of a window is scored from those before it, in an overlapping window only the last `stride` of them.
    `bos`: none, first (once, before the whole text, as the GPTQ protocol does for Llama) or each (before each window).
    """

    seqlen: int
    stride: int | None
    max_windows: int | None
    bos: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seqlen < 2:
            raise ConfigError(f"evaluation.seqlen={self.seqlen}: must be at least 2 tokens")
        if self.stride is not None and not 1 <= self.stride <= self.seqlen:
            raise ConfigError(f"evaluation.stride={self.stride}: must be from 1 to evaluation.seqlen={self.seqlen}")
        if self.max_windows is not None and self.max_windows < 1:
            raise ConfigError(f"evaluation.max_windows={self.max_windows}: must be at least 1, or null for all")
        if self.bos not in BOS_CHOICES:
            raise ConfigError(f"evaluation.bos={self.bos}: must be one of {', '.join(BOS_CHOICES)}")


@dataclass(frozen=True)
class ScoredWindows:
    """Token windows and which of their tokens count: ids (windows, tokens) int64, scored (windows, tokens) bool."""

    ids: Tensor
    scored: Tensor
    stride: int  # tokens of text from one window to the next
    provenance: dict[str, str] = field(default_factory=dict)  # of the text: revision, sha256 and the like

    def part(self, own: slice) -> "ScoredWindows":
        return replace(self, ids=self.ids[own], scored=self.scored[own])

    @property
    def hash(self) -> str:
        """sha256 over ids and scored positions, 64 hex digits."""
        digest = hashlib.sha256(self.ids.numpy().tobytes())
        digest.update(self.scored.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Scores:
    """Per window, float64 (windows,) each: sums over its scored tokens."""

    tokens: Tensor
    original_nll: Tensor
    quantized_nll: Tensor
    kl: Tensor  # KL(original || quantised), nats
    agreements: Tensor  # tokens where both models have the same most likely token

    @classmethod
    def joined(cls, parts: list["Scores"]) -> "Scores":
        """Those of all windows, part behind part."""
        return cls(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)})


def cut_windows(
    ids: Tensor, evaluation: Evaluation, bos_id: int | None, provenance: dict[str, str] | None = None
) -> ScoredWindows:
    """Windows over a text of ids (tokens,) int64; an incomplete last window is dropped, as the field does.

    Raises ConfigError when `bos` asks for a token the tokenizer does not have, TextError when not one window fits.
    """
    if evaluation.bos != "none" and bos_id is None:
        raise ConfigError(f"evaluation.bos={evaluation.bos}: this tokenizer has no BOS token; use evaluation.bos=none")
    if evaluation.bos == "first":
        ids = torch.cat([torch.tensor([bos_id]), ids])
    room = evaluation.seqlen - (evaluation.bos == "each")
    stride = min(evaluation.stride or room, room)
    if len(ids) < room:
        raise TextError(
            f"evaluation.seqlen={evaluation.seqlen}: the text has {len(ids)} tokens, not one window; "
            "shorten the window or give a longer text"
        )
    windows = ids.unfold(0, room, stride)[: evaluation.max_windows].contiguous()
    scored = torch.zeros(windows.shape, dtype=torch.bool)
    scored[:, room - stride :] = True  # in an overlapping window, what no earlier window has scored
    scored[0] = True
    if evaluation.bos == "each":
        windows = torch.cat([torch.full((len(windows), 1), bos_id or 0), windows], dim=1)
        scored = torch.cat([torch.zeros(len(scored), 1, dtype=torch.bool), scored], dim=1)
    scored[:, 0] = False  # nothing comes before it
    return ScoredWindows(windows, scored, stride, provenance or {})


def final_hidden(
    model: StreamedModel,
    ids: Tensor,
    batch: int,
    on_block: Callable[[], None] = lambda: None,
    pause: Callable[[], None] = lambda: None,
    own: slice = slice(None),
) -> Tensor:
    """Hidden states (windows, tokens, hidden) after the last block, in the model's compute dtype.

    ids: (windows, tokens) int64, `batch` windows per forward pass; own: those that are wanted, in whole batches.
    on_block is called after each block, pause after each batch, where it may raise.
    """
    hidden = model.embed_all(ids, batch, own)
    for index in range(len(model)):
        with model.block(index, model.block_tensors(index)):
            model.run_all(index, hidden, batch, pause)
        on_block()
    return hidden


def score(
    original: StreamedModel,
    original_hidden: Tensor,
    quantized: StreamedModel,
    quantized_hidden: Tensor,
    windows: ScoredWindows,
    on_window: Callable[[], None] = lambda: None,
) -> Scores:
    """Scores both models on the same windows from their final hidden states (windows, tokens, hidden).

    Given the same model twice, its logits are made once. on_window is called after each window and may raise. Raises
    ConfigError when the models have different vocabularies.
    """
    if _vocabulary(original) != _vocabulary(quantized):
        raise ConfigError(
            f"reference: has a vocabulary of {_vocabulary(original)} tokens, and the model one of "
            f"{_vocabulary(quantized)}; only models with the same tokens can be compared"
        )
    rows = torch.zeros(len(windows.ids), 5, dtype=torch.float64)
    with ExitStack() as loaded:
        for model in {id(m): m for m in (original, quantized)}.values():
            loaded.enter_context(model.outer())
        at_once = max(1, LOGITS_AT_ONCE // _vocabulary(original))
        for number, (ids, scored) in enumerate(zip(windows.ids, windows.scored, strict=True)):
            # The logits at position t score token t + 1.
            positions = scored[1:].nonzero().squeeze(1)
            for part in positions.split(at_once):
                p = _log_probabilities(original, original_hidden[number, part])
                q = p if quantized is original else _log_probabilities(quantized, quantized_hidden[number, part])
                rows[number] += _sums(p, q, ids[part + 1].to(p.device))
            on_window()
    return Scores(*rows.unbind(1))


def perplexity(nll: Tensor, tokens: Tensor) -> Perplexity:
    """exp(mean nll per token), nll and tokens (windows,) being sums per window.

    The standard error takes windows as independent: that of the ratio of two sums (Cochran, Sampling Techniques,
    eq. 2.39), and by the delta method perplexity x that of the mean.
    """
    mean, error = _ratio(nll, tokens)
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(value, value * error, mean, error)


def compare(scores: Scores) -> Comparison:
    """The quantised model against the original; differences are paired by window."""
    increase, increase_error = _ratio(scores.quantized_nll - scores.original_nll, scores.tokens)
    kl, kl_error = _ratio(scores.kl, scores.tokens)
    agreement = (scores.agreements.sum() / scores.tokens.sum()).item()
    return Comparison(increase, increase_error, kl, kl_error, agreement)


def protocol(evaluation: Evaluation, windows: ScoredWindows, dtype: torch.dtype) -> Protocol:
    return Protocol(
        dataset=evaluation.dataset,
        split=evaluation.split,
        text_hash=windows.hash[:16],
        window=evaluation.seqlen,
        stride=windows.stride,
        bos=evaluation.bos,
        dtype=str(dtype).removeprefix("torch."),
        windows=len(windows.ids),
        scored_tokens=int(windows.scored.sum()),
    )


def _vocabulary(model: StreamedModel) -> int:
    embeddings = model.module.get_output_embeddings()
    return int(embeddings.weight.shape[0])


def _log_probabilities(model: StreamedModel, hidden: Tensor) -> Tensor:
    """(tokens, hidden) -> (tokens, vocabulary) float32."""
    logits = model.logits(hidden.to(model.device)[None])[0]
    return torch.log_softmax(logits.float(), dim=-1)


def _sums(p: Tensor, q: Tensor, targets: Tensor) -> Tensor:
    """The five sums of `Scores` over tokens; p and q (tokens, vocabulary) are log-probabilities."""
    picked = targets[:, None]
    # A token that the model rules out, p = log 0, adds nothing; 0 x inf would be NaN.
    kl = torch.where(p > -math.inf, p.exp() * (p - q), 0.0).sum(dim=-1)
    agree = p.argmax(-1) == q.argmax(-1)
    columns = (torch.ones_like(kl), -p.gather(1, picked), -q.gather(1, picked), kl, agree)
    return torch.stack([column.double().sum() for column in columns]).cpu()


def _ratio(sums: Tensor, tokens: Tensor) -> tuple[float, float]:
    """Mean per token and its standard error over windows; the error is 0 when there is one window only."""
    mean = (sums.sum() / tokens.sum()).item()
    count = len(sums)
    if count < 2:
        return mean, 0.0
    residual = sums - mean * tokens
    variance = residual.square().sum() / (count - 1)
    return mean, (variance / count).sqrt().item() / (tokens.sum() / count).item()
