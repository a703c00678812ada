"""QEP: the corrected weight is what least squares says it is, and JointQ's objective is the joint one."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from jointq_cli.errors import ConfigError, NumericsError
from jointq_cli.quantization.qep import NoQep, Qep
from jointq_cli.quantization.quantizers.statistics import HeldOut, Statistics

DEFAULT = Qep(
    perccorr=0.5, residual=0.0, perccorr_mode="fixed", heldout_share=0.25, percdamp=0.01, pull="original",
    exclude_layer_keywords=["mlp.down_proj"],
)  # fmt: skip
EXACT = replace(DEFAULT, perccorr=1.0, percdamp=0.0, exclude_layer_keywords=[])
ROWS, COLUMNS, TOKENS = 3, 6, 40


def inputs(seed: int = 0, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """X and X_q (tokens, in) float64."""
    generator = torch.Generator().manual_seed(seed)
    original = torch.randn(tokens, COLUMNS, generator=generator, dtype=torch.float64)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64) * 0.1
    noise = torch.randn(tokens, COLUMNS, generator=generator, dtype=torch.float64) * 0.2
    return original, original + original @ mixing + noise


def weight(seed: int = 1) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


def statistics(original: Tensor, given: Tensor, held: int = 0, lost: Tensor | None = None) -> Statistics:
    """Of all tokens, and of the last `held` apart; lost: what the residual stream has lost (tokens, out)."""

    def moments(part: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        o, x = original[part], given[part]
        return x.T @ x / len(x), (o - x).T @ x / len(x), None if lost is None else lost[part].T @ x / len(x)

    hessian, cross, drift = moments(slice(None))
    if not held:
        return Statistics(hessian, cross, drift)
    held_hessian, held_cross, held_drift = moments(slice(-held, None))
    return Statistics(hessian, cross, drift, HeldOut(held_hessian, held / len(original), held_cross, held_drift))


def corrected(qep: Qep, original: Tensor, given: Tensor, ridge: Tensor | None = None, held: int = 0) -> Tensor:
    return qep.correction(statistics(original, given, held), ridge).apply(weight()).weight


def test_a_whole_undamped_step_is_the_least_squares_minimiser() -> None:
    original, given = inputs()
    expected = torch.linalg.lstsq(given, original @ weight().double().T).solution.T
    torch.testing.assert_close(corrected(EXACT, original, given).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("qep", [DEFAULT, EXACT, replace(DEFAULT, perccorr_mode="heldout")])
def test_identical_streams_change_nothing(qep: Qep) -> None:
    original, _ = inputs()
    assert torch.equal(corrected(qep, original, original, held=10), weight())


@pytest.mark.parametrize("qep", [DEFAULT, EXACT, replace(DEFAULT, perccorr_mode="heldout")])
def test_a_change_of_basis_of_the_inputs_is_one_of_the_corrected_weight(qep: Qep) -> None:
    original, given = inputs()
    basis = torch.linalg.qr(torch.randn(COLUMNS, COLUMNS, dtype=torch.float64)).Q
    turned = statistics(original @ basis, given @ basis, held=10)
    found = qep.correction(turned, None).apply((weight().double() @ basis).float()).weight
    expected = corrected(qep, original, given, held=10).double() @ basis
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_with_the_residual_the_stream_behind_the_layer_is_what_least_squares_makes_of_it() -> None:
    original, given = inputs()
    lost = torch.randn(TOKENS, ROWS, dtype=torch.float64)
    known = replace(statistics(original, given), drift=lost.T @ given / TOKENS)
    found = replace(EXACT, residual=1.0).correction(known, None).apply(weight()).weight
    expected = torch.linalg.lstsq(given, original @ weight().double().T + lost).solution.T
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    half = replace(EXACT, residual=0.5).correction(known, None).apply(weight()).weight
    plain = corrected(EXACT, original, given)
    torch.testing.assert_close(half - plain, 0.5 * (found - plain), rtol=1e-4, atol=1e-5)


def test_alpha_is_the_length_of_the_step() -> None:
    original, given = inputs()
    full = corrected(replace(DEFAULT, perccorr=1.0), original, given) - weight()
    for alpha in (0.0, 0.25, 0.5):
        part = corrected(replace(DEFAULT, perccorr=alpha), original, given) - weight()
        torch.testing.assert_close(part, alpha * full, rtol=1e-4, atol=1e-6)


def test_damping_is_a_share_of_the_mean_diagonal() -> None:
    original, given = inputs()
    qep = replace(EXACT, percdamp=0.3)
    hessian = given.T @ given / TOKENS
    damped = hessian + 0.3 * hessian.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    step = weight().double() @ ((original - given).T @ given / TOKENS) @ torch.linalg.inv(damped)
    torch.testing.assert_close(corrected(qep, original, given).double(), weight().double() + step, rtol=1e-5, atol=1e-6)
    # scaling both streams changes nothing
    torch.testing.assert_close(corrected(qep, 100 * original, 100 * given), corrected(qep, original, given))


def test_with_a_ridge_the_quantizers_objective_is_the_joint_one() -> None:
    """e (H + R) e^T with e = W* - V, and |W X - V X_q|^2 / tokens + |(W - V) R^1/2|^2, differ by a constant."""
    original, given = inputs()
    ridge = torch.rand(COLUMNS, dtype=torch.float64) + 0.1
    target = corrected(EXACT, original, given, ridge).double()
    metric = given.T @ given / TOKENS + torch.diag(ridge)
    gaps = []
    for seed in range(5):
        candidate = weight(seed + 10).double()
        joint = (original @ weight().double().T - given @ candidate.T).square().sum() / TOKENS
        joint += ((weight().double() - candidate).square() * ridge).sum()
        error = target - candidate
        gaps.append(joint - torch.trace(error @ metric @ error.T))
    torch.testing.assert_close(torch.stack(gaps), gaps[0].expand(5), rtol=1e-5, atol=1e-5)


def test_pulling_to_the_corrected_weight_leaves_the_ridge_out() -> None:
    original, given = inputs()
    ridge = torch.ones(COLUMNS, dtype=torch.float64)
    qep = replace(DEFAULT, pull="corrected")
    assert torch.equal(corrected(qep, original, given, ridge), corrected(DEFAULT, original, given))
    assert not torch.equal(corrected(DEFAULT, original, given, ridge), corrected(DEFAULT, original, given))


@pytest.mark.parametrize("residual", [0.0, 0.7])
def test_held_out_alpha_is_the_best_of_all_on_the_held_out_tokens(residual: float) -> None:
    original, given = inputs(tokens=16)
    lost = 0.3 * torch.randn(16, ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    held, drift = 8, lost if residual else None
    qep = replace(EXACT, perccorr_mode="heldout", residual=residual)
    known = statistics(original, given, held, drift)
    applied = qep.correction(known, None).apply(weight())
    chosen = applied.notes["alpha"]
    assert 0 < chosen < 1
    rest = statistics(original[:-held], given[:-held], lost=None if drift is None else drift[:-held])

    def error(alpha: float) -> float:
        fixed = replace(qep, perccorr_mode="fixed", perccorr=alpha)
        found = fixed.correction(rest, None).apply(weight()).weight.double()
        wanted = original[-held:] @ weight().double().T + residual * lost[-held:]
        return float((wanted - given[-held:] @ found.T).square().sum())

    assert error(chosen) < min(error(alpha) for alpha in (0.9 * chosen, 1.1 * chosen, 0.0, 1.0))
    everything = replace(qep, perccorr_mode="fixed", perccorr=chosen).correction(known, None).apply(weight())
    torch.testing.assert_close(applied.weight, everything.weight)


def test_damping_that_had_to_be_raised_is_told() -> None:
    original, given = inputs()
    singular = statistics(original[:3], given[:3])
    notes = EXACT.correction(singular, None).apply(weight()).notes
    assert notes["qep_damping"] > 0
    assert "qep_damping" not in DEFAULT.correction(statistics(original, given), None).apply(weight()).notes


def test_an_empty_keyword_would_exclude_everything() -> None:
    with pytest.raises(ConfigError, match=r"^qep\.exclude_layer_keywords="):
        replace(DEFAULT, exclude_layer_keywords=[""])


def test_excluded_layers_are_not_corrected() -> None:
    assert DEFAULT.corrects("model.layers.0.mlp.gate_proj")
    assert not DEFAULT.corrects("model.layers.0.mlp.down_proj")
    assert EXACT.corrects("model.layers.0.mlp.down_proj")
    assert not NoQep().corrects("model.layers.0.mlp.gate_proj")


def test_dead_columns_are_left_as_they_are() -> None:
    original, given = inputs()
    original, given = original.clone(), given.clone()
    given[:, 2] = 0.0
    found = corrected(EXACT, original, given)
    assert bool(torch.isfinite(found).all())
    torch.testing.assert_close(found[:, 2], weight()[:, 2])


def test_broken_statistics_are_named() -> None:
    original, given = inputs()
    given = given.clone()
    given[3, 1] = torch.nan
    with pytest.raises(NumericsError, match=r"^the Hessian holds NaN"):
        corrected(DEFAULT, original, given)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("perccorr", 1.5, "from 0 to 1"),
        ("perccorr", float("nan"), "from 0 to 1"),
        ("residual", 2.0, "from 0 to 1"),
        ("perccorr_mode", "best", "fixed or heldout"),
        ("heldout_share", 1.0, "above 0 and below 1"),
        ("percdamp", -0.1, "at least 0"),
        ("pull", "zero", "original or corrected"),
    ],
)
def test_a_bad_value_is_named_with_its_rule(key: str, value: object, rule: str) -> None:
    with pytest.raises(ConfigError, match=rf"^qep\.{key}={value}: must be {rule}"):
        replace(DEFAULT, **{key: value})


def test_what_is_done_is_told_in_a_few_words() -> None:
    assert DEFAULT.describe() == "QEP alpha=0.5 without mlp.down_proj"
    assert replace(EXACT, perccorr_mode="heldout").describe() == "QEP alpha=heldout"
    assert replace(EXACT, residual=0.5).describe() == "QEP alpha=1 residual=0.5"
    assert NoQep().describe() == ""
