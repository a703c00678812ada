"""JointQ where numbers are awkward: massive activations, singular Hessians, tiny and huge weights, NaN."""

import itertools
from typing import Any

import pytest
import torch
from jointq_cases import costs, jointq, layer, regularized, same, solve, starting
from torch import Tensor

from jointq_cli.errors import NumericsError
from jointq_cli.quantization.quantizers import GPTQ, RTN, Prepared
from jointq_cli.quantization.quantizers.jointq import metric
from jointq_cli.quantization.quantizers.jointq.quantizer import JointQPrepared
from jointq_cli.quantization.quantizers.uniform import FailedPreparation

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def share(solution: Any, weight: Tensor, hessian: Tensor) -> float:
    """Relative output error, in float64."""
    signal = ((weight.double() @ hessian) * weight).sum()
    return float(costs(solution, weight, hessian).sum() / signal)


def with_loud_direction(hessian: Tensor, loudness: float, *channels: int) -> Tensor:
    """As if every token had this much in addition, in these channels, or in all of them."""
    size = len(hessian)
    direction = torch.zeros(size, dtype=torch.float64)
    direction[list(channels) or list(range(size))] = loudness / (1 if channels else size**0.5)
    signs = torch.sign(torch.randn(size, generator=torch.Generator().manual_seed(9), dtype=torch.float64))
    return hessian + torch.outer(direction * signs, direction * signs)


# --- condition


