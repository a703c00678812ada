"""The stored form of K-quants: its values, its tensors, and parts of it."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from k_cases import random_k_weight

from jointq_cli.errors import ModelError
from jointq_cli.formats.k_quant import K_GRIDS, SUPER_BLOCK, KGrid, KQuantWeight
from jointq_cli.formats.layer_file import load_form, load_layer, save_layer

every_grid = pytest.mark.parametrize("grid", K_GRIDS.values(), ids=lambda grid: grid.label)


def equal(one: KQuantWeight, two: KQuantWeight) -> bool:
    return one.grid == two.grid and not one.difference(two)


@every_grid
def test_it_is_a_type_of_ggml(grid: KGrid) -> None:
    assert GGML_QUANT_SIZES[Kind[grid.label]] == (SUPER_BLOCK, grid.stored_bytes)
    weight = random_k_weight(grid, rows=8, columns=512)
    assert (weight.shape, weight.label) == ((8, 512), grid.label)
    assert weight.bits_per_weight == 8 * grid.stored_bytes / 256
    assert weight.record_fields()["bits"] == grid.bits


@every_grid
def test_values_are_those_of_the_formula(grid: KGrid) -> None:
    weight = random_k_weight(grid, rows=6, columns=512)
    found = weight.dequantize(torch.float32)
    for row, column in ((0, 0), (1, 511), (2, 17), (3, 256), (4, 40), (5, 300)):
        block, super_block = column // grid.block, column // 256
        step = np.float32(weight.d[row, super_block]) * np.float32(weight.scales[row, block])
        value = step * np.float32(int(weight.codes[row, column]) - grid.zero)
        if grid.has_mins:
            value -= np.float32(weight.dmin[row, super_block]) * np.float32(weight.mins[row, block])
        assert found[row, column] == value
    assert torch.equal(weight.dequantize(torch.bfloat16), found.bfloat16())


@every_grid
def test_tensors_and_files_give_it_back(grid: KGrid, tmp_path) -> None:
    weight = random_k_weight(grid)
    assert equal(KQuantWeight.from_tensors(weight.to_tensors()), weight)
    save_layer(tmp_path / "one.safetensors", weight)
    loaded = load_layer(tmp_path / "one.safetensors")
    assert isinstance(loaded, KQuantWeight)
    assert equal(loaded, weight)
    form = load_form(tmp_path / "one.safetensors")
    assert (form.label, form.shape, form.stored_bits) == (weight.label, weight.shape, weight.stored_bits)


def test_a_missing_tensor_is_named() -> None:
    tensors = random_k_weight(K_GRIDS["q4_k"]).to_tensors()
    del tensors["mins"], tensors["d"]
    with pytest.raises(ModelError, match="tensor mins, d is missing"):
        KQuantWeight.from_tensors(tensors)


@every_grid
def test_rows_are_taken_and_joined(grid: KGrid) -> None:
    weight = random_k_weight(grid)
    parts = [weight.take_rows(torch.arange(first, min(first + 10, 24))) for first in (0, 10, 20)]
    assert equal(KQuantWeight.joined(parts), weight)
    assert equal(KQuantWeight.joined(parts[:1]), parts[0])
    order = torch.arange(24).flip(0)
    found = weight.take_rows(order).dequantize(torch.float32)
    assert torch.equal(found, weight.dequantize(torch.float32)[order])


@every_grid
def test_empty_has_the_shapes_of_a_weight(grid: KGrid) -> None:
    weight, empty = random_k_weight(grid), KQuantWeight.empty(24, 768, grid, torch.device("meta"))
    for name, tensor in weight.to_tensors().items():
        if name != "format":
            assert (getattr(empty, name).shape, getattr(empty, name).dtype) == (tensor.shape, tensor.dtype), name
