"""The product of two sign matrices as it is stored, against the matrices that it stands for."""

from pathlib import Path

import pytest
import torch

from jointq_cli.errors import ModelError
from jointq_cli.formats import BinaryProduct
from jointq_cli.formats.binary_product import largest_rank, packed_signs, unpacked_signs
from jointq_cli.formats.layer_file import load_form, load_layer, save_layer


def random_signs(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(2, (rows, columns), generator=torch.Generator().manual_seed(rows)).float() * 2 - 1


@pytest.mark.parametrize("shape", [(3, 16), (5, 13), (1, 1), (7, 8)])
def test_signs_come_back_from_one_bit_each(shape: tuple[int, int]) -> None:
    signs = random_signs(*shape)
    packed = packed_signs(signs)
    assert packed.shape == (shape[0], -(-shape[1] // 8))
    assert torch.equal(unpacked_signs(packed, shape[1]).float(), signs)
    assert packed_signs(torch.tensor([[1.0, -1, -1, 1, -1, -1, -1, -1, 1]])).tolist() == [[0b1001, 1]]


def stored(rank: int = 9, out_features: int = 24, in_features: int = 40) -> tuple[BinaryProduct, torch.Tensor]:
    """With the matrix that it stands for, float64."""
    left, right = random_signs(out_features, rank), random_signs(rank, in_features)
    generator = torch.Generator().manual_seed(0)
    a, d, b = (torch.rand(n, generator=generator).bfloat16() for n in (out_features, rank, in_features))
    found = BinaryProduct(packed_signs(left.T), packed_signs(right), a, d, b)
    return found, torch.diag(a.double()) @ left.double() @ torch.diag(d.double()) @ right.double() @ torch.diag(
        b.double()
    )


def test_the_value_is_the_product() -> None:
    found, expected = stored()
    assert torch.allclose(found.dequantize(torch.float64), expected, rtol=0, atol=1e-12)
    assert torch.equal(found.dequantize(torch.bfloat16), expected.to(torch.bfloat16))
    assert (found.shape, found.label) == ((24, 40), "DBF rank 9")
    assert found.record_fields()["bits"] is None


def test_its_file_has_the_bytes_that_are_counted(tmp_path: Path) -> None:
    found, _ = stored()
    save_layer(tmp_path / "layer.safetensors", found)
    back = load_layer(tmp_path / "layer.safetensors")
    assert isinstance(back, BinaryProduct)
    assert back.difference(found) == []
    assert torch.equal(back.dequantize(torch.bfloat16), found.dequantize(torch.bfloat16))
    form = load_form(tmp_path / "layer.safetensors")
    assert (form.stored_bits, form.label, form.shape) == (found.stored_bits, found.label, found.shape)
    assert found.stored_bits == 8 * found.file_bytes == 9 * (24 + 40) + 16 * (24 + 9 + 40)
    header = int.from_bytes((tmp_path / "layer.safetensors").read_bytes()[:8], "little")
    assert (tmp_path / "layer.safetensors").stat().st_size == 8 + header + found.file_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 64), (13, 50), (200, 24)])
def test_the_rank_is_the_largest_that_the_bits_allow(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for bits in (4.0, 5.5, 8.0):
        rank = largest_rank(bits, *shape, dtype)
        sizes = [
            BinaryProduct.empty(each, *shape, dtype, torch.device("meta")).bits_per_weight for each in (rank, rank + 1)
        ]
        assert sizes[0] <= bits < sizes[1]


def test_a_missing_tensor_is_named() -> None:
    tensors = stored()[0].to_tensors()
    del tensors["rank_scale"]
    with pytest.raises(ModelError, match="tensor rank_scale is missing"):
        BinaryProduct.from_tensors(tensors)
