"""How much of a model is quantised, counted from its shapes."""

from pathlib import Path

import pytest
import torch
from tiny_models import write_checkpoint

from jointq_cli.evaluation.activation_settings import Activations
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.coverage import left_out
from jointq_cli.models.layer_selection import LayerSelection
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.quantizers.rtn import RTN
from jointq_cli.stages.loop_settings import selected_layers


def open_model(directory: Path, family: str) -> StreamedModel:
    checkpoint = Checkpoint(write_checkpoint(directory, family))
    return StreamedModel(checkpoint, torch.device("cpu"), torch.float32)


def selected(model: StreamedModel, **rules: list[str]) -> list[str]:
    return selected_layers(model, LayerSelection(**rules), RTN(group_size=32), Activations())


@pytest.mark.parametrize("family", ["llama_bias", "gpt_neox", "gemma3"])
def test_all_weights_of_dense_models_are_linear_layers(tmp_path: Path, family: str) -> None:
    model = open_model(tmp_path, family)
    assert left_out(model, [name for name in model.linear_layers() if model.block_of(name) is not None]) == {}


def test_of_a_mixture_of_experts_the_routers_are_left_out_and_counted(tmp_path: Path) -> None:
    model = open_model(tmp_path, "granitemoe")
    attention, up, down, router = 64 * (64 + 32 + 32 + 64), 4 * 64 * 256, 4 * 128 * 64, 4 * 64
    total = attention + up + down + router
    assert left_out(model, selected(model)) == {"block_sparse_moe.router": router / total}
    without = selected(model, exclude_layer_keywords=["experts"])
    assert left_out(model, without) == {
        "block_sparse_moe.experts.*.gate_proj": up / 2 / total,
        "block_sparse_moe.experts.*.up_proj": up / 2 / total,
        "block_sparse_moe.experts.*.down_proj": down / total,
        "block_sparse_moe.router": router / total,
    }


def test_a_router_is_quantised_only_where_a_name_includes_it(tmp_path: Path) -> None:
    model = open_model(tmp_path, "llama4")
    assert "model.layers.0.feed_forward.router" in model.linear_layers()
    assert not [name for name in selected(model) if "router" in name]
    assert not [name for name in selected(model, include_layer_keywords=["feed_forward"]) if "router" in name]
    assert len(selected(model, include_layer_names=["feed_forward.router"])) == 3
