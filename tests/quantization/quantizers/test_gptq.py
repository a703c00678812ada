"""Properties of GPTQ and RTN: brute force, the textbook, identities that must hold."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from jointq_cli import kernels
from jointq_cli.errors import ConfigError, NumericsError
from jointq_cli.kernels.reference import ReferenceKernels
from jointq_cli.quantization.quantizers import GPTQ, RTN, Prepared
from jointq_cli.quantization.quantizers.scale_fit import fit

PLAIN = GPTQ(bits=3, group_size=None, mse=False, act_order=False)


def gptq(**options: Any) -> GPTQ:
    return dataclasses.replace(PLAIN, **options)


def layer(out_features: int, in_features: int, seed: int = 0, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """weight (out, in) float32 and the Hessian (in, in) of correlated inputs of various loudness."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(in_features, in_features, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens or 4 * in_features, in_features, generator=generator, dtype=torch.float64)
    inputs = inputs @ (mixing + 3 * torch.eye(in_features)) * torch.logspace(0, -2, in_features).roll(7)
    weight = torch.randn(out_features, in_features, generator=generator)
    return weight, inputs.T @ inputs / len(inputs)


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> Tensor:
    """e H e^T per row, (out,) float64."""
    error = weight.double() - quantized.double()
    return ((error @ hessian) * error).sum(1)


def dense(quantizer: GPTQ | RTN, weight: Tensor, hessian: Tensor) -> Tensor:
    solution = quantizer.quantize(weight, quantizer.prepare(hessian), torch.float32)
    return solution.quantized.dequantize(torch.float32)


