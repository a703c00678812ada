"""Models in the engines that serve them."""

from pathlib import Path

import torch
from tiny_models import auto_class, write_checkpoint

from jointq_cli.evaluation.engines import opened


@torch.no_grad()
def test_transformers_opens_a_model_with_vision_and_takes_text(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, "smolvlm")
    ids = torch.arange(3, 20)
    expected = auto_class("smolvlm").from_pretrained(directory)(input_ids=ids[None]).logits[0]
    with opened("transformers", directory) as model:
        torch.testing.assert_close(model.log_probabilities(ids), torch.log_softmax(expected, dim=-1))
