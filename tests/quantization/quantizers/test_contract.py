"""The contract of every quantizer, for all of them, all bit-widths, group sizes and scale dtypes."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from jointq_cases import PLAIN
from torch import Tensor

from jointq_cli.errors import ConfigError, NumericsError
from jointq_cli.kernels.hadamard import orthogonal_hadamard
from jointq_cli.quantization.quantizers import GPTQ, RTN, JointQ, Quantizer, Solution
from jointq_cli.quantization.quantizers.base import ROWS
from jointq_cli.quantization.quantizers.statistics import HeldOut
from jointq_cli.quantization.quantizers.uniform import UniformQuantizer
from jointq_cli.recipe import concrete, schemas
from jointq_cli.setting_rules import default_of

OPTIONS: dict[type[Quantizer], dict[str, Any]] = {
    GPTQ: {"block_size": 16},
    JointQ: {name: value for name, value in vars(PLAIN).items() if name not in ("bits", "group_size", "symmetric")},
}
"""What the tests need other than the defaults. A quantizer without an entry is tested with its defaults."""

schemas()  # imports every module of quantizers/
EVERY = [kind for kind in concrete(Quantizer) if kind.__module__.startswith("jointq_cli.")]  # tests have their own
KINDS = [kind for kind in EVERY if issubclass(kind, UniformQuantizer)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


FRACTIONAL = ("half", "real")


def build(kind: type[Quantizer], bits: int, group_size: int | None, symmetric: bool, **options: Any) -> Quantizer:
    return kind(bits=bits, group_size=group_size, symmetric=symmetric, **(OPTIONS.get(kind, {}) | options))


def layer(out_features: int = 12, in_features: int = 48, seed: int = 0) -> tuple[Tensor, Tensor]:
    """weight (out, in) float32 and the Hessian (in, in) of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(in_features, in_features, generator=generator, dtype=torch.float64)
    inputs = torch.randn(4 * in_features, in_features, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(out_features, in_features, generator=generator)
    return weight, inputs.T @ inputs / len(inputs)


def solve(quantizer: Quantizer, weight: Tensor, hessian: Tensor, dtype: torch.dtype = torch.float32) -> Solution:
    return quantizer.quantize(weight, quantizer.prepare(hessian), dtype)


def test_every_quantizer_of_the_package_is_under_this_contract() -> None:
    assert {RTN, GPTQ, JointQ} <= set(KINDS)


@pytest.mark.parametrize("kind", EVERY)
def test_a_quantizer_of_any_form_keeps_what_the_loop_relies_on(kind: type[Quantizer]) -> None:
    weight, hessian = layer(32, 256)
    quantizer = kind()
    quantizer.check({"layer": 256})
    prepared = quantizer.prepare(hessian)
    before = hessian.clone(), weight.clone()
    solution = quantizer.quantize(weight, prepared, torch.bfloat16)
    quantized, storage = solution.quantized, quantizer.storage(32, 256, torch.bfloat16)
    assert quantized.shape == storage.shape == weight.shape
    assert (quantized.stored_bits, quantized.file_bytes) == (storage.stored_bits, storage.file_bytes)
    assert (quantized.kind, quantized.label) == (storage.kind, storage.label)
    assert quantized.dequantize(torch.bfloat16).isfinite().all()
    assert quantized.difference(quantizer.quantize(weight, prepared, torch.bfloat16).quantized) == []
    assert quantized.difference(type(quantized).from_tensors(quantized.to_tensors())) == []
    if quantizer.row_separable:
        parts = [quantizer.quantize(part, prepared, torch.bfloat16) for part in weight.split(ROWS)]
        assert quantizer.join(parts).quantized.difference(quantized) == []
    assert torch.equal(hessian, before[0])
    assert torch.equal(weight, before[1])
    assert quantizer.cost(32, 256, 100) > 0
    assert quantizer.describe().count("\n") == 0
    with pytest.raises(NumericsError, match="weight holds NaN or Inf"):
        quantizer.quantize(weight.log(), prepared, torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_without_input_is_rounded_to_nearest_whatever_happens_on_failure(kind: type[Quantizer]) -> None:
    weight, hessian = layer()
    solution = solve(build(kind, 4, 16, False), weight, torch.zeros_like(hessian))
    plain = solve(build(RTN, 4, 16, False), weight, hessian)
    assert (solution.verdict, solution.damping) == ("no input", None)
    assert torch.equal(solution.quantized.dequantize(torch.float32), plain.quantized.dequantize(torch.float32))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_a_solution_has_the_shapes_dtypes_and_ranges_of_the_contract(
    kind: type[Quantizer], bits: int, symmetric: bool
) -> None:
    weight, hessian = layer()
    before = hessian.clone(), weight.clone()
    for group_size, dtype in itertools.product([None, -1, 1, 8, 24, 48], DTYPES):
        quantizer = build(kind, bits, group_size, symmetric, zero_point="integer")
        solution = solve(quantizer, weight, hessian, dtype)
        quantized = solution.quantized
        groups = 1 if group_size in (None, -1) else 48 // (group_size or 48)
        assert quantized.codes.shape == weight.shape
        assert quantized.codes.dtype == (torch.int8 if symmetric else torch.uint8)
        assert quantized.scale.shape == quantized.zero_point.shape == (12, groups)
        assert (quantized.scale.dtype, quantized.zero_point.dtype) == (dtype, torch.uint8)
        assert (quantized.scale > 0).all()
        assert quantizer.integer_grid.lowest <= int(quantized.codes.min())
        assert int(quantized.codes.max()) <= quantizer.integer_grid.highest
        assert int(quantized.zero_point.max()) <= (0 if symmetric else quantizer.integer_grid.highest)
        if quantized.permutation is not None:
            assert quantized.permutation.dtype == torch.int32
            assert quantized.permutation.sort().values.tolist() == list(range(48))
        assert quantized.dequantize(dtype).isfinite().all()
        assert solution.verdict == "ok"
    assert torch.equal(hessian, before[0])
    assert torch.equal(weight, before[1])


@pytest.mark.parametrize("zero_point", FRACTIONAL)
@pytest.mark.parametrize("kind", KINDS)
def test_zero_points_that_are_no_integers_keep_the_contract(kind: type[Quantizer], zero_point: str) -> None:
    weight, hessian = layer(32, 96)
    weight[3] = 0
    errors = []
    for bits, dtype in itertools.product((1, 2, 4), DTYPES):
        quantizer = build(kind, bits, 24, False, zero_point=zero_point, **({"block_size": 96} if kind is GPTQ else {}))
        quantized, storage = solve(quantizer, weight, hessian, dtype).quantized, quantizer.storage(32, 96, dtype)
        assert (quantized.stored_bits, quantized.file_bytes) == (storage.stored_bits, storage.file_bytes)
        assert quantized.label == storage.label == f"W{bits} g24 {zero_point}" in quantizer.describe()
        assert quantized.difference(type(quantized).from_tensors(quantized.to_tensors())) == []
        assert quantized.dequantize(torch.float32)[3].abs().max() < 1e-6
        apart = [solve(quantizer, part, hessian, dtype).quantized for part in weight.split(ROWS)]
        assert type(quantized).joined(apart).difference(quantized) == []
        scaled = solve(quantizer, weight * 2.0**-4, hessian * 2.0**30, dtype).quantized
        others = weight.any(1)
        assert torch.equal(scaled.take_rows(others).codes, quantized.take_rows(others).codes)
        assert torch.equal(scaled.dequantize(torch.float32)[others], quantized.dequantize(torch.float32)[others] / 16)
        error = quantized.dequantize(torch.float64) - weight
        errors.append(float(torch.trace(error @ hessian @ error.T)))
    assert errors[::3] == sorted(errors[::3], reverse=True)


@pytest.mark.parametrize("kind", KINDS)
def test_half_integer_levels_of_one_bit_beat_integers_and_real_zero_points_serve_shifted_groups(
    kind: type[Quantizer],
) -> None:
    weight, hessian = layer()

    def error(weight: Tensor, bits: int, zero_point: str) -> float:
        quantizer = build(kind, bits, 24, False, zero_point=zero_point)
        found = solve(quantizer, weight, hessian).quantized.dequantize(torch.float64) - weight
        return float(torch.trace(found @ hessian @ found.T))

    assert error(weight, 1, "half") < 0.75 * error(weight, 1, "integer")
    assert error(weight + 3.0, 2, "real") < 0.75 * min(error(weight + 3.0, 2, zero) for zero in ("integer", "half"))


@pytest.mark.parametrize("kind", KINDS)
def test_incoherence_solves_the_turned_layer_with_the_penalty_of_the_original(kind: type[Quantizer]) -> None:
    weight, hessian = layer(32, 96)
    loud = torch.ones(96, dtype=torch.float64)
    loud[5::24] = 20.0
    weight, hessian = (weight / loud).float(), hessian * loud[:, None] * loud
    plain = build(kind, 2, 24, False, zero_point="half")
    quantizer = dataclasses.replace(plain, incoherence="input")
    solution = solve(quantizer, weight, hessian, torch.bfloat16)
    found, storage = solution.quantized, quantizer.storage(32, 96, torch.bfloat16)
    assert (found.stored_bits, found.file_bytes, found.label) == (
        storage.stored_bits,
        storage.file_bytes,
        "W2 g24 half turned",
    )
    assert "W2 g24 half turned" in quantizer.describe()

    basis = torch.diag(found.signs.double()) @ orthogonal_hadamard(96)
    ridge = plain.ridge(hessian)
    metric = hessian if ridge is None else hessian + torch.diag(ridge)
    inner = plain if ridge is None else dataclasses.replace(plain, regularization_lambda=0.0)
    expected = solve(inner, (weight.double() @ basis).float(), basis.T @ metric @ basis, torch.bfloat16).quantized
    assert (found.inner.codes != expected.codes).double().mean() < 0.02  # of other rounding
    assert ridge is None or torch.equal(ridge, quantizer.ridge(hessian))

    def error(solution: Solution) -> float:
        difference = solution.quantized.dequantize(torch.float64) - weight
        return float(torch.trace(difference @ hessian @ difference.T))

    assert error(solution) < 0.9 * error(solve(plain, weight, hessian, torch.bfloat16))
    apart = [solve(quantizer, part, hessian, torch.bfloat16).quantized for part in weight.split(ROWS)]
    assert type(found).joined(apart).difference(found) == []
    other = dataclasses.replace(quantizer, incoherence_seed=1)
    assert solve(other, weight, hessian, torch.bfloat16).quantized.difference(found) != []
    silent = solve(quantizer, weight, 0 * hessian, torch.bfloat16)
    assert (silent.verdict, silent.quantized.label) == ("no input", found.label)


def test_incoherence_is_refused_where_it_has_no_meaning() -> None:
    with pytest.raises(ConfigError, match=r"quantizer.grid=q4_k: does not go with incoherence=input"):
        GPTQ(grid="q4_k", incoherence="input")
    with pytest.raises(ConfigError, match=r"quantizer.lambda_mode=heldout: incoherence=input works with fixed_lambda"):
        JointQ(lambda_mode="heldout", incoherence="input")
    blocks = GPTQ(group_size=24, incoherence="input", incoherence_block=32)
    with pytest.raises(ConfigError, match=r"incoherence_block=32: in_features must be a multiple of 32, .*q \(48\)"):
        blocks.check({"q": 48, "o": 96})


def test_levels_around_zero_are_asked_for_in_one_way() -> None:
    for zero_point in FRACTIONAL:
        with pytest.raises(ConfigError, match=f"quantizer.zero_point={zero_point}: does not go with symmetric=true"):
            RTN(symmetric=True, zero_point=zero_point)
    assert RTN(symmetric=True, zero_point="integer").describe() == "RTN W4 g128 symmetric mse"


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_more_bits_err_less(kind: type[Quantizer], symmetric: bool) -> None:
    weight, hessian = layer()
    errors = []
    for bits in range(1, 9):
        error = solve(build(kind, bits, 24, symmetric), weight, hessian).quantized.dequantize(torch.float64) - weight
        errors.append(float(torch.trace(error @ hessian @ error.T)))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_inputs_times_powers_of_two_keep_their_codes(kind: type[Quantizer], symmetric: bool) -> None:
    weight, hessian = layer()
    quantizer = build(kind, 3, 16, symmetric)
    plain = solve(quantizer, weight, hessian, torch.bfloat16).quantized
    for weight_factor, hessian_factor in itertools.product([2.0**-23, 2.0**13], [2.0**-40, 1.0, 2.0**30]):
        scaled = solve(quantizer, weight * weight_factor, hessian * hessian_factor, torch.bfloat16).quantized
        assert torch.equal(scaled.codes, plain.codes)
        assert torch.equal(scaled.zero_point, plain.zero_point)
        assert torch.equal(scaled.scale, plain.scale * weight_factor)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_call_twice_gives_the_same_bits(kind: type[Quantizer]) -> None:
    weight, hessian = layer(64, 96)
    quantizer = build(kind, 4, 32, False)
    first, second = (solve(quantizer, weight, hessian).quantized.to_tensors() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_quantised_alike_whatever_the_other_rows(kind: type[Quantizer]) -> None:
    weight, hessian = layer(64, 96)
    quantizer = build(kind, 4, 32, False, **({"block_size": 96} if kind is GPTQ else {}))
    together = solve(quantizer, weight, hessian).quantized.codes
    apart = [solve(quantizer, part, hessian).quantized.codes for part in weight.split([1, 20, 43])]
    assert torch.equal(torch.cat(apart), together)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_row_stays_empty_and_the_others_do_not_notice(kind: type[Quantizer]) -> None:
    weight, hessian = layer()
    quantizer = build(kind, 4, 16, False)
    plain = solve(quantizer, weight, hessian).quantized.codes
    weight[3] = 0
    solution = solve(quantizer, weight, hessian)
    assert (solution.quantized.dequantize(torch.float32)[3] == 0).all()
    assert torch.equal(solution.quantized.codes[4:], plain[4:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_not_finite_is_an_error(kind: type[Quantizer], bad: float) -> None:
    weight, hessian = layer()
    weight[2, 5] = bad
    with pytest.raises(NumericsError, match="weight holds NaN or Inf"):
        solve(build(kind, 4, 16, False), weight, hessian)


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_are_checked_when_the_config_is_built(kind: type[Quantizer]) -> None:
    for bits in (-1, 0, 9):
        with pytest.raises(ConfigError, match=rf"quantizer.bits={bits}: must be from 1 to 8"):
            build(kind, bits, 128, False)
    with pytest.raises(ConfigError, match=r"quantizer.group_size=0: must be positive"):
        build(kind, 4, 0, False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_size_that_does_not_divide_is_refused(kind: type[Quantizer]) -> None:
    weight, hessian = layer()
    with pytest.raises(ConfigError, match=r"quantizer.group_size=20: must divide in_features"):
        solve(build(kind, 4, 20, False), weight, hessian)


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_tokens_are_taken_and_no_harm_where_they_are_not_asked_for(kind: type[Quantizer]) -> None:
    weight, hessian = layer()
    quantizer = build(kind, 4, 16, False)
    assert quantizer.heldout == 0.0
    prepared = quantizer.prepare(hessian, HeldOut(hessian, 0.5))
    plain = solve(quantizer, weight, hessian).quantized
    assert torch.equal(quantizer.quantize(weight, prepared, torch.float32).quantized.codes, plain.codes)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, {}) for kind in KINDS]
    + [(kind, {"act_order": not default}) for kind, default in ((GPTQ, True), (JointQ, PLAIN.act_order))],
)
def test_storage_is_known_from_shapes_alone(
    kind: type[Quantizer], options: dict[str, Any], bits: int, symmetric: bool
) -> None:
    weight, hessian = layer()
    for group_size, dtype in itertools.product([None, -1, 1, 8, 24, 48], DTYPES):
        quantizer = build(kind, bits, group_size, symmetric, **options)
        storage, solved = quantizer.storage(12, 48, dtype), solve(quantizer, weight, hessian, dtype).quantized
        assert storage.stored_bits == solved.stored_bits == round(solved.bits_per_weight * 12 * 48)
        assert (storage.file_bytes, storage.label) == (solved.file_bytes, solved.label)


def test_static_groups_store_no_permutation() -> None:
    weight, hessian = layer()
    quantizer = build(GPTQ, 4, 8, False, static_groups=True)
    assert (
        quantizer.storage(12, 48, torch.float16).stored_bits
        == solve(quantizer, weight, hessian, torch.float16).quantized.stored_bits
        == 12 * 48 * 4 + 12 * 6 * (16 + 4)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_quantizers_with_the_same_prepare_key_share_what_is_prepared(kind: type[Quantizer]) -> None:
    weight, hessian = layer()
    first, second = build(kind, 4, 16, False, zero_point="half"), build(kind, 2, 16, True)
    assert first.prepare_key == second.prepare_key != build(kind, 4, 24, False).prepare_key
    shared = second.quantize(weight, first.prepare(hessian), torch.float32).quantized
    assert shared.difference(solve(second, weight, hessian).quantized) == []


@pytest.mark.parametrize("kind", KINDS)
def test_more_weights_cost_more(kind: type[Quantizer]) -> None:
    quantizer = build(kind, 4, 16, False)
    assert 0 < quantizer.cost(16, 16, 100) < quantizer.cost(32, 16, 100) < quantizer.cost(32, 32, 100)


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_of_the_config_has_a_default(kind: type[Quantizer]) -> None:
    assert all(default_of(option) is not dataclasses.MISSING for option in dataclasses.fields(kind))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_finds_solutions_as_good_as_the_cpu(kind: type[Quantizer]) -> None:
    weight, hessian = layer(64, 256)
    quantizer = build(kind, 4, 64, False)
    errors = []
    for device in ("cpu", "cuda"):
        solution = solve(quantizer, weight.to(device), hessian.to(device), torch.bfloat16)
        assert solution.quantized.codes.device.type == device
        error = solution.quantized.dequantize(torch.float64).cpu() - weight
        errors.append(float(torch.trace(error @ hessian @ error.T)))
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


def test_a_description_names_what_matters() -> None:
    assert build(RTN, 4, 128, False).describe() == "RTN W4 g128 asymmetric mse"
    assert build(RTN, 8, -1, True, mse=False).describe() == "RTN W8 per-channel symmetric"
    assert build(GPTQ, 3, 64, False).describe() == "GPTQ W3 g64 asymmetric mse act_order damping=0.01"


@pytest.mark.parametrize("kind", KINDS)
def test_auto_means_half_integers_with_one_bit_and_with_two_in_a_turned_basis(kind: type[Quantizer]) -> None:
    weight, hessian = layer()
    expected = {
        (1, "none"): "half",
        (2, "none"): "asymmetric",
        (2, "input"): "half turned",
        (3, "input"): "asymmetric turned",
    }
    for (bits, incoherence), label in expected.items():
        quantizer = build(kind, bits, 24, False, incoherence=incoherence)
        assert f"W{bits} g24 {label}" in quantizer.describe()
        stated = build(
            kind, bits, 24, False, incoherence=incoherence, zero_point=label.split()[0].replace("asymmetric", "integer")
        )
        found = [solve(each, weight, hessian, torch.bfloat16).quantized for each in (quantizer, stated)]
        assert found[0].difference(found[1]) == []
    assert build(kind, 1, 24, True).describe().count("symmetric") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_of_a_turned_basis_is_stated_where_there_is_one(kind: type[Quantizer]) -> None:
    assert build(kind, 2, 24, False, incoherence="input", incoherence_seed=7).seeds == {"quantizer.incoherence_seed": 7}
    assert build(kind, 2, 24, False).seeds == {}
