"""How JointQ chooses lambda: fixed, step by step, or by held-out tokens."""

from typing import Any

import pytest
import torch
from jointq_cases import costs, jointq, layer, regularized, same, solve
from torch import Tensor

from jointq_cli.errors import NumericsError
from jointq_cli.quantization.quantizers import JointQ, Solution
from jointq_cli.quantization.quantizers.jointq.scaled_layer import ScaledLayer
from jointq_cli.quantization.quantizers.statistics import HeldOut


def identity(**options: Any) -> JointQ:
    return jointq(**{"regularization_mode": "identity", **options})


def incremental(*lambdas: float, **options: Any) -> JointQ:
    return identity(lambda_mode="incremental_lambda", lambda_list=list(lambdas), **options)


def few_tokens(tokens: int = 96, columns: int = 64, rows: int = 32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """weight (rows, columns) float32, the tokens (tokens, columns) float64, and the Hessian of a great many."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(rows, columns, generator=generator), inputs, mixing.T @ mixing


def hessian_of(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs / len(inputs)


def split(inputs: Tensor, held: int) -> tuple[Tensor, HeldOut]:
    """The Hessian of all tokens, and the last ones apart."""
    return hessian_of(inputs), HeldOut(hessian_of(inputs[-held:]), held / len(inputs))


# --- fixed


def test_the_fixed_lambda_is_in_the_notes() -> None:
    for strength in (0.0, 0.3):
        solution = solve(jointq(regularization_lambda=strength), *layer(8, 32))
        assert solution.notes["lambda"] == strength


@pytest.mark.parametrize("mode", ["identity", "diagonal"])
@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_with_the_mean_diagonal_as_reference_the_loudness_of_inputs_is_nothing(gamma: float, mode: str) -> None:
    weight, hessian = layer(16, 64)
    options = {"regularization_mode": mode, "regularization_gamma": gamma, "regularization_lambda": 0.2}
    for reference in ("mean_diagonal", "absolute"):
        quantizer = jointq(**options, regularization_reference=reference)
        quiet, loud = (solve(quantizer, weight, hessian * loudness).quantized for loudness in (1.0, 2.0**12))
        assert same(quiet, loud) == (reference == "mean_diagonal")


def test_a_lambda_is_the_same_as_so_much_added_to_the_hessian() -> None:
    weight, hessian = layer(16, 64)
    plain = solve(jointq(regularization_lambda=0.25), weight, hessian).quantized
    assert same(plain, solve(jointq(), weight, regularized(hessian, 0.25)).quantized)
    absolute = identity(regularization_reference="absolute", regularization_lambda=0.25)
    added = hessian + 0.25 * torch.eye(64, dtype=torch.float64)
    assert same(solve(absolute, weight, hessian).quantized, solve(jointq(), weight, added).quantized)


def test_a_larger_lambda_errs_less_on_weights_and_more_on_outputs() -> None:
    weight, hessian = layer(32, 64)
    results = [solve(identity(regularization_lambda=strength), weight, hessian) for strength in (0.0, 0.1, 10.0)]
    on_outputs = [float(costs(result, weight, hessian).sum()) for result in results]
    on_weights = [float(costs(result, weight, torch.eye(64, dtype=torch.float64)).sum()) for result in results]
    assert on_outputs == sorted(on_outputs)
    assert on_weights == sorted(on_weights, reverse=True)


# --- incremental


@pytest.mark.parametrize(
    ("outputs", "weights", "accepted"),
    [
        (0.9, 0.9, True),  # both fell
        (0.9, 1.1, False),  # the weight error rose
        (1.02, 0.89, True),  # a trade within both limits
        (1.02, 0.91, False),  # the weight error fell too little
        (1.04, 0.89, False),  # the output error rose too much
        (1.0, 1.0, False),  # nothing moved
        (1.0, 0.99, False),
        (0.99, 1.0, False),
    ],
)
def test_the_rule_weighs_one_error_against_the_other(outputs: float, weights: float, accepted: bool) -> None:
    assert incremental(0.1)._accepts(1.0, 1.0, outputs, weights) is accepted


class Scripted:
    """Layer.output_error and weight_error as a test wants them, in the order of lambdas."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, errors: list[tuple[float, float]]) -> None:
        self.left = list(errors)
        monkeypatch.setattr(ScaledLayer, "output_error", lambda *args: self.left[0][0])
        monkeypatch.setattr(ScaledLayer, "weight_error", lambda *args: self.left.pop(0)[1])


@pytest.mark.parametrize(
    ("errors", "chosen", "left"),
    [
        ([(1.0, 0.2), (0.9, 0.19), (0.91, 0.15), (0.8, 0.1)], 0.4, 0),
        ([(1.0, 0.2), (0.9, 0.19), (0.91, 0.18), (0.1, 0.1)], 0.1, 1),  # the first rejection ends it
        ([(1.0, 0.2), (0.9, 0.21), (0.1, 0.1), (0.1, 0.1)], 0.0, 2),
        ([(1.0, 0.31), (9.0, 0.9), (9.0, 0.95), (0.1, 0.1)], 0.1, 1),  # 0 is passed over, the next taken as it is
    ],
)
def test_lambda_grows_until_a_step_is_rejected(
    errors: list[tuple[float, float]], chosen: float, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Scripted(monkeypatch, errors)
    solution = solve(incremental(0.0, 0.1, 0.2, 0.4), *layer(8, 32))
    assert solution.notes["lambda"] == chosen
    assert len(script.left) == left


def test_lambda_zero_is_kept_where_nothing_says_to_pass_it_over(monkeypatch: pytest.MonkeyPatch) -> None:
    for threshold in (None, 0.5):
        Scripted(monkeypatch, [(1.0, 0.4), (1.0, 0.5)])
        quantizer = incremental(0.0, 0.1, incremental_initial_skip_ew_threshold=threshold)
        assert solve(quantizer, *layer(8, 32)).notes["lambda"] == 0.0


def test_a_first_lambda_above_zero_is_never_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch, [(1.0, 0.9), (1.0, 0.95)])
    assert solve(incremental(0.01, 0.1), *layer(8, 32)).notes["lambda"] == 0.01


def test_with_nothing_but_a_lambda_of_zero_to_pass_over_the_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch, [(1.0, 0.4), (1.0, 0.4)])
    with pytest.raises(NumericsError, match=r"quantizer.lambda_list=\[0.0\]: .*threshold=0.3"):
        solve(incremental(0.0), *layer(8, 32))
    fallback = solve(incremental(0.0, on_failure="rtn"), *layer(8, 32))
    assert fallback.verdict == "fallback"


