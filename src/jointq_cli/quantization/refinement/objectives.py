"""The losses of a refinement: KL of the next token for a complete model, the error of a block's output for a block."""

from collections.abc import Callable

import torch
from torch import Tensor

from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.refinement.training import Objective

LOGITS_AT_ONCE = 2**24  # elements of one logits tensor: 64 MiB in float32


class NextTokens(Objective):
    """KL(original || refined) of the next token, mean over the tokens of a window; nats.

    original: with its outer parameters loaded. refined: completely loaded. windows: (windows, tokens) int64. expected:
    the original's final hidden states (windows, tokens, hidden).
    """

    def __init__(self, original: StreamedModel, refined: StreamedModel, windows: Tensor, expected: Tensor) -> None:
        self._original, self._refined = original, refined
        self._windows, self._expected = windows, expected
        vocabulary = refined.module.get_output_embeddings().weight.shape[0]
        self._at_once = max(1, LOGITS_AT_ONCE // int(vocabulary))

    def loss(self, window: int) -> float:
        hidden = self._hidden(window)
        parts = zip(hidden.split(self._at_once, dim=1), self._targets(window), strict=True)
        return sum(self._divergence(part, target).item() for part, target in parts) / hidden.shape[1]

    def backward(self, window: int, weight: float) -> float:
        with torch.enable_grad():
            hidden = self._hidden(window)
            # The head a few tokens at a time: its logits and their gradients are the largest tensors of all.
            leaf, total = hidden.detach().requires_grad_(), 0.0
            for part, target in zip(leaf.split(self._at_once, dim=1), self._targets(window), strict=True):
                loss = self._divergence(part, target)
                (loss * (weight / hidden.shape[1])).backward()
                total += loss.item()
            hidden.backward(leaf.grad)
        return total / hidden.shape[1]

    def _hidden(self, window: int) -> Tensor:
        """Final hidden states (1, tokens, hidden)."""
        with torch.no_grad():
            hidden = self._refined.embed(self._windows[window][None])
        for index in range(len(self._refined)):
            hidden = self._refined.run(index, hidden)
        return hidden

    def _targets(self, window: int) -> list[Tensor]:
        return list(self._expected[window][None].split(self._at_once, dim=1))

    def _divergence(self, hidden: Tensor, expected: Tensor) -> Tensor:
        """Sum over tokens."""
        with torch.no_grad():
            target = torch.log_softmax(self._original.logits(expected.to(self._original.device)).float(), dim=-1)
        found = torch.log_softmax(self._refined.logits(hidden).float(), dim=-1)
        return torch.nn.functional.kl_div(found, target, reduction="sum", log_target=True)


class BlockOutputs(Objective):
    """|refined - original|^2 / |original|^2 of a block's output for each token, mean over the tokens of a window.

    run: the block, loaded. inputs: of the block in the refined model, expected: its outputs in the original model, both
    (windows, tokens, hidden).
    """

    def __init__(self, run: Callable[[Tensor], Tensor], inputs: Tensor, expected: Tensor) -> None:
        self._run, self._inputs, self._expected = run, inputs, expected

    def loss(self, window: int) -> float:
        return self._error(window).item()

    def backward(self, window: int, weight: float) -> float:
        with torch.enable_grad():
            loss = self._error(window)
            (loss * weight).backward()
        return loss.item()

    def _error(self, window: int) -> Tensor:
        found, expected = self._run(self._inputs[window][None]).float(), self._expected[window][None].float()
        size = expected.square().sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        return ((found - expected).square().sum(dim=-1) / size).mean()
