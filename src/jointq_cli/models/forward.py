"""final_hidden: from evaluation.py."""

from collections.abc import Callable

from torch import Tensor

from jointq_cli.models.streamed import StreamedModel


def final_hidden(
    model: StreamedModel,
    ids: Tensor,
    batch: int,
    on_block: Callable[[], None] = lambda: None,
    pause: Callable[[], None] = lambda: None,
    own: slice = slice(None),
    blocks: int | None = None,
) -> Tensor:
    """Hidden states (windows, tokens, hidden) after the first `blocks`, or all, in the model's compute dtype.

    ids: (windows, tokens) int64, `batch` windows per forward pass; own: those that are wanted, in whole batches.
    on_block is called after each block, pause after each batch, where it may raise.
    """
    hidden = model.embed_all(ids, batch, own)
    for index in range(len(model) if blocks is None else blocks):
        with model.block(index, model.block_tensors(index)):
            model.run_all(index, hidden, batch, pause)
        on_block()
    return hidden
