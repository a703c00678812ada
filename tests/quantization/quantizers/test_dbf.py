"""Double binary factorisation: each step against what it claims, tiny cases by brute force."""

import itertools
from dataclasses import replace

import pytest
import torch
from jointq_cases import layer, solve

from jointq_cli.errors import ConfigError, NumericsError
from jointq_cli.formats import BinaryProduct
from jointq_cli.quantization.quantizers import DBF
from jointq_cli.quantization.quantizers.dbf.descent import (
    Layer,
    descent,
    fit_in_scale,
    fit_out_scale,
    fit_rank_scale,
    search_left,
    search_right,
)
from jointq_cli.quantization.quantizers.dbf.factors import Factors, rank_one_modulus
from jointq_cli.quantization.quantizers.dbf.start import start
from jointq_cli.quantization.quantizers.scale_fit import scale_rounding

QUICK = DBF(bits=2.5, start_rounds=8, rounds=3)


def problem(out_features: int, in_features: int, rank: int, seed: int = 0) -> tuple[Layer, Factors]:
    """With factors that ADMM starts from."""
    weight, hessian = layer(out_features, in_features, seed)
    metric = QUICK.prepare(hessian).metric
    return (
        Layer(weight, metric, weight @ metric, scale_rounding(torch.bfloat16, 0)),
        start(weight, metric, rank, 8, seed),
    )


@pytest.mark.parametrize(("out_features", "in_features", "rank"), [(32, 48, 20), (48, 200, 33), (1, 8, 2)])
def test_no_step_raises_the_error(out_features: int, in_features: int, rank: int) -> None:
    given, first = problem(out_features, in_features, rank)
    costs = [given.cost(factors) for factors in (first, *descent(given, first, 4))]
    slack = 1e-6 * given.signal
    assert all(later <= earlier + slack for earlier, later in itertools.pairwise(costs))
    assert costs[-1] < 0.9 * costs[0] + slack


def test_scales_are_the_best_for_the_signs() -> None:
    given, factors = problem(24, 32, 12)
    for fit, name in ((fit_out_scale, "out_scale"), (fit_rank_scale, "rank_scale"), (fit_in_scale, "in_scale")):
        best = fit(given, factors)
        for sign in (1, -1):
            shift = 1 + sign * 0.01 * torch.randn(len(getattr(best, name)), generator=torch.Generator().manual_seed(1))
            assert given.cost(best) < given.cost(replace(best, **{name: getattr(best, name) * shift}))


def test_rows_are_solved_to_their_optimum() -> None:
    given, factors = problem(40, 24, 8)
    spread = (factors.scaled_right * factors.rank_scale[:, None]).double()
    metric, weight = given.metric.double(), given.weight.double()
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=8)), dtype=torch.float64)
    reached = signs @ spread
    energy, along = ((reached @ metric) * reached).sum(1), weight @ metric @ reached.T
    best = ((weight @ metric) * weight).sum(1) - (along.square() / energy).amax(1)
    error = weight - search_left(given, factors).values().double()
    costs = ((error @ metric) * error).sum(1)
    assert (costs > best * (1 - 1e-3)).all()
    assert ((costs / best) < 1.001).double().mean() > 0.5
    assert costs.sum() < 1.1 * best.sum()


def test_columns_are_solved_to_their_optimum() -> None:
    given, factors = problem(24, 40, 8)
    plain = replace(given, metric=torch.diag(given.metric.diagonal()))
    plain = replace(plain, correlation=plain.weight @ plain.metric)  # of columns that do not depend on each other
    left = (factors.scaled_left * factors.rank_scale).double()
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=8)), dtype=torch.float64)
    reached = (left @ signs.T)[:, :, None] * factors.in_scale
    best = (given.weight[:, None] - reached).square().sum(0).amin(0)
    found = search_right(plain, factors)
    costs = (given.weight - found.values()).double().square().sum(0)
    before = (given.weight - factors.values()).double().square().sum(0)
    assert (costs > best * (1 - 1e-4)).all()
    assert (costs <= before * (1 + 1e-5)).all()
    assert ((costs / best) < 1.001).double().mean() > 0.4