@pytest.mark.parametrize("strength", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize(
    ("loudness", "channels"), [(1e3, (3, 77)), (1e4, (3, 77)), (1e6, (3, 77)), (1e4, ()), (1e5, ())]
)
def test_massive_activations_are_solved_as_well_as_others(
    loudness: float, channels: tuple[int, ...], strength: float
) -> None:
    """Conditions up to 1e16: the search knows its own error, and beats GPTQ, which factorises in float64."""
    weight, quiet = layer(32, 128)
    hessian = with_loud_direction(quiet, loudness, *channels)
    full = regularized(hessian, strength)
    solution = solve(jointq(regularization_lambda=strength), weight, hessian)
    assert solution.quantized.dequantize(torch.float32).isfinite().all()
    assert solution.notes["final_error"] == pytest.approx(share(solution, weight, full), rel=0.01)
    gptq = GPTQ(3, 16, False, True, True, False, 1e-10, 128, "error")
    assert share(solution, weight, full) < 0.95 * share(solve(gptq, weight, full), weight, full)


def test_float64_is_taken_where_float32_would_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = layer(32, 128)
    hessian = with_loud_direction(hessian, 1e5)

    def error(limit: float) -> float:
        monkeypatch.setattr(metric, "_WELL_CONDITIONED", limit)
        return float(costs(solve(jointq(), weight, hessian), weight, hessian).sum())

    default = error(metric._WELL_CONDITIONED)
    assert default == error(0.0)
    assert error(1e300) > 100 * default


def test_where_float32_is_taken_it_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a hundredth of float64: what the limit of the condition stands for."""
    weight, quiet = layer(32, 128)
    tried = 0
    for loudness, channels, strength in itertools.product((0.0, 3e2, 1e4, 3e4), [(3, 77), ()], (0.0, 1e-6, 0.5)):
        hessian = with_loud_direction(quiet, loudness, *channels)
        quantizer, full = jointq(regularization_lambda=strength), regularized(hessian, strength)
        prepared = quantizer.prepare(hessian)
        assert isinstance(prepared, JointQPrepared)
        if prepared.metric.full.dtype == torch.float64:
            continue
        tried += 1
        single = costs(quantizer.quantize(weight, prepared, torch.float32), weight, full).sum()
        with monkeypatch.context() as patch:
            patch.setattr(metric, "_WELL_CONDITIONED", 0.0)
            double = costs(solve(quantizer, weight, hessian), weight, full).sum()
        assert float(single) < 1.01 * float(double), (loudness, channels, strength)
    assert 6 <= tried < 24


def test_the_start_from_gptq_survives_massive_activations() -> None:
    weight, hessian = layer(32, 128)
    hessian = with_loud_direction(hessian, 1e4, 3, 77)
    gptq = share(solve(GPTQ(3, 16, False, True, False, False, 0.01, 128, "error"), weight, hessian), weight, hessian)
    assert share(solve(starting("enable_gptq"), weight, hessian), weight, hessian) < gptq


# --- dead, doubled and dependent columns

DEAD = torch.tensor([0, 9, 63])


@pytest.mark.parametrize(("reference", "strength"), [("absolute", 0.5), ("mean_diagonal", 0.5), ("absolute", 0.0)])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_dead_columns_round_to_nearest_and_do_not_disturb_the_others(
    act_order: bool, symmetric: bool, reference: str, strength: float
) -> None:
    weight, hessian = layer(32, 128)
    hessian[DEAD], hessian[:, DEAD] = 0, 0
    options = dict(bits=4, act_order=act_order, symmetric=symmetric, group_size=32)
    quantizer = jointq(**options, regularization_reference=reference, regularization_lambda=strength)
    solution = solve(quantizer, weight, hessian)
    assert (solution.verdict, solution.notes["dead_columns"]) == ("ok", 3)
    quantized = solution.quantized
    scale = quantized.scale[:, quantized.column_groups()][:, DEAD]
    error = (quantized.dequantize(torch.float32) - weight)[:, DEAD].abs() / scale
    codes = quantized.codes[:, DEAD]
    at_the_edge = (codes == quantizer.integer_grid.lowest) | (codes == quantizer.integer_grid.highest)
    assert (at_the_edge | (error < 0.5001)).double().mean() > 0.95
    assert error.max() < 3
    still = weight.clone()
    still[:, DEAD] = 0.0
    assert share(solution, weight, hessian) < 1.1 * share(solve(quantizer, still, hessian), still, hessian)


@pytest.mark.parametrize("strength", [0.0, 0.5])
@pytest.mark.parametrize("act_order", [False, True])
def test_columns_that_are_twins_are_solved(act_order: bool, strength: float) -> None:
    weight, hessian = layer(32, 64)
    twins = torch.arange(64).repeat(2)
    weight, hessian = torch.cat([weight, weight.flip(0)], dim=1), hessian[twins][:, twins]
    quantizer = jointq(act_order=act_order, regularization_lambda=strength)
    solution = solve(quantizer, weight, hessian)
    assert solution.verdict == ("ok" if strength else "damped")
    assert share(solution, weight, hessian) < 0.6 * share(
        solve(RTN(3, 16, False, True), weight, hessian), weight, hessian
    )


@pytest.mark.parametrize(("tokens", "most"), [(8, 0.01), (64, 0.15), (127, 0.5)])
def test_fewer_tokens_than_columns_are_solved_with_and_without_lambda(tokens: int, most: float) -> None:
    weight, hessian = layer(32, 128, tokens=tokens)
    plain = share(solve(RTN(3, 16, False, True), weight, hessian), weight, hessian)
    loose = solve(jointq(), weight, hessian)
    assert loose.verdict == "damped"
    assert loose.damping is not None
    assert 0 < loose.damping < 1e-2
    assert share(loose, weight, hessian) < most * plain
    tight = solve(jointq(regularization_lambda=0.5), weight, hessian)
    assert tight.verdict == "ok"
    assert share(loose, weight, hessian) < share(tight, weight, hessian) < 0.6 * plain


# --- size


@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [(torch.float32, (-100, -23, 100)), (torch.bfloat16, (-100, 13, 100)), (torch.float16, (-2, 3))],
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_times_a_power_of_two_keep_their_codes(
    symmetric: bool, dtype: torch.dtype, exponents: tuple[int, ...]
) -> None:
    weight, hessian = layer(24, 64)
    quantizer = jointq(symmetric=symmetric)
    plain = solve(quantizer, weight, hessian, dtype).quantized
    for exponent in exponents:
        scaled = solve(quantizer, weight * 2.0**exponent, hessian, dtype).quantized
        assert torch.equal(scaled.codes, plain.codes)
        assert torch.equal(scaled.zero_point, plain.zero_point)
        assert torch.equal(scaled.scale, plain.scale * 2.0**exponent)


@pytest.mark.parametrize("factor", [1e-30, 1e-7, 1e4, 1e30])
def test_tiny_and_huge_layers_are_solved_as_well_as_others(factor: float) -> None:
    weight, hessian = layer(24, 64)
    for dtype in (torch.float32, torch.bfloat16):
        usual = share(solve(jointq(), weight, hessian, dtype), weight, hessian)
        other = share(solve(jointq(), weight * factor, hessian, dtype), weight * factor, hessian)
        assert other == pytest.approx(usual, rel=0.05)


def test_a_layer_of_float16_subnormals_is_solved() -> None:
    weight, hessian = layer(24, 64)
    weight = (weight * 2.0**-20).half().float()
    solution = solve(jointq(bits=4), weight, hessian, torch.float16)
    assert solution.quantized.scale.isfinite().all()
    assert (solution.quantized.scale > 0).all()
    assert share(solution, weight, hessian) < 0.1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [1, 4])
def test_zeros_stay_zeros(bits: int, dtype: torch.dtype) -> None:
    weight, hessian = layer(24, 64)
    quantizer = jointq(bits=bits, zero_point="integer")
    weight[3], weight[5, 16:32] = 0.0, 0.0
    plain = solve(quantizer, weight, hessian, dtype)
    assert (plain.quantized.dequantize(dtype)[3] == 0).all()
    assert plain.quantized.dequantize(dtype).isfinite().all()
    empty = solve(quantizer, torch.zeros(4, 64), hessian, dtype)
    assert (empty.quantized.dequantize(dtype) == 0).all()
    assert empty.notes["final_error"] == empty.notes["start_error"] == 0.0
    alone = weight.clone()
    alone[6:] = 0.0
    assert same(plain.quantized, solve(quantizer, alone, hessian, dtype).quantized, slice(None)) is False
    assert torch.equal(plain.quantized.codes[:6], solve(quantizer, alone, hessian, dtype).quantized.codes[:6])


def test_rows_much_smaller_than_others_are_solved_as_well() -> None:
    """Down to 1e-12 of the largest weight; beyond 1e-18 products of float32 vanish."""
    weight, hessian = layer(24, 64)
    plain = costs(solve(jointq(), weight, hessian), weight, hessian)
    for factor in (1e-6, 1e-12):
        small = weight.clone()
        small[7] *= factor
        found = costs(solve(jointq(), small, hessian), small, hessian)
        assert float(found[7]) == pytest.approx(float(plain[7]) * factor**2, rel=0.1)
    small[7] = weight[7] * 1e-30
    assert solve(jointq(), small, hessian).quantized.dequantize(torch.float32).isfinite().all()


# --- what cannot be solved


@pytest.mark.parametrize("on_failure", ["error", "rtn"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_an_error_always(bad: float, on_failure: str) -> None:
    weight, hessian = layer(8, 32)
    weight[2, 5] = bad
    with pytest.raises(NumericsError, match="the weight holds NaN or Inf"):
        solve(jointq(on_failure=on_failure), weight, hessian)


def bad_hessian(kind: str) -> Tensor:
    hessian = layer(8, 32)[1]
    match kind:
        case "nan":
            hessian[3, 4] = float("nan")
        case "inf":
            hessian[3, 3] = float("inf")
        case "indefinite":
            hessian.fill_(-1e9).fill_diagonal_(1.0)
    return hessian


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", "the Hessian holds NaN or Inf"),
        ("inf", "the Hessian holds NaN or Inf"),
        ("indefinite", "the Hessian is singular even with"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"enable_gptq": True}], ids=str)
def test_a_useless_hessian_is_an_error_or_rtn_if_asked_for(options: dict[str, Any], kind: str, message: str) -> None:
    hessian = bad_hessian(kind)
    with pytest.raises(NumericsError, match=message):
        jointq(**options).prepare(hessian)
    weight = layer(8, 32)[0]
    quantizer = jointq(on_failure="rtn", **options)
    prepared = quantizer.prepare(hessian)
    assert isinstance(prepared, FailedPreparation)
    solution = quantizer.quantize(weight, prepared, torch.bfloat16)
    plain = RTN(3, 16, False, True).quantize(weight, Prepared(), torch.bfloat16).quantized
    assert (solution.verdict, solution.damping) == ("fallback", None)
    assert message in str(solution.notes["failure"])
    assert same(solution.quantized, plain)


def test_a_scale_that_does_not_fit_is_not_hidden_by_the_fallback() -> None:
    weight, hessian = layer(8, 32)
    for on_failure in ("error", "rtn"):
        with pytest.raises(NumericsError, match="does not fit in float16"):
            solve(jointq(on_failure=on_failure), weight * 1e8, hessian, torch.float16)


def test_a_group_of_denormal_weights_beside_a_zero_is_solved() -> None:
    weight, hessian = layer(4, 32)
    weight[:, :8] = 1e-39
    weight[:, 0] = 0.0
    diagonal = torch.diag(hessian.diagonal())
    quantizer = jointq(group_size=8)
    found = quantizer.quantize(weight, quantizer.prepare(diagonal), torch.bfloat16).quantized.dequantize(torch.float32)
    assert found.isfinite().all()


def test_a_lambda_list_may_begin_with_a_zero_that_is_passed_over_and_badly_conditioned() -> None:
    weight, hessian = layer(4, 64, tokens=20)
    hessian += 1e-9 * torch.eye(64, dtype=torch.float64)
    quantizer = jointq(
        bits=2,
        lambda_mode="incremental_lambda",
        regularization_mode="identity",
        lambda_list=[0.0, 0.3, 0.5],
        incremental_initial_skip_ew_threshold=0.0,
    )
    solution = quantizer.quantize(weight, quantizer.prepare(hessian), torch.bfloat16)
    assert solution.notes["lambda"] in (0.3, 0.5)
    assert solution.verdict == "ok"
