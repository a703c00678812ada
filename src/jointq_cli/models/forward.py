"""The forward pass through all blocks of a streamed model."""

from collections.abc import Callable

from torch import Tensor

from jointq_cli.models.streamed import BlockwiseModel


def final_hidden(
    model: BlockwiseModel,
    ids: Tensor,
    batch: int,
    on_block: Callable[[], None] = lambda: None,
    pause: Callable[[], None] = lambda: None,
    own: slice = slice(None),
    blocks: int | None = None,
) -> Tensor:
    """Hidden states (windows, tokens, hidden) after the first `blocks`, or all, in the model's compute dtype.

    ids: (windows, tokens) int64, `batch` windows per forward pass. own: the windows to compute, in complete batches.
    on_block is called after each block; pause after each batch, and may raise to stop.
    """
    hidden = model.embed_all(ids, batch, own)
    for index in range(len(model) if blocks is None else blocks):
        with model.block(index, model.block_tensors(index)):
            model.run_all(index, hidden, batch, pause)
        on_block()
    return hidden
