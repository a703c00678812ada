"""Perplexity by a fixed protocol, and the distance of a quantised model from its original.

Both models run over the same windows up to their final hidden states; then logits are computed a few tokens at a time,
scored and dropped. Log-likelihoods are computed in float32 from the model's logits and summed in float64.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jointq_cli.errors import ConfigError
from jointq_cli.evaluation.windows import Evaluation, ScoredWindows
from jointq_cli.records import Comparison, Perplexity, Protocol

if TYPE_CHECKING:  # brings transformers, which takes seconds to import
    from jointq_cli.models.streamed import StreamedModel

LOGITS_AT_ONCE = 2**24  # elements of one logits tensor: 64 MiB in float32


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
        """The scores of all windows: the parts concatenated."""
        return cls(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)})


class Predictions(ABC):
    """What a model predicts on the windows that are scored."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """How many tokens it distinguishes."""

    @abstractmethod
    def log_probabilities(self, window: int, positions: Tensor) -> Tensor:
        """Of the tokens after these positions (count,) of a window: (count, vocabulary) float32."""

    def loaded(self) -> AbstractContextManager[None]:
        """Inside, `log_probabilities` works."""
        return nullcontext()


class HiddenPredictions(Predictions):
    """Those of a streamed model, from its final hidden states (windows, tokens, hidden)."""

    def __init__(self, model: "StreamedModel", hidden: Tensor) -> None:
        self.model = model
        self.hidden = hidden

    @property
    def vocabulary(self) -> int:
        return int(self.model.module.get_output_embeddings().weight.shape[0])

    def loaded(self) -> AbstractContextManager[None]:
        return self.model.outer()

    def log_probabilities(self, window: int, positions: Tensor) -> Tensor:
        logits = self.model.logits(self.hidden[window, positions].to(self.model.device)[None])[0]
        return torch.log_softmax(logits.float(), dim=-1)


def score(
    original: Predictions,
    quantized: Predictions,
    windows: ScoredWindows,
    on_window: Callable[[], None] = lambda: None,
) -> Scores:
    """Scores both models on the same windows. If they are the same object, its logits are computed once.

    on_window is called after each window and may raise. Raises ConfigError if the vocabularies differ.
    """
    if original.vocabulary != quantized.vocabulary:
        raise ConfigError(
            f"reference: has a vocabulary of {original.vocabulary} tokens, and the model one of "
            f"{quantized.vocabulary}; only models with the same tokens can be compared"
        )
    rows = torch.zeros(len(windows.ids), 5, dtype=torch.float64)
    with ExitStack() as stack:
        for predictions in {id(one): one for one in (original, quantized)}.values():
            stack.enter_context(predictions.loaded())
        at_once = max(1, LOGITS_AT_ONCE // original.vocabulary)
        for number, (ids, scored) in enumerate(zip(windows.ids, windows.scored, strict=True)):
            # The logits at position t score token t + 1.
            positions = scored[1:].nonzero().squeeze(1)
            for part in positions.split(at_once):
                p = original.log_probabilities(number, part)
                q = p if quantized is original else quantized.log_probabilities(number, part).to(p.device)
                rows[number] += _sums(p, q, ids[part + 1].to(p.device))
            on_window()
    return Scores(*rows.unbind(1))


def perplexity(nll: Tensor, tokens: Tensor) -> Perplexity:
    """exp(mean negative log-likelihood per token), with its standard error; nats.

    nll, tokens: (windows,) float64, sums per window. The error of the mean is that of a ratio of two sums over
    independent windows (Cochran, Sampling Techniques, eq. 2.39); by the delta method, the error of the perplexity is
    perplexity times that.
    """
    mean, error = _ratio(nll, tokens)
    value = math.inf if mean >= 700 else math.exp(mean)
    return Perplexity(value, value * error, mean, error)


def compare(scores: Scores) -> Comparison:
    """The quantised model relative to the original, in nats per token; differences are paired by window."""
    increase, increase_error = _ratio(scores.quantized_nll - scores.original_nll, scores.tokens)
    kl, kl_error = _ratio(scores.kl, scores.tokens)
    agreement = math.nan if math.isnan(kl) else (scores.agreements.sum() / scores.tokens.sum()).item()
    return Comparison(increase, increase_error, kl, kl_error, agreement)


def protocol(evaluation: Evaluation, windows: ScoredWindows, dtype: torch.dtype) -> Protocol:
    """What a perplexity was measured on, for the report; dtype: of the model's forward pass."""
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


def _sums(p: Tensor, q: Tensor, targets: Tensor) -> Tensor:
    """The five sums of `Scores` over tokens; p and q (tokens, vocabulary) are log-probabilities."""
    picked = targets[:, None]
    # A token of probability 0, p = -inf, adds nothing; 0 x inf would be NaN.
    kl = torch.where(p > -math.inf, p.exp() * (p - q), 0.0).sum(dim=-1)
    agree = p.argmax(-1) == q.argmax(-1)
    columns = (torch.ones_like(kl), -p.gather(1, picked), -q.gather(1, picked), kl, agree)
    return torch.stack([column.double().sum() for column in columns]).cpu()


def _ratio(sums: Tensor, tokens: Tensor) -> tuple[float, float]:
    """Mean per token and its standard error over windows; the error is 0 if there is only one window."""
    mean = (sums.sum() / tokens.sum()).item()
    count = len(sums)
    if count < 2:
        return mean, 0.0
    residual = sums - mean * tokens
    variance = residual.square().sum() / (count - 1)
    return mean, (variance / count).sqrt().item() / (tokens.sum() / count).item()
