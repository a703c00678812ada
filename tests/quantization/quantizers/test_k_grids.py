"""RTN, GPTQ and JointQ on the K grids of llama.cpp."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from jointq_cli.errors import ConfigError, NumericsError
from jointq_cli.formats.k_quant import K_GRIDS, KQuantWeight
from jointq_cli.formats.k_rounding import round_to_k
from jointq_cli.formats.uniform import UniformWeight
from jointq_cli.quantization.quantizers import GPTQ, RTN, JointQ
from jointq_cli.quantization.quantizers.base import ROWS
from jointq_cli.quantization.quantizers.statistics import HeldOut, output_error
from jointq_cli.quantization.quantizers.uniform import UniformQuantizer

EVERY = pytest.mark.parametrize("name", K_GRIDS)
SOME = pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k"])
KINDS = pytest.mark.parametrize("kind", [RTN, GPTQ, JointQ])


def layer(rows: int = 32, columns: int = 512, seed: int = 0) -> tuple[Tensor, Tensor]:
    """weight (out, in) float32 and the Hessian (in, in) of correlated inputs of which few are large."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    decay = torch.arange(1, columns + 1, dtype=torch.float64) ** -0.7
    inputs = torch.randn(2 * columns, columns, generator=generator, dtype=torch.float64) * decay @ mixing
    return 0.02 * torch.randn(rows, columns, generator=generator), inputs.T @ inputs / len(inputs)


def solve(quantizer: UniformQuantizer, weight: Tensor, hessian: Tensor) -> KQuantWeight:
    found = quantizer.quantize(weight, quantizer.prepare(hessian), torch.bfloat16).quantized
    assert isinstance(found, KQuantWeight)
    return found


def error(quantizer: UniformQuantizer, weight: Tensor, hessian: Tensor) -> float:
    return output_error(weight, solve(quantizer, weight, hessian).dequantize(torch.float32), hessian)


@EVERY
@KINDS
def test_a_result_is_on_its_grid_and_has_the_form_that_was_planned(kind: type[UniformQuantizer], name: str) -> None:
    weight, hessian = layer()
    quantizer, grid = kind(grid=name), K_GRIDS[name]
    found, planned = solve(quantizer, weight, hessian), quantizer.storage(32, 512, torch.bfloat16)
    assert (found.grid, found.shape, found.stored_bits) == (grid, (32, 512), planned.stored_bits)
    assert {key: (part.shape, part.dtype) for key, part in found.to_tensors().items() if key != "format"} == {
        key: (part.shape, part.dtype) for key, part in planned.to_tensors().items() if key != "format"
    }
    assert int(found.codes.max()) <= grid.last_code
    assert grid.scales[0] <= int(found.scales.min())
    assert int(found.scales.max()) <= grid.scales[1]
    assert not grid.has_mins or int(found.mins.max()) <= grid.last_min
    assert found.d.isfinite().all()
    assert found.dmin.isfinite().all()
    assert grid.label in quantizer.describe()
    assert "g128" not in quantizer.describe()
    assert found.bits_per_weight == {"q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625}[name]


@SOME
def test_errors_fall_from_rtn_to_importance_to_gptq_to_jointq(name: str) -> None:
    weight, hessian = layer()
    plain, diagonal, gptq, jointq = (
        error(quantizer, weight, hessian)
        for quantizer in (
            RTN(grid=name),
            RTN(grid=name, importance=True),
            GPTQ(grid=name, damping=0.0, act_order=False),
            JointQ(grid=name, regularization_lambda=0.0),
        )
    )
    assert jointq < 0.95 * gptq < 0.9 * min(plain, diagonal)


@SOME
def test_a_sweep_never_raises_the_error_and_the_search_ends_below_its_start(name: str) -> None:
    weight, hessian = layer()
    errors = [
        error(JointQ(grid=name, regularization_lambda=0.0, max_sweeps=sweeps), weight, hessian) for sweeps in (0, 1, 3)
    ]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0]
    quantizer = JointQ(grid=name)
    notes = quantizer.quantize(weight, quantizer.prepare(hessian), torch.bfloat16).notes
    assert float(notes["final_error"]) <= float(notes["start_error"])


