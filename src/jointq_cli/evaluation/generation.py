"""Text that a model continues a few fixed prompts with, to be read beside that of its original.

Greedy, so that a text depends on the model alone.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from jointq_cli.models.sampling import complete
from jointq_cli.models.streamed import StreamedModel

PROMPTS = (
    "The most important thing to know about this is that",
    "def count_words(path):\n    with open(path) as file:\n",
    "Once upon a time, there was a small village where",
)
LARGEST = 3e9  # bytes of a model's weights


def prompt_ids(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The prompts as (prompts, tokens) int64, cut to the length of the shortest."""
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    shortest = min(map(len, ids))
    return torch.tensor([one[:shortest] for one in ids])


def why_not(model: StreamedModel) -> str:
    """Why a model is not loaded completely; "" where it is."""
    size = model.checkpoint.parameters * model.dtype.itemsize
    return f"weights of {size / 1e9:.2g} GB, and {LARGEST / 1e9:g} GB are the most" if size > LARGEST else ""


def generate(model: StreamedModel, ids: Tensor, count: int) -> Tensor:
    """The `count` tokens (prompts, count) int64 that follow `ids` (prompts, tokens), each the most likely one; fewer
    where the model has no more positions.

    Raises as sampling.FAILURES where the model cannot, and NumericsError for weights with NaN or Inf.
    """
    module: Any = model.module
    positions = getattr(module.config.get_text_config(), "max_position_embeddings", None)
    if positions:
        count = min(count, positions - ids.shape[1])
    # Without an end: texts of a model and of its original have the same length.
    settings = GenerationConfig(
        max_new_tokens=count, do_sample=False, eos_token_id=None, bos_token_id=None, pad_token_id=0
    )
    with complete(model):
        on_device = ids.to(model.device)
        found: Tensor = module.generate(
            on_device, attention_mask=torch.ones_like(on_device), generation_config=settings
        )
    return found[:, ids.shape[1] :].cpu()