def test_the_rejected_step_leaves_the_solution_of_the_one_before() -> None:
    weight, hessian = layer(32, 64)
    solution = solve(incremental(0.001, 1e6), weight, hessian)
    assert solution.notes["lambda"] == 0.001
    assert same(solution.quantized, solve(identity(regularization_lambda=0.001), weight, hessian).quantized)


def test_an_accepted_step_descends_from_the_solution_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = layer(32, 64)
    Scripted(monkeypatch, [(1.0, 0.2), (0.9, 0.1)])
    solution = solve(incremental(0.01, 0.2, max_sweeps=0), weight, hessian)
    assert solution.notes["lambda"] == 0.2
    # Without sweeps it is what the first lambda's start gave, judged by the second metric.
    start = identity(regularization_lambda=0.01, max_sweeps=0)
    assert same(solution.quantized, solve(start, weight, hessian).quantized)
    metric = hessian + 0.2 * hessian.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    signal = ((weight.double() @ metric) * weight).sum()
    error = float(costs(solution, weight, metric).sum() / signal)
    assert solution.notes["final_error"] == pytest.approx(error, rel=1e-4)


def test_a_real_layer_of_few_tokens_ends_with_less_weight_error() -> None:
    weight, inputs, _ = few_tokens(tokens=80)
    hessian = hessian_of(inputs)
    first = solve(identity(regularization_lambda=0.001), weight, hessian)
    last = solve(incremental(0.001, 0.01, 0.05, 0.1, 0.3), weight, hessian)
    assert float(last.notes["lambda"]) > 0.001
    unit = torch.eye(64, dtype=torch.float64)
    assert float(costs(last, weight, unit).sum()) < float(costs(first, weight, unit).sum())


# --- held out


def test_the_complement_is_the_hessian_of_the_other_tokens() -> None:
    inputs = few_tokens()[1]
    everything, held = split(inputs, 30)
    before = everything.clone()
    torch.testing.assert_close(held.complement(everything), hessian_of(inputs[:-30]), rtol=1e-10, atol=1e-10)
    assert torch.equal(everything, before)


