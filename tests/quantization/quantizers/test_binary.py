"""One bit per weight: presets, column scales, and optima by brute force."""

import itertools
from dataclasses import replace

import pytest
import torch
from jointq_cases import layer, solve
from torch import Tensor

from jointq_cli.errors import ConfigError, NumericsError
from jointq_cli.formats import ColumnScaledWeight, UniformWeight
from jointq_cli.quantization.quantizers import Binary, JointQ, Solution

ROW_AND_COLUMN = Binary(group_size=None, column_scale=True)


def error(solution: Solution, weight: Tensor, hessian: Tensor) -> float:
    difference = solution.quantized.dequantize(torch.float64) - weight
    return float(((difference @ hessian) * difference).sum())


@pytest.mark.parametrize(("group_size", "sweeps"), [(16, 3), (None, 0)])
@pytest.mark.parametrize("offset", [False, True])
def test_without_column_scales_it_is_jointq_of_one_bit(offset: bool, group_size: int | None, sweeps: int) -> None:
    weight, hessian = layer(32, 64)
    ours = Binary(group_size=group_size, offset=offset)
    theirs = JointQ(bits=1, group_size=group_size, zero_point="real" if offset else "half", max_sweeps=sweeps)
    assert solve(ours, weight, hessian).quantized.difference(solve(theirs, weight, hessian).quantized) == []
    assert ours.row_separable
    assert torch.equal(ours.ridge(hessian), theirs.ridge(hessian))


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("group_size", [16, None])
def test_column_scales_lower_the_regularised_error_from_turn_to_turn(group_size: int | None, offset: bool) -> None:
    weight, hessian = layer(48, 64, spread=2.0)
    quantizer = Binary(group_size=group_size, offset=offset, column_scale=True, rounds=4, regularization_lambda=0.1)
    prepared = quantizer.prepare(hessian)
    problem = quantizer._problem(weight, prepared.metric, torch.bfloat16)
    costs = [turn.cost / problem.signal for turn in quantizer._turns(problem)]
    assert len(costs) > 2
    assert costs == sorted(costs, reverse=True)
    solution = quantizer.quantize(weight, prepared, torch.bfloat16)
    regularized = hessian + torch.diag(quantizer.ridge(hessian))
    signal = float(((weight.double() @ regularized) * weight).sum())
    assert error(solution, weight, regularized) / signal == pytest.approx(costs[-1], rel=1e-4)
    assert solution.notes["final_error"] == costs[-1]
    plain = solve(Binary(group_size=group_size, offset=offset, regularization_lambda=0.1), weight, hessian)
    assert costs[-1] < 0.97 * error(plain, weight, regularized) / signal
    assert plain.notes["final_error"] == pytest.approx(error(plain, weight, regularized) / signal, rel=1e-3)


@pytest.mark.parametrize("offset", [False, True])
def test_rows_of_one_group_are_solved_alike_in_parts_and_in_tiles(offset: bool) -> None:
    weight, hessian = layer(48, 64)
    whole = solve(Binary(group_size=None, offset=offset), weight, hessian).quantized
    tiled = Binary(group_size=None, offset=offset, batch_size=7)
    parts = [solve(tiled, weight[start : start + 16], hessian) for start in (0, 16, 32)]
    assert tiled.join(parts).quantized.difference(whole) == []


def test_no_bit_depends_on_the_number_of_threads() -> None:
    weight, hessian = layer(128, 512)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(solve(replace(ROW_AND_COLUMN, rounds=1), weight, hessian, torch.float32).quantized)
    finally:
        torch.set_num_threads(threads)
    assert found[0].difference(found[1]) == []


def test_column_scales_solve_their_linear_system() -> None:
    weight, hessian = layer(32, 300)  # more columns than are multiplied at a time
    quantizer = Binary(group_size=None, column_scale=True, rounds=1)
    regularized = hessian + torch.diag(quantizer.ridge(hessian))
    found = solve(quantizer, weight, hessian, torch.float32).quantized
    assert isinstance(found, ColumnScaledWeight)
    values = found.inner.dequantize(torch.float64)
    right = (values * (weight.double() @ regularized)).sum(0)
    best = torch.linalg.solve((values.T @ values) * regularized, right)
    assert torch.allclose(found.column_scale.double(), best, rtol=1e-3, atol=1e-3 * float(best.abs().mean()))


def test_a_rank_one_modulus_is_found_exactly() -> None:
    _, hessian = layer(48, 32)
    generator = torch.Generator().manual_seed(1)
    signs = torch.randint(2, (48, 32), generator=generator).float() * 2 - 1
    weight = signs * torch.rand(48, 1, generator=generator).add(0.5) * torch.rand(32, generator=generator).add(0.5)
    solution = solve(Binary(group_size=None, column_scale=True, rounds=20), weight, hessian)
    assert error(solution, weight, hessian) < 1e-5 * float(((weight.double() @ hessian) * weight).sum())


