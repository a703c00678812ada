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


def statistics(original: Tensor, quantized: Tensor, held: int = 0, error: Tensor | None = None) -> Statistics:
    """Of all tokens, and of the last `held` separately; error: of the residual stream (tokens, out)."""

    def sums(part: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        o, x = original[part], quantized[part]
        return x.T @ x / len(x), (o - x).T @ x / len(x), None if error is None else error[part].T @ x / len(x)

    hessian, cross, drift = sums(slice(None))
    if not held:
        return Statistics(hessian, cross, drift)
    held_hessian, held_cross, held_drift = sums(slice(-held, None))
    return Statistics(hessian, cross, drift, HeldOut(held_hessian, held / len(original), held_cross, held_drift))


def corrected(qep: Qep, original: Tensor, quantized: Tensor, ridge: Tensor | None = None, held: int = 0) -> Tensor:
    return qep.correction(statistics(original, quantized, held), ridge).apply(weight()).weight


def test_a_full_undamped_step_is_the_least_squares_minimiser() -> None:
    original, quantized = inputs()
    expected = torch.linalg.lstsq(quantized, original @ weight().double().T).solution.T
    torch.testing.assert_close(corrected(EXACT, original, quantized).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "qep", [DEFAULT, EXACT, *(replace(DEFAULT, perccorr_mode=m) for m in ("heldout", "shrinkage"))]
)
def test_identical_inputs_change_nothing(qep: Qep) -> None:
    original, _ = inputs()
    assert torch.equal(corrected(qep, original, original, held=10), weight())


@pytest.mark.parametrize("qep", [DEFAULT, EXACT, replace(DEFAULT, perccorr_mode="heldout")])
def test_a_change_of_basis_of_the_inputs_is_one_of_the_corrected_weight(qep: Qep) -> None:
    original, quantized = inputs()
    basis = torch.linalg.qr(torch.randn(COLUMNS, COLUMNS, dtype=torch.float64)).Q
    turned = statistics(original @ basis, quantized @ basis, held=10)
    found = qep.correction(turned, None).apply((weight().double() @ basis).float()).weight
    expected = corrected(qep, original, quantized, held=10).double() @ basis
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_with_residual_the_least_squares_problem_is_that_of_the_residual_stream() -> None:
    original, quantized = inputs()
    error = torch.randn(TOKENS, ROWS, dtype=torch.float64)
    known = replace(statistics(original, quantized), drift=error.T @ quantized / TOKENS)
    found = replace(EXACT, residual=1.0).correction(known, None).apply(weight()).weight
    expected = torch.linalg.lstsq(quantized, original @ weight().double().T + error).solution.T
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    half = replace(EXACT, residual=0.5).correction(known, None).apply(weight()).weight
    plain = corrected(EXACT, original, quantized)
    torch.testing.assert_close(half - plain, 0.5 * (found - plain), rtol=1e-4, atol=1e-5)


def test_alpha_is_the_length_of_the_step() -> None:
    original, quantized = inputs()
    full = corrected(replace(DEFAULT, perccorr=1.0), original, quantized) - weight()
    for alpha in (0.0, 0.25, 0.5):
        part = corrected(replace(DEFAULT, perccorr=alpha), original, quantized) - weight()
        torch.testing.assert_close(part, alpha * full, rtol=1e-4, atol=1e-6)


def test_damping_is_a_share_of_the_mean_diagonal() -> None:
    original, quantized = inputs()
    qep = replace(EXACT, percdamp=0.3)
    hessian = quantized.T @ quantized / TOKENS
    damped = hessian + 0.3 * hessian.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    step = weight().double() @ ((original - quantized).T @ quantized / TOKENS) @ torch.linalg.inv(damped)
    found = corrected(qep, original, quantized).double()
    torch.testing.assert_close(found, weight().double() + step, rtol=1e-5, atol=1e-6)
    # scaling both inputs changes nothing
    torch.testing.assert_close(corrected(qep, 100 * original, 100 * quantized), corrected(qep, original, quantized))


def test_with_a_ridge_the_quantizers_objective_is_the_joint_one() -> None:
    """e (H + R) e^T with e = W* - V, and |W X - V X_q|^2 / tokens + |(W - V) R^1/2|^2, differ by a constant."""
    original, quantized = inputs()
    ridge = torch.rand(COLUMNS, dtype=torch.float64) + 0.1
    target = corrected(EXACT, original, quantized, ridge).double()
    metric = quantized.T @ quantized / TOKENS + torch.diag(ridge)
    gaps = []
    for seed in range(5):
        candidate = weight(seed + 10).double()
        joint = (original @ weight().double().T - quantized @ candidate.T).square().sum() / TOKENS
        joint += ((weight().double() - candidate).square() * ridge).sum()
        error = target - candidate
        gaps.append(joint - torch.trace(error @ metric @ error.T))
    torch.testing.assert_close(torch.stack(gaps), gaps[0].expand(5), rtol=1e-5, atol=1e-5)


def test_pulling_to_the_corrected_weight_leaves_the_ridge_out() -> None:
    original, quantized = inputs()
    ridge = torch.ones(COLUMNS, dtype=torch.float64)
    qep = replace(DEFAULT, pull="corrected")
    assert torch.equal(corrected(qep, original, quantized, ridge), corrected(DEFAULT, original, quantized))
    assert not torch.equal(corrected(DEFAULT, original, quantized, ridge), corrected(DEFAULT, original, quantized))


@pytest.mark.parametrize("residual", [0.0, 0.7])
def test_held_out_alpha_is_the_best_of_all_on_the_held_out_tokens(residual: float) -> None:
    original, quantized = inputs(tokens=16)
    error = 0.3 * torch.randn(16, ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    held, drift = 8, error if residual else None
    qep = replace(EXACT, perccorr_mode="heldout", residual=residual)
    known = statistics(original, quantized, held, drift)
    applied = qep.correction(known, None).apply(weight())
    chosen = applied.notes["alpha"]
    assert 0 < chosen < 1
    rest = statistics(original[:-held], quantized[:-held], error=None if drift is None else drift[:-held])

    def remaining(alpha: float) -> float:
        fixed = replace(qep, perccorr_mode="fixed", perccorr=alpha)
        found = fixed.correction(rest, None).apply(weight()).weight.double()
        target = original[-held:] @ weight().double().T + residual * error[-held:]
        return float((target - quantized[-held:] @ found.T).square().sum())

    assert remaining(chosen) < min(remaining(alpha) for alpha in (0.9 * chosen, 1.1 * chosen, 0.0, 1.0))
    everything = replace(qep, perccorr_mode="fixed", perccorr=chosen).correction(known, None).apply(weight())
    torch.testing.assert_close(applied.weight, everything.weight)


@pytest.mark.parametrize("held", [500, 1000])
def test_shrinkage_keeps_of_each_row_the_share_that_is_signal(held: int) -> None:
    """s = X_q A^T + noise is regressed on white inputs: |a|^2 of signal, columns / tokens of noise in each row."""
    tokens, columns = 2000, 100
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    energies = torch.tensor([0.0, 0.5, 1.0, 4.0], dtype=torch.float64) * columns / tokens
    true = torch.randn(4, columns, generator=generator, dtype=torch.float64)
    true *= (energies / true.square().sum(dim=1)).sqrt()[:, None]
    error = x @ true.T + torch.randn(tokens, 4, generator=generator, dtype=torch.float64)
    known, nothing = statistics(x, x, held, error), torch.zeros(4, columns)
    qep = replace(EXACT, residual=1.0, perccorr_mode="shrinkage")
    full = replace(qep, perccorr_mode="fixed").correction(known, None).apply(nothing).weight.double()
    applied = qep.correction(known, None).apply(nothing)
    shrunk = applied.weight.double()
    kept = (shrunk * full).sum(dim=1) / full.square().sum(dim=1)
    torch.testing.assert_close(shrunk, kept[:, None] * full, rtol=1e-4, atol=1e-6)
    expected = energies / (energies + columns / tokens)
    assert (kept - expected).abs().max() < 0.2
    assert applied.notes["kept"] == pytest.approx((kept @ full.square().sum(1) / full.square().sum()).item(), rel=0.02)
    distance = [(step - true).square().sum().item() for step in (shrunk, full, 0.0 * full)]
    assert distance[0] < min(distance[1:])


def test_raised_damping_is_recorded() -> None:
    original, quantized = inputs()
    singular = statistics(original[:3], quantized[:3])
    notes = EXACT.correction(singular, None).apply(weight()).notes
    assert notes["qep_damping"] > 0
    assert "qep_damping" not in DEFAULT.correction(statistics(original, quantized), None).apply(weight()).notes


def test_an_empty_keyword_would_exclude_everything() -> None:
    with pytest.raises(ConfigError, match=r"^qep\.exclude_layer_keywords="):
        replace(DEFAULT, exclude_layer_keywords=[""])


def test_excluded_layers_are_not_corrected() -> None:
    assert DEFAULT.corrects("model.layers.0.mlp.gate_proj")
    assert not DEFAULT.corrects("model.layers.0.mlp.down_proj")
    assert EXACT.corrects("model.layers.0.mlp.down_proj")
    assert not NoQep().corrects("model.layers.0.mlp.gate_proj")


def test_dead_columns_are_left_as_they_are() -> None:
    original, quantized = inputs()
    original, quantized = original.clone(), quantized.clone()
    quantized[:, 2] = 0.0
    found = corrected(EXACT, original, quantized)
    assert bool(torch.isfinite(found).all())
    torch.testing.assert_close(found[:, 2], weight()[:, 2])


def test_broken_statistics_are_named() -> None:
    original, quantized = inputs()
    quantized = quantized.clone()
    quantized[3, 1] = torch.nan
    with pytest.raises(NumericsError, match=r"^the Hessian holds NaN"):
        corrected(DEFAULT, original, quantized)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("perccorr", 1.5, "from 0 to 1"),
        ("perccorr", float("nan"), "from 0 to 1"),
        ("residual", 2.0, "from 0 to 1"),
        ("perccorr_mode", "best", "one of fixed, heldout, shrinkage"),
        ("heldout_share", 1.0, "above 0 and below 1"),
        ("percdamp", -0.1, "at least 0"),
        ("pull", "zero", "original or corrected"),
    ],
)
def test_a_bad_value_is_named_with_its_rule(key: str, value: object, rule: str) -> None:
    with pytest.raises(ConfigError, match=rf"^qep\.{key}={value}: must be {rule}"):
        replace(DEFAULT, **{key: value})


def test_the_description() -> None:
    assert DEFAULT.describe() == "QEP alpha=0.5 without mlp.down_proj"
    assert replace(EXACT, perccorr_mode="heldout").describe() == "QEP alpha=heldout"
    assert replace(EXACT, perccorr_mode="shrinkage").describe() == "QEP alpha=1 shrunk"
    assert replace(EXACT, residual=0.5).describe() == "QEP alpha=1 residual=0.5"
    assert NoQep().describe() == ""