@SOME
@KINDS
def test_rows_do_not_depend_on_each_other(kind: type[UniformQuantizer], name: str) -> None:
    weight, hessian = layer()
    quantizer = kind(grid=name)
    prepared = quantizer.prepare(hessian)
    whole = quantizer.quantize(weight, prepared, torch.bfloat16).quantized
    parts = [quantizer.quantize(part, prepared, torch.bfloat16) for part in weight.split(ROWS)]
    assert quantizer.join(parts).quantized.difference(whole) == []


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    weight, hessian = layer(rows=600)
    quantizer = JointQ(grid="q3_k")
    prepared, before = quantizer.prepare(hessian), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(quantizer.quantize(weight, prepared, torch.bfloat16).quantized)
    finally:
        torch.set_num_threads(before)
    assert found[0].difference(found[1]) == []


@KINDS
@pytest.mark.parametrize("name", ["q2_k", "q3_k"])
def test_what_is_on_the_grid_already_is_found_again(kind: type[UniformQuantizer], name: str) -> None:
    """With one block in all super-blocks as large as scales go, so that d is not a matter of choice."""
    generator = torch.Generator().manual_seed(1)
    grid = K_GRIDS[name]
    exact = KQuantWeight.empty(16, 256, grid, torch.device("cpu"))
    exact.codes.copy_(torch.randint(0, grid.last_code + 1, exact.codes.shape, generator=generator))
    exact.codes[:, ::16], exact.codes[:, 1::16] = 0, grid.last_code  # both ends of every block
    exact.scales.copy_(torch.randint(5, grid.scales[1] + 1, exact.scales.shape, generator=generator))
    exact.mins.copy_(torch.randint(0, grid.last_min + 1, exact.mins.shape, generator=generator))
    exact.scales[:, 0] = grid.scales[1]
    exact.d.fill_(0.01)
    exact.dmin.fill_(0.02)
    if grid.has_mins:
        exact.mins[:, 0] = grid.last_min
    weight = exact.dequantize(torch.float32)
    found = solve(kind(grid=name), weight, torch.eye(256, dtype=torch.float64)).dequantize(torch.float32)
    assert float((found - weight).square().sum() / weight.square().sum()) < 1e-3


@KINDS
def test_zeros_dead_columns_and_rows_of_one_sign_are_no_trouble(kind: type[UniformQuantizer]) -> None:
    weight, hessian = layer(rows=32)
    weight[0], weight[1], weight[2], weight[3, :300] = 0.0, weight[1].abs() + 0.1, -weight[2].abs() - 0.1, 0.0
    hessian[:, 40:44], hessian[40:44] = 0.0, 0.0
    for name in ("q2_k", "q6_k"):
        found = solve(kind(grid=name), weight, hessian).dequantize(torch.float32)
        assert bool(found.isfinite().all())
        assert float(found[0].abs().max()) < 1e-6
        assert output_error(weight[1:], found[1:], hessian) < 0.5


def test_jointq_chooses_lambda_in_all_its_modes_on_a_k_grid() -> None:
    weight, hessian = layer()
    _, other = layer(seed=1)
    quantizer = JointQ(grid="q4_k", lambda_mode="heldout", lambda_list=[0.01, 0.3])
    mixed = 0.75 * hessian + 0.25 * other
    prepared = quantizer.prepare(mixed, HeldOut(other, 0.25))
    solution = quantizer.quantize(weight, prepared, torch.bfloat16)
    assert solution.notes["lambda"] in (0.01, 0.3)
    incremental = JointQ(
        grid="q4_k", lambda_mode="incremental_lambda", regularization_mode="identity", lambda_list=[0.001, 0.01]
    )
    assert incremental.quantize(weight, incremental.prepare(hessian), torch.bfloat16).verdict == "ok"


@pytest.mark.parametrize(
    "options",
    [{"act_order": True}, {"enable_gptq": True}, {"ils_enabled": True}, {"annealing_sweeps": 2}],
    ids=lambda options: next(iter(options)),
)
def test_what_the_search_on_k_grids_cannot_do_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"quantizer.grid=q4_k: does not go with {next(iter(options))}"):
        JointQ(grid="q4_k", **options)


