"""Linear layers of either kind: weights are (out, in), whatever the module and the checkpoint hold."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from jointq_cli.models.layer_ref import layer_refs


def test_layers_are_found_with_their_sizes_and_their_outputs_are_those_of_a_weight_out_in() -> None:
    module = nn.ModuleDict({"a": nn.Linear(8, 4), "b": nn.Sequential(Conv1D(6, 8), nn.ReLU()), "norm": nn.LayerNorm(8)})
    found = layer_refs(module, "model.")
    assert {name: (layer.out_features, layer.in_features) for name, layer in found.items()} == {
        "model.a": (4, 8),
        "model.b.0": (6, 8),
    }
    assert [layer.weight_name for layer in found.values()] == ["model.a.weight", "model.b.0.weight"]
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    for layer in found.values():
        weight = layer.turned(layer.module.get_parameter("weight"))
        assert weight.shape == (layer.out_features, layer.in_features)
        assert weight.is_contiguous()
        torch.testing.assert_close(layer.module(x), nn.functional.linear(x, weight, layer.module.bias))
        assert torch.equal(layer.turned(weight), layer.module.get_parameter("weight"))
