"""Moments of a layer's input, however the tokens arrive and whatever they weigh."""

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
    moments = Accumulator(width, CPU)
    moments.add(inputs[:1])
    moments.add(inputs[1:])
    flat = inputs.reshape(-1, width).double()
    found = moments.hessian()
    assert moments.cross() is None
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
    moments = Accumulator(3, CPU, cross=True)
    for found in (moments.hessian(), moments.cross()):
        assert torch.equal(found, torch.zeros(3, 3, dtype=torch.float64))


def streams(width: int = 5) -> tuple[Tensor, Tensor]:
    """What a layer is given, and what the original model gives it: (windows, tokens, width)."""
    generator = torch.Generator().manual_seed(1)
    given = torch.randn(4, 6, width, generator=generator)
    return given, given + 0.1 * torch.randn(4, 6, width, generator=generator)


def test_the_cross_term_pairs_what_was_lost_with_what_is_there() -> None:
    given, original = streams()
    moments = Accumulator(5, CPU, cross=True)
    moments.add(given[:3], original[:3])
    moments.add(given[3:], original[3:])
    x, o = given.reshape(-1, 5).double(), original.reshape(-1, 5).double()
    torch.testing.assert_close(moments.cross(), (o - x).T @ x / 24, rtol=1e-5, atol=1e-6)


def test_other_tokens_in_the_original_model_are_an_error() -> None:
    given, original = streams()
    moments = Accumulator(5, CPU, cross=True)
    for wrong in (None, original[:, :4]):
        with pytest.raises(NumericsError, match="qep cannot pair its tokens"):
            moments.add(given, wrong)


def test_a_token_of_weight_two_is_a_token_seen_twice() -> None:
    given, original = streams()
    once, twice = Accumulator(5, CPU, cross=True), Accumulator(5, CPU, cross=True)
    weights = torch.ones(4, 6)
    weights[1] = 2.0
    once.add(given, original, weights)
    for batch in (slice(None), slice(1, 2)):
        twice.add(given[batch], original[batch])
    assert once.tokens == twice.tokens == 30
    torch.testing.assert_close(once.hessian(), twice.hessian(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(once.cross(), twice.cross(), rtol=1e-5, atol=1e-6)


def test_the_rest_is_everything_without_the_held_out_tokens() -> None:
    given, original = streams()
    found = []
    for part in (slice(None), slice(3), slice(3, 4)):
        moments = Accumulator(5, CPU, cross=True)
        moments.add(given[part], original[part])
        found.append((moments.hessian(), moments.cross()))
    everything, rest, held = found
    heldout = HeldOut(held[0], 0.25, held[1])
    torch.testing.assert_close(heldout.complement(everything[0]), rest[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(heldout.without(everything[1], held[1]), rest[1], rtol=1e-5, atol=1e-6)


def test_tokens_are_weighed_by_their_rms() -> None:
    given, _ = streams()
    given[2, 3] *= 100.0
    weights = TokenWeights("input", power=2.0, first_token=1.0).per_token(given, None, 6)
    assert weights is not None
    normalised = given * weights.sqrt()[..., None]
    torch.testing.assert_close(normalised.square().mean(dim=-1), torch.ones(4, 6))
    soft = TokenWeights("input", power=1.0, first_token=1.0).per_token(given, None, 6)
    torch.testing.assert_close(soft, weights.sqrt())


def test_the_first_token_of_every_window_is_weighed_apart() -> None:
    given, _ = streams()
    weights = TokenWeights("uniform", power=2.0, first_token=0.25).per_token(given, None, 6)
    assert weights is not None
    assert torch.equal(weights[:, 0], torch.full((4,), 0.25))
    assert torch.equal(weights[:, 1:], torch.ones(4, 5))


def test_equal_tokens_need_no_weights() -> None:
    assert TokenWeights("uniform", power=2.0, first_token=1.0).per_token(streams()[0], None, 6) is None


def test_a_token_of_zeros_does_no_harm() -> None:
    given, _ = streams()
    given[0, 0] = 0.0
    moments = Accumulator(5, CPU)
    moments.add(given, weights=TokenWeights("input", power=2.0, first_token=1.0).per_token(given, None, 6))
    assert moments.tokens < 100
    assert bool(torch.isfinite(moments.hessian()).all())


def test_tokens_are_weighed_by_the_stream_that_a_layer_writes_into() -> None:
    given, behind = streams(8)
    weighting = TokenWeights("residual", power=2.0, first_token=1.0)
    weights = weighting.per_token(given, behind, 6)
    assert weights is not None
    torch.testing.assert_close(weights, behind.square().mean(dim=-1).reciprocal())
    assert weighting.per_token(given, None, 6) is None  # a layer that does not write


def test_the_drift_pairs_what_the_stream_has_lost_with_what_the_layer_is_given() -> None:
    given, _ = streams()
    lost, weights = torch.randn(4, 6, 3), torch.rand(4, 6)
    moments = Accumulator(5, CPU, drift=3)
    moments.add(given[:2], weights=weights[:2], residual=lost[:2])
    moments.add(given[2:], weights=weights[2:], residual=lost[2:])
    r, x = lost.reshape(-1, 3).double(), (given * weights[..., None]).reshape(-1, 5).double()
    torch.testing.assert_close(moments.drift(), r.T @ x / weights.sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weighting", ["uniform", "input"])
def test_a_layer_may_be_given_its_tokens_in_one_row(weighting: str) -> None:
    given, _ = streams()
    weights = TokenWeights(weighting, power=2.0, first_token=0.5)
    apart, together = weights.per_token(given, None, 6), weights.per_token(given.flatten(0, 1), None, 6)
    assert apart is not None
    assert together is not None
    assert torch.equal(apart.flatten(), together)
    routed = weights.per_token(given.flatten(0, 1)[:7], None, 6)  # nobody knows which of them is a first token
    plain = TokenWeights(weighting, power=2.0, first_token=1.0).per_token(given.flatten(0, 1)[:7], None, 6)
    assert torch.equal(routed, torch.ones(7) if plain is None else plain)