@KINDS
def test_columns_that_are_no_super_blocks_are_refused_by_name(kind: type[UniformQuantizer]) -> None:
    with pytest.raises(ConfigError, match=r"quantizer.grid=q4_k: in_features must be a multiple of 256, .* b \(576\)"):
        kind(grid="q4_k").check({"a": 512, "b": 576})
    with pytest.raises(ConfigError, match=r"quantizer.grid=q7_k: must be one of q2_k"):
        kind(grid="q7_k")


def test_a_scale_that_float16_cannot_hold_is_an_error() -> None:
    weight, hessian = layer()
    for kind in (RTN, GPTQ, JointQ):
        with pytest.raises(NumericsError, match="does not fit in float16"):
            solve(kind(grid="q6_k"), 1e12 * weight, hessian)


def test_a_layer_that_fails_is_rounded_on_the_same_grid() -> None:
    weight, hessian = layer()
    quantizer = JointQ(grid="q5_k", on_failure="rtn")
    solution = quantizer.quantize(weight, quantizer.prepare(torch.full_like(hessian, torch.nan)), torch.bfloat16)
    assert solution.verdict == "fallback"
    assert solution.quantized.difference(solve(RTN(grid="q5_k"), weight, hessian)) == []


@pytest.mark.parametrize("strength", [0.0, 1e-6, 0.3])
def test_fewer_tokens_than_columns_and_massive_activations_are_solved(strength: float) -> None:
    weight, _ = layer(rows=16)
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(40, 512, generator=generator, dtype=torch.float64)
    inputs[:, 7] *= 1e4
    inputs[:, 9] = inputs[:, 8]
    hessian = inputs.T @ inputs / len(inputs)
    quantizer = JointQ(grid="q4_k", regularization_lambda=strength, regularization_floor=0.0)
    found = quantizer.quantize(weight, quantizer.prepare(hessian), torch.bfloat16)
    assert found.verdict in ("ok", "damped")
    assert output_error(weight, found.quantized.dequantize(torch.float32), hessian) < 0.1


def test_without_a_grid_bits_and_groups_decide_as_before() -> None:
    weight, hessian = layer()
    quantizer = RTN(bits=3, group_size=64)
    assert isinstance(quantizer.quantize(weight, quantizer.prepare(hessian), torch.bfloat16).quantized, UniformWeight)
    shared = [JointQ(grid="q4_k"), JointQ(grid="q2_k", bits=3, group_size=32)]
    assert len({each.prepare_key for each in shared}) == 1 < len({JointQ().prepare_key, shared[0].prepare_key})
    assert replace(shared[0], grid=None).prepare_key == JointQ().prepare_key


@EVERY
def test_rounding_weighs_errors_by_column(name: str) -> None:
    """Columns of one super-block that matter get the smaller errors."""
    weight, _ = layer(rows=64, columns=256)
    importance = torch.where(torch.arange(256) % 2 == 0, 100.0, 1.0)
    plain, weighted = (
        (round_to_k(weight, K_GRIDS[name], weights).dequantize(torch.float32) - weight).square().mean(dim=0)
        for weights in (None, importance)
    )
    assert float(weighted[::2].sum()) < float(plain[::2].sum())


@EVERY
def test_a_block_of_zeros_costs_its_super_block_nothing(name: str) -> None:
    weight, _ = layer(rows=16)
    pruned = weight.clone()
    pruned[:, 32:64] = 0.0
    errors = [
        (round_to_k(values, K_GRIDS[name]).dequantize(torch.float32) - values).square()[:, 64:].sum()
        for values in (weight, pruned)
    ]
    assert float(errors[1]) < 1.05 * float(errors[0])


def test_columns_that_are_alike_but_for_rounding_are_solved() -> None:
    """The metric, which is in float32, is singular; the Hessian, in float64, is not."""
    weight, _ = layer()
    inputs = torch.randn(1024, 512, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs[:, 1] = inputs[:, 0] + 2e-4 * inputs[:, 1]
    assert error(JointQ(grid="q4_k", regularization_lambda=0.0), weight, inputs.T @ inputs / 1024) < 1.0