def test_the_whole_hessian_counts_and_the_penalty_is_the_one_that_qep_receives() -> None:
    weight, hessian = layer(48, 64, spread=2.0)
    prepared = QUICK.prepare(hessian)
    expected = hessian + torch.diag(QUICK.ridge(hessian))
    assert torch.allclose(prepared.metric.double() * prepared.unit, expected, rtol=1e-6, atol=0)

    def error(solved_for: torch.Tensor) -> float:
        difference = solve(QUICK, weight, solved_for).quantized.dequantize(torch.float64) - weight
        return float(((difference @ hessian) * difference).sum())

    assert error(hessian) < 0.9 * error(torch.diag(hessian.diagonal()))


def test_a_weight_of_the_form_is_found() -> None:
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randint(2, shape, generator=generator).float() * 2 - 1 for shape in ((64, 4), (4, 48)))
    a, d, b = (0.5 + torch.rand(size, generator=generator) for size in (64, 4, 48))
    weight, hessian = a[:, None] * left * d @ right * b, layer(1, 48)[1]
    found = solve(DBF(bits=1.4), weight, hessian)
    assert found.notes["rank"] >= 4
    difference = found.quantized.dequantize(torch.float64) - weight
    assert float(((difference @ hessian) * difference).sum()) < 0.02 * float(
        ((weight.double() @ hessian) * weight).sum()
    )


def test_more_bits_err_less_and_none_takes_more_than_asked() -> None:
    weight, hessian = layer(64, 96)
    errors = []
    for bits in (0.8, 1.5, 2.5, 4.0):
        found = solve(replace(QUICK, bits=bits), weight, hessian, torch.bfloat16)
        assert bits - 0.05 < found.quantized.bits_per_weight <= bits
        errors.append(float(found.notes["final_error"]))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05


def test_the_error_is_that_of_the_scales_as_they_are_stored() -> None:
    """Of a weight of the form, whose only error is that of its scales."""
    a, b = (0.01 + torch.rand(size, generator=torch.Generator().manual_seed(size)) for size in (64, 48))
    weight, hessian = torch.outer(a, b), layer(1, 48)[1]
    found = solve(DBF(bits=1.4, regularization_lambda=0.0), weight, hessian, torch.bfloat16)
    difference = found.quantized.dequantize(torch.float64) - weight
    expected = float(((difference @ hessian) * difference).sum()) / found.signal
    assert found.notes["final_error"] == pytest.approx(expected, rel=0.05)


def test_layers_times_powers_of_two_have_the_same_signs_and_any_number_of_threads_gives_the_same_bits() -> None:
    weight, hessian = layer(320, 40)
    plain = solve(QUICK, weight, hessian, torch.bfloat16).quantized
    scaled = solve(QUICK, weight * 2.0**-9, hessian * 2.0**20, torch.bfloat16).quantized
    assert isinstance(plain, BinaryProduct)
    assert isinstance(scaled, BinaryProduct)
    assert torch.equal(scaled.out_scale, plain.out_scale * 2.0**-9)
    assert replace(scaled, out_scale=plain.out_scale).difference(plain) == []
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = solve(QUICK, weight, hessian, torch.bfloat16).quantized
    finally:
        torch.set_num_threads(threads)
    assert again.difference(plain) == []


def test_zeros_do_no_harm() -> None:
    weight, hessian = layer(32, 48)
    weight[3], weight[:, 7] = 0, 0
    hessian[5], hessian[:, 5] = 0, 0
    found = solve(QUICK, weight, hessian, torch.float16).quantized.dequantize(torch.float32)
    assert found.isfinite().all()
    assert found[3].abs().max() < 1e-4
    silent = solve(QUICK, weight, 0 * hessian, torch.bfloat16)
    assert silent.verdict == "no input"
    empty = solve(QUICK, 0 * weight, hessian, torch.bfloat16)
    assert (empty.quantized.label, bool(empty.quantized.dequantize(torch.float32).any())) == (
        silent.quantized.label,
        False,
    )
    left, right = rank_one_modulus(torch.zeros(3, 4))
    assert not left.any()
    assert not right.any()


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    weight, hessian = layer(16, 32)
    with pytest.raises(ConfigError, match=r"quantizer.bits=1: must be at least 1.63 for a layer of 16 x 32"):
        solve(DBF(bits=1.0), weight, hessian, torch.bfloat16)
    with pytest.raises(ConfigError, match=r"quantizer.bits=0: must be above 0"):
        DBF(bits=0)
    hessian[3, 3] = float("nan")
    with pytest.raises(NumericsError, match="the Hessian holds NaN or Inf"):
        QUICK.prepare(hessian)