def test_tiny_rows_are_solved_to_their_optimum() -> None:
    weight, hessian = layer(60, 8)
    quantizer = Binary(group_size=None, regularization_lambda=0.0)
    regularized = hessian + torch.diag(quantizer.ridge(hessian))
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=8)), dtype=torch.float64)
    energy, along = ((signs @ regularized) * signs).sum(1), weight.double() @ regularized @ signs.T
    signal = ((weight.double() @ regularized) * weight).sum(1)
    best = (signal[:, None] - along.square() / energy).amin(1)
    solved = solve(quantizer, weight, hessian).quantized.dequantize(torch.float64) - weight
    costs = ((solved @ regularized) * solved).sum(1)
    assert (costs > best * (1 - 1e-9)).all()
    assert ((costs / best) < 1.0001).double().mean() > 0.7
    assert costs.sum() < 1.15 * best.sum()


@pytest.mark.parametrize("offset", [False, True])
def test_all_that_decodes_column_scales_is_stored_and_counted(offset: bool) -> None:
    weight, hessian = layer(32, 64)
    quantizer = Binary(group_size=16, offset=offset, column_scale=True)
    found, storage = (
        solve(quantizer, weight, hessian, torch.bfloat16).quantized,
        quantizer.storage(32, 64, torch.bfloat16),
    )
    assert isinstance(found, ColumnScaledWeight)
    assert (found.stored_bits, found.file_bytes, found.label) == (
        storage.stored_bits, storage.file_bytes, storage.label,
    )  # fmt: skip
    assert found.stored_bits == 32 * 64 + 32 * 4 * 16 * (1 + offset) + 64 * 16
    assert found.record_fields()["label"] in quantizer.describe()
    back = ColumnScaledWeight.from_tensors(found.to_tensors())
    assert back.difference(found) == []
    assert torch.equal(back.dequantize(torch.bfloat16), found.dequantize(torch.bfloat16))
    assert torch.equal(
        found.dequantize(torch.float32), found.inner.dequantize(torch.float32) * found.column_scale.float()
    )


def test_a_layer_times_a_power_of_two_keeps_codes_and_column_scales() -> None:
    weight, hessian = layer(32, 64)
    plain, scaled = (solve(ROW_AND_COLUMN, weight * 2.0**k, hessian * 2.0**k).quantized for k in (0, -12))
    assert isinstance(plain, ColumnScaledWeight)
    assert isinstance(scaled, ColumnScaledWeight)
    assert torch.equal(plain.inner.codes, scaled.inner.codes)
    assert torch.equal(plain.column_scale, scaled.column_scale)
    assert torch.equal(plain.inner.scale, scaled.inner.scale * 2.0**12)


def test_dead_columns_and_empty_rows_do_no_harm() -> None:
    weight, hessian = layer(32, 64)
    weight[3] = 0
    hessian[5], hessian[:, 5] = 0, 0
    found = solve(ROW_AND_COLUMN, weight, hessian, torch.bfloat16).quantized.dequantize(torch.float32)
    assert found.isfinite().all()
    assert found[3].abs().max() < 1e-6
    silent = solve(ROW_AND_COLUMN, weight, 0 * hessian, torch.bfloat16)
    assert (silent.verdict, silent.quantized.label) == ("no input", "W1 per-channel half column-scaled")


def test_what_cannot_be_solved_is_an_error_or_rounded_as_asked() -> None:
    weight, hessian = layer(16, 32)
    hessian[3, 3] = float("nan")
    with pytest.raises(NumericsError):
        solve(ROW_AND_COLUMN, weight, hessian)
    rounded = solve(Binary(group_size=None, column_scale=True, on_failure="rtn"), weight, hessian)
    assert rounded.verdict == "fallback"
    assert isinstance(rounded.quantized, ColumnScaledWeight)
    assert isinstance(solve(Binary(group_size=8, on_failure="rtn"), weight, hessian).quantized, UniformWeight)
    with pytest.raises(ConfigError, match=r"quantizer.rounds=-1: must be at least 0"):
        Binary(rounds=-1)
    with pytest.raises(ConfigError, match=r"quantizer.group_size=20: must divide in_features"):
        Binary(group_size=20).check({"layer": 64})


@pytest.mark.parametrize("columns", [16, 64])
@pytest.mark.parametrize("group_size", [16, None])
@pytest.mark.parametrize("offset", [False, True])
def test_groups_of_zeros_and_a_layer_of_zeros_are_solved(offset: bool, group_size: int | None, columns: int) -> None:
    weight, hessian = layer(32, 64)
    weight[:, :columns] = 0.0
    solution = solve(Binary(group_size=group_size, offset=offset, column_scale=True), weight, hessian)
    assert bool(solution.quantized.dequantize(torch.float32).isfinite().all())
    assert error(solution, weight, hessian) <= 0.5 * float(((weight.double() @ hessian) * weight).sum()) + 1e-9
