"""Statistics of a layer's input: independent of how tokens are divided into batches, with and without weights."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jointq_cli.data.token_weights import TokenWeights
from jointq_cli.errors import NumericsError
from jointq_cli.quantization.accumulator import PANEL, Accumulator
from jointq_cli.quantization.quantizers.statistics import HeldOut, output_error, weight_error

CPU = torch.device("cpu")


@pytest.mark.parametrize("width", [1, 7, PANEL, PANEL + 1, 2 * PANEL + 3])
def test_the_hessian_is_the_mean_outer_product(width: int) -> None:
    inputs = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(0))
    accumulator = Accumulator(width, CPU)
    accumulator.add(inputs[:1])
    accumulator.add(inputs[1:])
    flat = inputs.reshape(-1, width).double()
    found = accumulator.hessian()
    assert accumulator.cross() is None
    torch.testing.assert_close(found, flat.T @ flat / 15, rtol=1e-5, atol=1e-6)
    assert torch.equal(found, found.T)


@given(st.integers(1, 4), st.integers(1, 6))
def test_errors_are_traces(out_features: int, in_features: int) -> None:
    generator = torch.Generator().manual_seed(out_features * 10 + in_features)
    weight, found = torch.randn(2, out_features, in_features, generator=generator)
    x = torch.randn(9, in_features, generator=generator).double()
    error = (weight - found).double()
    expected = (x @ error.T).square().sum() / (x @ weight.double().T).square().sum()
    assert output_error(weight, found, x.T @ x) == pytest.approx(expected.item(), rel=1e-4)
    assert weight_error(weight, found) == pytest.approx((error.square().sum() / weight.double().square().sum()).item())


def test_a_layer_of_zeros_has_no_error() -> None:
    zeros = torch.zeros(2, 3)
    assert output_error(zeros, zeros, torch.eye(3, dtype=torch.float64)) == 0.0
    assert weight_error(zeros, zeros) == 0.0


def test_a_broken_hessian_is_no_perfect_layer() -> None:
    ones = torch.ones(2, 3)
    assert math.isnan(output_error(ones, ones / 2, torch.full((3, 3), math.nan, dtype=torch.float64)))


def test_no_token_is_no_division_by_zero() -> None:
    accumulator = Accumulator(3, CPU, cross=True)
    for found in (accumulator.hessian(), accumulator.cross()):
        assert torch.equal(found, torch.zeros(3, 3, dtype=torch.float64))


def both_inputs(width: int = 5) -> tuple[Tensor, Tensor]:
    """Inputs of a layer in the model quantised so far and in the original model: (windows, tokens, width)."""
    generator = torch.Generator().manual_seed(1)
    current = torch.randn(4, 6, width, generator=generator)
    return current, current + 0.1 * torch.randn(4, 6, width, generator=generator)


def test_the_cross_term_pairs_the_error_of_the_inputs_with_the_inputs() -> None:
    current, original = both_inputs()
    accumulator = Accumulator(5, CPU, cross=True)
    accumulator.add(current[:3], original[:3])
    accumulator.add(current[3:], original[3:])
    x, o = current.reshape(-1, 5).double(), original.reshape(-1, 5).double()
    torch.testing.assert_close(accumulator.cross(), (o - x).T @ x / 24, rtol=1e-5, atol=1e-6)


def test_other_tokens_in_the_original_model_are_an_error() -> None:
    current, original = both_inputs()
    accumulator = Accumulator(5, CPU, cross=True)
    for wrong in (None, original[:, :4]):
        with pytest.raises(NumericsError, match="qep cannot pair its tokens"):
            accumulator.add(current, wrong)


def test_a_token_of_weight_two_is_a_token_seen_twice() -> None:
    current, original = both_inputs()
    once, twice = Accumulator(5, CPU, cross=True), Accumulator(5, CPU, cross=True)
    weights = torch.ones(4, 6)
    weights[1] = 2.0
    once.add(current, original, weights)
    for batch in (slice(None), slice(1, 2)):
        twice.add(current[batch], original[batch])
    assert once.tokens == twice.tokens == 30
    torch.testing.assert_close(once.hessian(), twice.hessian(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(once.cross(), twice.cross(), rtol=1e-5, atol=1e-6)


def test_the_rest_is_everything_without_the_held_out_tokens() -> None:
    current, original = both_inputs()
    found = []
    for part in (slice(None), slice(3), slice(3, 4)):
        accumulator = Accumulator(5, CPU, cross=True)
        accumulator.add(current[part], original[part])
        found.append((accumulator.hessian(), accumulator.cross()))
    everything, rest, held = found
    heldout = HeldOut(held[0], 0.25, held[1])
    torch.testing.assert_close(heldout.complement(everything[0]), rest[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(heldout.without(everything[1], held[1]), rest[1], rtol=1e-5, atol=1e-6)


def test_tokens_are_weighed_by_their_rms() -> None:
    current, _ = both_inputs()
    current[2, 3] *= 100.0
    weights = TokenWeights("input", power=2.0, first_token=1.0).per_token(current, None, 6)
    assert weights is not None
    normalised = current * weights.sqrt()[..., None]
    torch.testing.assert_close(normalised.square().mean(dim=-1), torch.ones(4, 6))
    soft = TokenWeights("input", power=1.0, first_token=1.0).per_token(current, None, 6)
    torch.testing.assert_close(soft, weights.sqrt())


def test_the_first_token_of_every_window_is_weighed_separately() -> None:
    current, _ = both_inputs()
    weights = TokenWeights("uniform", power=2.0, first_token=0.25).per_token(current, None, 6)
    assert weights is not None
    assert torch.equal(weights[:, 0], torch.full((4,), 0.25))
    assert torch.equal(weights[:, 1:], torch.ones(4, 5))


def test_equal_tokens_need_no_weights() -> None:
    assert TokenWeights("uniform", power=2.0, first_token=1.0).per_token(both_inputs()[0], None, 6) is None


def test_a_token_of_zeros_does_no_harm() -> None:
    current, _ = both_inputs()
    current[0, 0] = 0.0
    accumulator = Accumulator(5, CPU)
    accumulator.add(current, weights=TokenWeights("input", power=2.0, first_token=1.0).per_token(current, None, 6))
    assert accumulator.tokens < 100
    assert bool(torch.isfinite(accumulator.hessian()).all())


def test_tokens_are_weighed_by_the_residual_stream_that_a_layer_writes_into() -> None:
    current, residual = both_inputs(8)
    weighting = TokenWeights("residual", power=2.0, first_token=1.0)
    weights = weighting.per_token(current, residual, 6)
    assert weights is not None
    torch.testing.assert_close(weights, residual.square().mean(dim=-1).reciprocal())
    assert weighting.per_token(current, None, 6) is None  # a layer that does not write


def test_the_drift_pairs_the_error_of_the_residual_stream_with_the_inputs() -> None:
    current, _ = both_inputs()
    lost, weights = torch.randn(4, 6, 3), torch.rand(4, 6)
    accumulator = Accumulator(5, CPU, drift=3)
    accumulator.add(current[:2], weights=weights[:2], residual=lost[:2])
    accumulator.add(current[2:], weights=weights[2:], residual=lost[2:])
    r, x = lost.reshape(-1, 3).double(), (current * weights[..., None]).reshape(-1, 5).double()
    torch.testing.assert_close(accumulator.drift(), r.T @ x / weights.sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weighting", ["uniform", "input"])
def test_tokens_may_come_without_their_windows(weighting: str) -> None:
    current, _ = both_inputs()
    weights = TokenWeights(weighting, power=2.0, first_token=0.5)
    shaped, flat = weights.per_token(current, None, 6), weights.per_token(current.flatten(0, 1), None, 6)
    assert shaped is not None
    assert flat is not None
    assert torch.equal(shaped.flatten(), flat)
    routed = weights.per_token(current.flatten(0, 1)[:7], None, 6)  # which of them is a first token is unknown
    plain = TokenWeights(weighting, power=2.0, first_token=1.0).per_token(current.flatten(0, 1)[:7], None, 6)
    assert torch.equal(routed, torch.ones(7) if plain is None else plain)


def test_a_lower_precision_rounds_factors_and_not_their_sums() -> None:
    """bf16 activations are what they were; the rounding of others averages out over the tokens."""
    generator = torch.Generator().manual_seed(0)
    original, inputs = torch.randn(2, 2048, 40, generator=generator).bfloat16().float()
    weights = torch.rand(2048, generator=generator)
    fast, exact = (Accumulator(40, CPU, cross=True, precision=precision) for precision in ("medium", None))
    plain, found = Accumulator(40, CPU), Accumulator(40, CPU, precision="medium")
    for accumulator in (fast, exact):
        accumulator.add(inputs, original, weights)
    for accumulator in (plain, found):
        accumulator.add(inputs)
    assert torch.get_float32_matmul_precision() == "highest"
    torch.testing.assert_close(found.hessian(), plain.hessian(), rtol=1e-5, atol=1e-6)
    for one, other in ((fast.hessian(), exact.hessian()), (fast.cross(), exact.cross())):
        assert one is not None
        assert other is not None
        assert (one - other).norm() < 2e-4 * other.norm()


def test_the_precision_ends_with_an_error() -> None:
    with pytest.raises(NumericsError):
        Accumulator(5, CPU, cross=True, precision="medium").add(torch.ones(3, 5))
    assert torch.get_float32_matmul_precision() == "highest"
