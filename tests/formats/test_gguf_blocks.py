"""GGUF's blocks: what the gguf package decodes of ours, and which grids each kind holds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ggml_library import quantized
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from torch import Tensor

from jointq_cli.errors import ModelError
from jointq_cli.formats.export.gguf_blocks import (
    TOLERANCE,
    bits_of,
    check_kind,
    encode_blocks,
    encode_plain,
    natural_kind,
)
from jointq_cli.formats.uniform import Grid, UniformWeight

BLOCK_KINDS = (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0)


def random_weight(
    bits: int, symmetric: bool, group_size: int = 32, columns: int = 128, dtype: torch.dtype = torch.bfloat16
) -> UniformWeight:
    """With every code and zero-point, and with scales over the range in which bfloat16 is exact in float16."""
    generator, grid, rows = torch.Generator().manual_seed(bits), Grid(bits, symmetric), 120
    groups = columns // group_size
    codes = torch.randint(grid.lowest, grid.highest + 1, (rows, columns), generator=generator)
    highest_zero = 0 if symmetric else grid.highest
    zero_point = torch.randint(0, highest_zero + 1, (rows, groups), generator=generator)
    exponents = torch.linspace(-17, 10, rows)[:, None] + torch.rand(rows, groups, generator=generator)
    scale = torch.exp2(exponents).to(dtype)
    return UniformWeight(codes.to(grid.code_dtype), scale, zero_point.byte(), None, bits, symmetric)


def error_in_steps(weight: UniformWeight, kind: Kind) -> float:
    encoded = encode_blocks(weight, kind)
    assert encoded.shape == (weight.shape[0], weight.shape[1] * bits_of(kind) / 8)
    assert encoded.dtype == np.uint8
    found = torch.from_numpy(dequantize(encoded, kind))
    steps = weight.scale.float().repeat_interleave(weight.group_size, dim=1)
    return float(((found - weight.dequantize(torch.float32)) / steps).abs().max())


def refusals(weight: UniformWeight) -> dict[Kind, str]:
    found = {kind: check_kind(weight, kind) for kind in BLOCK_KINDS}
    return {kind: reason for kind, reason in found.items() if reason is not None}


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (5, True), (5, False), (7, False), (8, True)])
def test_the_gguf_package_decodes_what_a_kind_holds(bits: int, symmetric: bool) -> None:
    weights = [random_weight(bits, symmetric, size) for size in (32, 64, 128)]
    held = set(BLOCK_KINDS) - refusals(weights[0]).keys()
    assert held
    for kind in held:
        errors = [error_in_steps(weight, kind) for weight in weights]
        if symmetric or kind not in TOLERANCE:
            assert errors == [0, 0, 0]
        else:
            assert 0 < max(errors) <= TOLERANCE[kind]


@pytest.mark.parametrize(("kind", "bits"), [(Kind.Q4_1, 4), (Kind.Q5_1, 5)])
def test_the_bound_of_the_offset_holds_for_every_float16_scale(kind: Kind, bits: int) -> None:
    """All significands, with exponents down to those at which float16 has fewer bits of them."""
    significands = torch.arange(1024, 2048)
    scale = torch.cat([significands * 2.0**exponent for exponent in (-12, -22, -26, -30)])
    scale = scale[scale.half() == scale]
    zero_point = torch.arange(1 << bits, dtype=torch.uint8).repeat(len(scale), 1)
    scale = scale[:, None].expand(zero_point.shape).half()
    weight = UniformWeight(
        torch.zeros(len(scale), 32 << bits, dtype=torch.uint8), scale, zero_point, None, bits, symmetric=False
    )
    assert 0.97 * TOLERANCE[kind] < error_in_steps(weight, kind) <= TOLERANCE[kind]


def on_meta(weight: UniformWeight) -> UniformWeight:
    """As exporters see it before they load it."""
    return replace(weight, **{name: getattr(weight, name).to("meta") for name in ("codes", "scale", "zero_point")})


@pytest.mark.parametrize(
    ("bits", "symmetric", "natural", "further"),
    [
        (4, True, Kind.Q4_0, {Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0}),
        (4, False, Kind.Q4_1, {Kind.Q5_0, Kind.Q5_1, Kind.Q8_0}),
        (5, True, Kind.Q5_0, {Kind.Q5_1, Kind.Q8_0}),
        (5, False, Kind.Q5_1, {Kind.Q8_0}),
        (6, True, Kind.Q8_0, set()),
        (6, False, Kind.Q8_0, set()),
        (7, False, Kind.Q8_0, set()),
        (8, True, Kind.Q8_0, set()),
    ],
)
def test_kinds_of_a_grid(bits: int, symmetric: bool, natural: Kind, further: set[Kind]) -> None:
    weight = on_meta(random_weight(bits, symmetric))
    assert natural_kind(weight) == natural
    assert set(BLOCK_KINDS) - refusals(weight).keys() == {natural} | further


def test_what_no_kind_holds() -> None:
    assert refusals(on_meta(random_weight(8, False)))[Kind.Q8_0] == (
        "W8 g32 asymmetric needs 511 levels, and Q8_0 has 256; quantizer.symmetric=true"
    )
    assert refusals(on_meta(random_weight(4, False)))[Kind.Q4_0] == (
        "W4 g32 asymmetric needs 31 levels, and Q4_0 has 16; quantizer.symmetric=true or type q4_1"
    )
    assert refusals(on_meta(random_weight(5, True)))[Kind.Q4_0].endswith("Q4_0 has 16; type q5_0")
    assert refusals(on_meta(random_weight(8, False)))[Kind.Q4_0].endswith("Q4_0 has 16")
    for bits in (1, 2, 3):
        weight = on_meta(random_weight(bits, True))
        assert refusals(weight)[Kind.Q4_0] == (
            f"Q4_0 holds W{bits} g32 symmetric at 4.5 bits, nothing is gained; bits=4"
        )
        assert len(refusals(weight)) == len(refusals(on_meta(random_weight(bits, False)))) == len(BLOCK_KINDS)
    assert "group_size=48: blocks have 32 columns" in refusals(random_weight(4, True, 48, 96))[Kind.Q4_0]
    assert refusals(random_weight(4, True, 80, 80))[Kind.Q4_0] == "in_features=80: blocks have 32 columns"
    assert refusals(random_weight(4, True, 96, 96)) == {}


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (0.1, "scale 0.100000001: float16"),
        (2.0**-30, "scale 9.31322575e-10: float16, which GGUF stores, rounds it; export=compressed-tensors"),
        (1e5, "scale 100000: out of the range"),
        (8192.0, "scale \\* zero_point -122880: out of the range"),
    ],
)
def test_scales_that_float16_does_not_have(scale: float, message: str) -> None:
    weight = random_weight(4, False, dtype=torch.float32)
    changed = replace(weight, scale=torch.full_like(weight.scale, scale), zero_point=weight.zero_point * 0 + 15)
    with pytest.raises(ModelError, match=message):
        encode_blocks(changed, Kind.Q4_1)


def plain(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_tensors_are_rounded_as_the_gguf_package_does(kind: Kind, dtype: torch.dtype) -> None:
    tensor = plain(5000, 64, dtype=dtype)
    tensor[0] = 0
    encoded = encode_plain(tensor, kind)
    assert encoded.shape == (5000, 64 * bits_of(kind) / 8)
    assert np.array_equal(encoded, quantize(tensor.float().numpy(), kind).view(np.uint8))
    assert dequantize(encoded, kind).shape == (5000, 64)


def test_plain_tensors_of_one_dimension_and_beyond_float16() -> None:
    norm = plain(48, dtype=torch.bfloat16)
    assert np.array_equal(dequantize(encode_plain(norm, Kind.F32), Kind.F32), norm.float().numpy())
    with pytest.raises(ModelError, match="value -70144: out of the range of float16"):
        encode_plain(torch.tensor([1.0, -7e4], dtype=torch.bfloat16), Kind.F16)


@pytest.mark.parametrize("freedom", [3.0, 50.0])
def test_q6_k_rounds_plain_tensors_no_worse_than_llama_cpp(freedom: float) -> None:
    torch.manual_seed(0)
    tensor = torch.distributions.StudentT(freedom).sample((64, 512)).mul_(0.02).bfloat16()
    tensor[0] = 0
    values = tensor.float().numpy()
    ours, theirs = encode_plain(tensor, Kind.Q6_K), quantized(values, Kind.Q6_K)
    assert ours.shape == theirs.shape
    errors = [
        np.square(dequantize(blocks, Kind.Q6_K) - values).reshape(-1, 256).sum(axis=1) for blocks in (ours, theirs)
    ]
    assert errors[0].sum() < 0.98 * errors[1].sum()
    assert (errors[0] <= errors[1]).mean() > 0.95
    assert errors[0][:2].sum() == 0