def test_a_column_that_only_held_out_tokens_reach_is_dead_to_the_others() -> None:
    """Not a diagonal of -1e-16, which no power of gamma survives."""
    for held in range(25, 40):
        weight, inputs, _ = few_tokens()
        inputs[:-held, [4, 20, 7]] = 0.0
        everything, part = split(inputs, held)
        rest = part.complement(everything)
        assert (rest[[4, 20, 7]] == 0).all()
        assert (rest[:, [4, 20, 7]] == 0).all()
        assert int((rest.diagonal() > 0).sum()) == 61
    quantizer = jointq(lambda_mode="heldout", regularization_gamma=0.5)
    solution = quantizer.quantize(weight, quantizer.prepare(everything, part), torch.float32)
    assert (solution.verdict, solution.notes["dead_columns"]) == ("ok", 0)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sweeps", [0, 3])
def test_the_lambda_of_least_held_out_error_is_solved_for_with_all_tokens(sweeps: int, act_order: bool) -> None:
    weight, inputs, _ = few_tokens(tokens=80)
    everything, held = split(inputs, 26)
    options = {"act_order": act_order, "max_sweeps": sweeps}
    fixed = {strength: jointq(regularization_lambda=strength, **options) for strength in (0.0, 0.3, 100.0)}
    errors = {
        strength: float(costs(solve(quantizer, weight, held.complement(everything)), weight, held.hessian).sum())
        for strength, quantizer in fixed.items()
    }
    assert errors[0.3] < 0.95 * min(errors[0.0], errors[100.0])  # else this test needs other tokens
    quantizer = jointq(lambda_mode="heldout", lambda_list=[0.0, 0.3, 100.0], **options)
    solution = quantizer.quantize(weight, quantizer.prepare(everything, held), torch.float32)
    assert solution.notes["lambda"] == 0.3
    # In the order of the tokens that were solved for, which may differ from that of all.
    full = regularized(everything, 0.3)
    plain = float(costs(solve(fixed[0.3], weight, everything), weight, full).sum())
    assert float(costs(solution, weight, full).sum()) == pytest.approx(plain, rel=0.1)


@pytest.mark.parametrize("errors", [[3.0, 1.0, 2.0], [1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [2.0, 1.0, 1.0]])
def test_the_first_of_the_least_held_out_errors_wins(errors: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs, _ = few_tokens()
    left, judged = list(errors), []

    def error(self: ScaledLayer, metric: object, state: object, hessian: Tensor) -> float:
        judged.append(hessian)
        return left.pop(0)

    monkeypatch.setattr(ScaledLayer, "output_error", error)
    everything, held = split(inputs, 30)
    quantizer = jointq(lambda_mode="heldout", lambda_list=[0.1, 0.2, 0.3])
    solution = quantizer.quantize(weight, quantizer.prepare(everything, held), torch.float32)
    assert solution.notes["lambda"] == [0.1, 0.2, 0.3][errors.index(1.0)]
    assert all(hessian is held.hessian for hessian in judged)


def test_held_out_tokens_choose_better_for_new_tokens_than_no_lambda() -> None:
    weight, inputs, true = few_tokens(tokens=80)

    def error(solution: Solution) -> float:
        return float(costs(solution, weight, true).sum())

    quantizer = jointq(lambda_mode="heldout", lambda_list=[0.0, 0.01, 0.1, 0.5])
    chosen = quantizer.quantize(weight, quantizer.prepare(*split(inputs, 26)), torch.float32)
    assert error(chosen) < 0.9 * error(solve(jointq(), weight, hessian_of(inputs)))


def test_held_out_tokens_must_be_given_where_they_are_asked_for() -> None:
    weight, hessian = layer(8, 32)
    quantizer = jointq(lambda_mode="heldout", heldout_share=0.4)
    assert quantizer.heldout == 0.4
    assert jointq(heldout_share=0.4).heldout == 0.0
    with pytest.raises(ValueError, match="needs held-out tokens"):
        quantizer.prepare(hessian)
    given = jointq().prepare(hessian, HeldOut(hessian, 0.5))  # and are no harm where they are not
    assert same(jointq().quantize(weight, given, torch.float32).quantized, solve(jointq(), weight, hessian).quantized)


@pytest.mark.parametrize("mode", ["fixed_lambda", "incremental_lambda", "heldout"])
def test_every_mode_is_deterministic_and_reads_the_hessian_only(mode: str) -> None:
    weight, inputs, _ = few_tokens()
    everything, held = split(inputs, 30)
    before = everything.clone(), held.hessian.clone(), weight.clone()
    quantizer = identity(lambda_mode=mode, ils_enabled=True, act_order=True, enable_gptq=True)
    first, second = (
        quantizer.quantize(weight, quantizer.prepare(everything, held), torch.bfloat16).quantized for _ in range(2)
    )
    assert same(first, second)
    assert torch.equal(everything, before[0])
    assert torch.equal(held.hessian, before[1])
    assert torch.equal(weight, before[2])
