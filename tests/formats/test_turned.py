"""The stored form in a turned basis, against the matrix that it stands for."""

import pytest
import torch

from jointq_cli.errors import ModelError
from jointq_cli.formats.turned import TurnedWeight, random_signs, turned
from jointq_cli.kernels.hadamard import hadamard_transform, orthogonal_hadamard
from jointq_cli.quantization.quantizers import RTN, Prepared


def stored(columns: int, block: int | None = None) -> TurnedWeight:
    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(0))
    rtn = RTN(bits=3, group_size=None, incoherence="input", incoherence_block=block)
    found = rtn.quantize(weight, Prepared(), torch.bfloat16).quantized
    assert rtn.storage(6, columns, torch.bfloat16).label == found.label
    assert isinstance(found, TurnedWeight)
    return found


@pytest.mark.parametrize(
    ("columns", "block"),
    # of the matrix itself, Paley's two constructions, products, doubling; then of the same signs again
    [(7, None), (12, None), (36, None), (48, None), (128, None), (48, 12), (36, 36)],
)
def test_the_value_is_that_of_the_codes_in_the_basis_of_signs_and_a_hadamard_matrix(
    columns: int, block: int | None
) -> None:
    found = stored(columns, block)
    size = block or columns
    assert len(found.signs) == size
    one = torch.diag(found.signs.double()) @ orthogonal_hadamard(size)
    basis = torch.block_diag(*[one] * (columns // size))
    expected = found.inner.dequantize(torch.float64) @ basis.T
    assert torch.allclose(found.dequantize(torch.float64), expected, rtol=0, atol=1e-12)
    rows = torch.randn(3, columns, dtype=torch.float64)
    assert torch.allclose(turned(rows, found.signs), rows @ basis, rtol=0, atol=1e-12)
    assert torch.allclose(hadamard_transform(hadamard_transform(rows), transposed=True), rows, rtol=0, atol=1e-12)


def test_everything_that_decodes_it_is_stored_and_counted() -> None:
    found = stored(48)
    back = TurnedWeight.from_tensors(found.to_tensors())
    assert back.difference(found) == []
    assert torch.equal(back.dequantize(torch.bfloat16), found.dequantize(torch.bfloat16))
    assert found.label == "W3 per-channel asymmetric turned"
    assert found.stored_bits == 6 * 48 * 3 + 6 * (16 + 3) + 48
    assert found.record_fields()["bits_per_weight"] == found.bits_per_weight
    assert stored(48, 12).label == "W3 per-channel asymmetric turned b12"
    both = TurnedWeight.joined([found, back])
    assert torch.equal(both.dequantize(torch.float32)[6:], found.dequantize(torch.float32))
    tensors = found.to_tensors()
    del tensors["signs"]
    with pytest.raises(ModelError, match="signs"):
        TurnedWeight.from_tensors(tensors)


def test_signs_are_those_of_the_seed() -> None:
    one, same, other = (random_signs(64, seed, torch.device("cpu")) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert set(one.tolist()) == {1, -1}
    assert 10 < int((one != other).sum()) < 54
