"""Text that a model writes itself, token by token.

The complete model is in memory meanwhile: block by block, every token would read all weights again.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from jointq_cli.models.streamed import StreamedModel

# What transformers raises where a model of some architecture, or of remote code, cannot generate like this.
FAILURES = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


@contextmanager
def complete(model: StreamedModel) -> Iterator[None]:
    """All weights of the model are in memory inside."""
    with ExitStack() as stack:
        stack.enter_context(model.outer())
        for index in range(len(model)):
            stack.enter_context(model.block(index, model.block_tensors(index)))
        yield


def complete_bytes(model: StreamedModel, windows: int, seqlen: int) -> float:
    """Bytes of the complete model, and of the keys and values of so many windows of so many tokens."""
    config: Any = model.module.config.get_text_config()
    heads, shared = (getattr(config, f"num_{name}_heads", None) for name in ("attention", "key_value"))
    share = shared / heads if isinstance(heads, int) and isinstance(shared, int) else 1.0
    values = 2 * len(model) * share * config.hidden_size * windows * seqlen
    return float(model.checkpoint.parameters + values) * model.dtype.itemsize


def sample(model: StreamedModel, begin: Tensor, length: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    """Windows (windows, length) int64 that start with `begin` (windows, tokens).

    All other tokens are drawn from the model's distribution over ids below `vocabulary`; an end of text is followed by
    more text, as in the training of the model.

    generator: on the model's device. Raises as FAILURES where the model cannot, and NumericsError for weights with NaN
    or Inf.
    """
    module: Any = model.module
    last, cache = begin.to(model.device), None
    found = [last]
    with complete(model):
        for _ in range(length - begin.shape[1]):
            out = module(input_ids=last, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            likely = torch.softmax(out.logits[:, -1, :vocabulary].float(), dim=-1)
            last = torch.multinomial(likely, 1, generator=generator)
            found.append(last)
    return torch.cat(found, dim=1).cpu()