def textbook(quantizer: GPTQ, weight: Tensor, hessian: Tensor) -> Tensor:
    """GPTQ as published: inverse, its Cholesky factor, one column after the other. Dequantised (out, in)."""
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True) if quantizer.act_order else torch.arange(len(hessian))
    damped = hessian + torch.eye(len(hessian)) * quantizer.damping * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    columns = quantizer.group_size or len(hessian)
    work, result = weight[:, order].clone(), torch.empty_like(weight)
    for j in range(len(hessian)):
        if quantizer.static_groups:
            start = int(order[j]) // columns * columns
            group = weight[:, start : start + columns]
        elif j % columns == 0:
            group = work[:, j : j + columns].clone()
        scale, zero = fit(group, quantizer.integer_grid, quantizer.mse, torch.float32)
        code = quantizer.integer_grid.nearest_codes(work[:, j], scale, zero.float())
        value = (code.float() - zero.float()) * scale
        result[:, order[j]] = value
        error = (work[:, j] - value) / upper[j, j]
        work[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return result


@pytest.mark.parametrize("static_groups", [False, True])
def test_plain_torch_kernels_find_what_the_compiled_ones_find(
    static_groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian = layer(16, 96)
    quantizer = gptq(act_order=True, static_groups=static_groups, group_size=24, block_size=48, mse=True)
    compiled = dense(quantizer, weight, hessian)
    monkeypatch.setattr(kernels, "for_device", lambda device: ReferenceKernels)
    plain = dense(quantizer, weight, hessian)
    same = torch.isclose(plain, compiled, rtol=1e-3, atol=1e-4).all(1)
    assert int(same.sum()) >= 15


VARIANTS = list(itertools.product([False, True], [False, True], [None, 16, 24, 32, 96], [16, 40, 128]))


@pytest.mark.parametrize(("act_order", "static_groups", "group_size", "block_size"), VARIANTS)
def test_blocked_gptq_is_the_textbook_column_by_column(
    act_order: bool, static_groups: bool, group_size: int | None, block_size: int
) -> None:
    quantizer = gptq(
        act_order=act_order,
        static_groups=static_groups,
        group_size=group_size,
        block_size=block_size,
        mse=True,
    )
    weight, hessian = layer(32, 96)
    mine, plain = dense(quantizer, weight, hessian), textbook(quantizer, weight, hessian)
    same = torch.isclose(mine, plain, rtol=1e-3, atol=1e-4).all(1)
    # A weight half-way between levels may go either way by the last bit of a sum; its row then differs.
    assert int(same.sum()) >= 30
    error, other = output_error(weight, mine, hessian), output_error(weight, plain, hessian)
    assert float(error.sum()) == pytest.approx(float(other.sum()), rel=0.02)


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("symmetric", [False, True])
def test_no_gptq_row_beats_brute_force_and_most_come_close(bits: int, symmetric: bool) -> None:
    size = 6 if bits < 3 else 4
    weight, hessian = layer(24, size)
    quantizer = gptq(bits=bits, symmetric=symmetric, zero_point="integer", damping=0.0)
    quantized = quantizer.quantize(weight, quantizer.prepare(hessian), torch.float32).quantized
    levels = torch.arange(quantizer.integer_grid.lowest, quantizer.integer_grid.highest + 1).float()
    choices = torch.cartesian_prod(*[levels] * size)
    error = output_error(weight, quantized.dequantize(torch.float32), hessian)
    best = torch.stack(
        [
            output_error(row[None], (choices - zero) * scale, hessian).min()
            for row, zero, scale in zip(weight, quantized.zero_point.float(), quantized.scale, strict=True)
        ]
    )
    assert (error >= best * (1 - 1e-5)).all()
    assert float((error <= 1.5 * best).float().mean()) >= 0.5


def test_rtn_is_the_optimum_when_inputs_are_uncorrelated() -> None:
    weight = layer(8, 5)[0]
    quantized = RTN(2, None, False, False).quantize(weight, Prepared(), torch.float32).quantized
    choices = torch.cartesian_prod(*[torch.arange(4.0)] * 5)
    for row, zero, scale, mine in zip(
        weight,
        quantized.zero_point.float(),
        quantized.scale,
        quantized.dequantize(torch.float32),
        strict=True,
    ):
        best = ((choices - zero) * scale - row).square().sum(1).min()
        assert float((mine - row).square().sum()) == pytest.approx(float(best), rel=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_uncorrelated_inputs_turn_gptq_into_rtn(act_order: bool, mse: bool, symmetric: bool) -> None:
    weight = layer(16, 64)[0]
    quantizer = gptq(bits=4, group_size=16, symmetric=symmetric, mse=mse, act_order=act_order, block_size=32)
    prepared = quantizer.prepare(3 * torch.eye(64, dtype=torch.float64))
    mine = quantizer.quantize(weight, prepared, torch.bfloat16).quantized
    plain = RTN(4, 16, symmetric, mse).quantize(weight, Prepared(), torch.bfloat16).quantized
    assert torch.equal(mine.codes, plain.codes)
    assert torch.equal(mine.scale, plain.scale)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_errs_less_than_rtn_on_correlated_inputs(bits: int, act_order: bool) -> None:
    weight, hessian = layer(64, 128)
    error = output_error(weight, dense(gptq(bits=bits, group_size=32, act_order=act_order), weight, hessian), hessian)
    plain = output_error(weight, dense(RTN(bits, 32, False, False), weight, hessian), hessian)
    assert float(error.sum()) < 0.7 * float(plain.sum())


def test_with_act_order_the_order_in_which_columns_are_stored_is_nothing() -> None:
    weight, hessian = layer(16, 64)
    shuffle = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    quantizer = gptq(act_order=True, group_size=16, mse=True)
    plain = dense(quantizer, weight, hessian)
    shuffled = dense(quantizer, weight[:, shuffle], hessian[shuffle][:, shuffle])
    assert torch.equal(shuffled, plain[:, shuffle])


def test_the_permutation_is_stored_only_where_groups_follow_it() -> None:
    weight, hessian = layer(8, 64)
    order = torch.argsort(hessian.diagonal(), descending=True)
    for options, expected in (
        ({"act_order": True, "group_size": 16}, order.tolist()),
        ({"act_order": True, "group_size": 16, "static_groups": True}, None),
        ({"act_order": True, "group_size": None}, None),
        ({"act_order": False, "group_size": 16}, None),
    ):
        quantizer = gptq(**options)
        found = quantizer.quantize(weight, quantizer.prepare(hessian), torch.float32).quantized.permutation
        assert (None if found is None else found.tolist()) == expected


def test_static_groups_have_the_scales_of_the_original_weights() -> None:
    weight, hessian = layer(8, 64)
    quantizer = gptq(act_order=True, static_groups=True, group_size=16)
    quantized = quantizer.quantize(weight, quantizer.prepare(hessian), torch.float32).quantized
    scale, zero_point = fit(weight.view(8, 4, 16), quantizer.integer_grid, False, torch.float32)
    assert torch.equal(quantized.scale, scale)
    assert torch.equal(quantized.zero_point, zero_point)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_dead_columns_become_zero_and_do_not_disturb_the_others(act_order: bool, symmetric: bool) -> None:
    weight, hessian = layer(16, 64)
    dead = torch.tensor([0, 9, 63])
    alive = torch.tensor([j for j in range(64) if j not in dead])
    weight[:, dead] = 100.0
    hessian[dead], hessian[:, dead] = 0, 0
    quantizer = gptq(act_order=act_order, symmetric=symmetric, mse=True)
    solution = quantizer.quantize(weight, quantizer.prepare(hessian), torch.float32)
    mine = solution.quantized.dequantize(torch.float32)
    assert (mine[:, dead] == 0).all()
    assert solution.notes["dead_columns"] == 3
    assert solution.verdict == "ok"
    without = dense(quantizer, weight[:, alive], hessian[alive][:, alive])
    torch.testing.assert_close(mine[:, alive], without, rtol=1e-4, atol=1e-5)


def test_fewer_tokens_than_columns_are_solved_with_damping() -> None:
    weight, hessian = layer(16, 64, tokens=8)
    solution = PLAIN.quantize(weight, PLAIN.prepare(hessian), torch.float32)
    assert (solution.verdict, solution.damping) == ("ok", 0.01)
    error = output_error(weight, solution.quantized.dequantize(torch.float32), hessian)
    plain = output_error(weight, dense(RTN(3, None, False, False), weight, hessian), hessian)
    assert float(error.sum()) < 0.1 * float(plain.sum())


def test_a_singular_hessian_is_damped_and_the_verdict_says_so() -> None:
    weight, hessian = layer(16, 64, tokens=8)
    quantizer = gptq(damping=0.0)
    solution = quantizer.quantize(weight, quantizer.prepare(hessian), torch.float32)
    assert solution.verdict == "damped"
    assert solution.damping is not None
    assert 1e-7 < solution.damping < 1e-2


def indefinite(size: int) -> Tensor:
    """A symmetric matrix that stays indefinite with every damping that is tried."""
    hessian = torch.full((size, size), -1e9, dtype=torch.float64)
    return hessian.fill_diagonal_(1.0)


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (
            indefinite(16),
            "quantizer.damping=0.01: the Hessian is singular even with 1000 of its mean diagonal",
        ),
        (torch.full((16, 16), float("nan"), dtype=torch.float64), "the Hessian holds NaN or Inf"),
    ],
)
def test_a_useless_hessian_is_an_error_or_rtn_if_asked_for(hessian: Tensor, message: str) -> None:
    with pytest.raises(NumericsError, match=message):
        PLAIN.prepare(hessian)
    weight = layer(8, 16)[0]
    quantizer = gptq(on_failure="rtn", mse=True)
    solution = quantizer.quantize(weight, quantizer.prepare(hessian), torch.bfloat16)
    plain = RTN(3, None, False, True).quantize(weight, Prepared(), torch.bfloat16).quantized
    assert (solution.verdict, solution.damping) == ("fallback", None)
    assert message in str(solution.notes["failure"])
    assert torch.equal(solution.quantized.codes, plain.codes)


def test_a_single_nan_in_the_hessian_is_found() -> None:
    hessian = layer(8, 16)[1]
    hessian[3, 4] = float("nan")
    with pytest.raises(NumericsError, match="Hessian holds NaN or Inf"):
        PLAIN.prepare(hessian)


def test_a_scale_that_does_not_fit_is_not_hidden_by_the_fallback() -> None:
    weight, hessian = layer(8, 16)
    quantizer = gptq(on_failure="rtn")
    with pytest.raises(NumericsError, match="does not fit in float16"):
        quantizer.quantize(weight * 1e8, quantizer.prepare(hessian), torch.float16)


def test_massive_activations_are_solved_as_well_in_float32_as_in_float64() -> None:
    weight, hessian = layer(64, 128)
    loud = torch.zeros(128, dtype=torch.float64)
    loud[[3, 77]] = 1e4
    hessian += torch.outer(loud, loud)
    quantizer = gptq(damping=1e-8, act_order=True)
    solution = quantizer.quantize(weight, quantizer.prepare(hessian), torch.float32)
    assert float(solution.notes["min_condition"]) > 1e8
    diagonal, order = hessian.diagonal(), torch.argsort(hessian.diagonal(), descending=True, stable=True)
    damped = hessian + 1e-8 * diagonal.mean() * torch.eye(128, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    work, exact = weight.double()[:, order], torch.empty(64, 128, dtype=torch.float64)
    scale, zero = solution.quantized.scale[:, 0].double(), solution.quantized.zero_point[:, 0].double()
    for j in range(128):
        code = (torch.round(work[:, j] / scale) + zero).clamp(0, 7)
        exact[:, order[j]] = (code - zero) * scale
        work[:, j:] -= ((work[:, j] - exact[:, order[j]]) / upper[j, j])[:, None] * upper[j, j:]
    mine = output_error(weight, solution.quantized.dequantize(torch.float64), damped)
    assert float(mine.sum()) == pytest.approx(float(output_error(weight, exact, damped).sum()), rel=1e-2)


def test_gptq_refuses_what_another_quantizer_prepared() -> None:
    with pytest.raises(TypeError, match="Prepared"):
        PLAIN.quantize(layer(8, 16)[0], Prepared(), torch.float32)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"damping": -0.1}, "quantizer.damping=-0.1: must be at least 0"),
        ({"damping": float("nan")}, "quantizer.damping=nan"),
        ({"block_size": 0}, "quantizer.block_size=0: must be at least 1"),
        ({"on_failure": "ignore"}, "quantizer.on_failure=ignore: must be error or rtn"),
    ],
)
def test_options_out_of_range_are_refused_with_the_key(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        gptq(**option)
