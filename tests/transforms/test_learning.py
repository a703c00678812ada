"""Learning that learns: it lowers the error of tokens it has not seen, says what it did, and knows when to stop."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from jointq_cli.errors import Interrupted, NumericsError
from jointq_cli.records import RotationTraining
from jointq_cli.transforms.activation_samples import rms_normalize
from jointq_cli.transforms.learning import (
    PATIENCE,
    VALIDATE_EVERY,
    VALIDATION_STRIDE,
    Progress,
    initial_rotation,
    learn_r1,
    learn_r2,
    relative_error,
    rotate_heads,
    sqnr_db,
)
from jointq_cli.transforms.objectives import OBJECTIVES
from jointq_cli.transforms.settings import INITS, PARAMETRIZATIONS, LearnedRotation

CPU = torch.device("cpu")
SIZE = 64
BOTH = pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
RATES = {"lie": 0.01, "qr_orth": 0.03}


def learned(**changes: object) -> LearnedRotation:
    values: dict[str, object] = {
        "r1": True, "r2": True, "r4": False, "seed": 0, "init": "random_hadamard", "objective": "range2",
        "parametrization": "lie", "r1_lr": 0.01, "r1_epochs": 20, "r2_lr": 0.01, "r2_epochs": 20, "cos_lr": True,
        "momentum": 0.9, "batch_tokens": 256, "reservoir_tokens": 256, "early_stop": True, "stop_bits": 4,
    }  # fmt: skip
    return LearnedRotation(**{**values, **changes})  # type: ignore[arg-type]


class SilentBar:
    def __init__(self) -> None:
        self.position = 0

    def advance(self, n: int = 1, status: str = "") -> None:
        self.position += n


class Seen:
    """A watch that records its bars and pauses."""

    def __init__(self, stop_at: int = -1) -> None:
        self.pauses, self.stop_at = 0, stop_at
        self.bars: dict[str, tuple[int, SilentBar]] = {}
        self.progress = Progress(self.bar, self.pause)

    @contextmanager
    def bar(self, name: str, steps: int) -> Iterator[SilentBar]:
        self.bars[name] = (steps, SilentBar())
        yield self.bars[name][1]

    def pause(self) -> None:
        self.pauses += 1
        if self.pauses == self.stop_at:
            raise Interrupted("stop")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uneven_channels(seed: int = 0, sites: int = 4, tokens: int = 256, size: int = SIZE) -> Tensor:
    """Gaussian tokens (sites, tokens, size) of rms 1 whose channels have scales of their own, from a lognormal."""
    generator = seeded(seed)
    rows = torch.randn(sites, tokens, size, generator=generator)
    return rms_normalize(rows * torch.randn(size, generator=generator).exp())


def heavy_tails(seed: int = 0) -> Tensor:
    """The same with Student's t of three degrees of freedom, and hidden in another basis."""
    generator = seeded(seed)
    spread = torch.randn(4, 256, SIZE, 3, generator=generator).square().mean(dim=-1).sqrt()
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator))[0]
    return rms_normalize(uneven_channels(seed) / spread @ basis)


def start(seed: int = 0, size: int = SIZE) -> Tensor:
    return initial_rotation(size, "random_hadamard", seeded(seed))


def learn(rows: Tensor, settings: LearnedRotation, at: Tensor | None = None) -> tuple[Tensor, RotationTraining]:
    return learn_r1(rows, start() if at is None else at, settings, CPU, Seen().progress)


def gram_error(rotation: Tensor) -> float:
    return float((rotation.mT @ rotation - torch.eye(rotation.shape[-1], dtype=rotation.dtype)).abs().max())


def held_out_error(rows: Tensor, rotation: Tensor) -> float:
    """Of every eighth token, the mean over sites."""
    turned = rows[:, 7::8] @ rotation.float()
    return sum(relative_error(site, bits=4) for site in turned) / len(rows)


# --- it learns


@BOTH
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_learned_lowers_the_error_of_tokens_nobody_learned_from(objective: str, parametrization: str) -> None:
    rows, rate = heavy_tails(), RATES[parametrization]
    rotation, course = learn(rows, learned(objective=objective, parametrization=parametrization, r1_lr=rate))
    assert course.error_before == pytest.approx(held_out_error(rows, start()), rel=1e-5)
    assert course.error_after == pytest.approx(held_out_error(rows, rotation), rel=1e-5)
    assert course.error_after < 0.9 * course.error_before
    assert course.loss_after < course.loss_before
    assert course.moved > 0.05
    assert gram_error(rotation) < 1e-13
    assert rotation.dtype == torch.float64


def least_error(objective: str, seed: int) -> float:
    """The least that any of 60 steps at any of some rates has reached."""
    courses = [
        learn(uneven_channels(seed), learned(objective=objective, r1_lr=lr, early_stop=False), start(seed))[1]
        for lr in (0.003, 0.01, 0.03)
    ]
    assert {course.steps for course in courses} == {60}
    return min(checkup.error for course in courses for checkup in course.errors)


def test_the_range_leads_to_fewer_errors_than_whip_in_as_many_steps() -> None:
    """At most 0.85 x, on channels of uneven scales: whip does not know the grid, and hardly gets below its start."""
    found = {name: sum(least_error(name, seed) for seed in range(3)) for name in ("whip", "range2")}
    assert found["range2"] <= 0.85 * found["whip"]


@BOTH
def test_r2_lowers_the_error_of_what_o_proj_is_given(parametrization: str) -> None:
    inputs = heavy_tails()[0]  # 2 KV heads of 16, two query heads each
    at = torch.stack([start(seed, 16) for seed in range(2)])
    settings = learned(parametrization=parametrization, r2_lr=RATES[parametrization], r2_epochs=60, batch_tokens=64)
    rotation, course = learn_r2("R2 of block 3", inputs, at, settings, CPU, lambda: None)
    assert rotation.shape == (2, 16, 16)
    assert gram_error(rotation) < 1e-13
    assert course.name == "R2 of block 3"
    assert course.error_after < course.error_before
    held = inputs[7::8]
    assert course.error_after == pytest.approx(relative_error(rotate_heads(held, rotation.float()), 4), rel=1e-4)


# --- it steps


@pytest.mark.parametrize(("batch", "steps"), [(256, 20 * 3), (448, 20 * 2), (896, 20), (10**6, 20)])
def test_every_step_is_taken_and_counted(batch: int, steps: int) -> None:
    """4 sites of 224 tokens to learn from. DartQuant's released settings never step R2's optimiser."""
    seen = Seen()
    _, course = learn_r1(uneven_channels(), start(), learned(batch_tokens=batch, early_stop=False), CPU, seen.progress)
    assert course.steps == course.best_step == seen.pauses == steps
    assert {name: (total, bar.position) for name, (total, bar) in seen.bars.items()} == {"learn R1": (steps, steps)}
    assert [checkup.step for checkup in course.errors] == list(range(0, steps + 1, VALIDATE_EVERY))


def test_r2_steps_with_fewer_tokens_than_a_batch_has() -> None:
    inputs = uneven_channels(tokens=16)[0]
    at = torch.stack([start(seed, 16) for seed in range(4)])
    settings = learned(batch_tokens=2048, r2_epochs=5, early_stop=False)
    pauses: list[None] = []
    _, course = learn_r2("R2 of block 0", inputs, at, settings, CPU, lambda: pauses.append(None))
    assert course.steps == course.best_step == len(pauses) == 5
    assert course.moved > 1e-3
    assert [checkup.step for checkup in course.errors] == [0, 5]


def test_without_a_cosine_the_way_is_longer() -> None:
    moved = [learn(uneven_channels(), learned(cos_lr=cos, early_stop=False))[1].moved for cos in (True, False)]
    assert moved[0] < moved[1]


# --- what it learns from


@BOTH
def test_held_out_tokens_are_never_learned_from(parametrization: str) -> None:
    settings = learned(parametrization=parametrization, r1_epochs=3, early_stop=False)
    rows = uneven_channels()
    other = rows.clone()
    held_out = slice(VALIDATION_STRIDE - 1, None, VALIDATION_STRIDE)
    other[:, held_out] = uneven_channels(seed=5)[:, held_out]
    (found, course), (again, different) = learn(rows, settings), learn(other, settings)
    assert torch.equal(found, again)
    assert course.error_after != different.error_after
    other[:, 0] = uneven_channels(seed=5)[:, 0]
    assert not torch.equal(learn(other, settings)[0], found)


def numbered_rows(sites: int, tokens: int) -> Tensor:
    """Row (site, token) has the norm 1 + its number, which no rotation changes."""
    rows = torch.randn(sites, tokens, SIZE, generator=seeded(0))
    numbers = torch.arange(sites * tokens, dtype=torch.float32).reshape(sites, tokens, 1)
    numbered: Tensor = rows / rows.norm(dim=-1, keepdim=True) * (1 + numbers)
    return numbered


def test_every_step_draws_from_every_site_and_an_epoch_is_all_tokens_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """JointQuant and DartQuant's code learn from the first files that they find."""
    sites, tokens, epochs = 6, 40, 4
    steps: list[list[int]] = []
    whip: Callable[[Tensor], Tensor] = OBJECTIVES["whip"]

    def noting(rows: Tensor) -> Tensor:
        if rows.requires_grad:  # held-out rows are only measured
            steps.append((rows.detach().norm(dim=-1) - 1).round().int().tolist())
        return whip(rows)

    monkeypatch.setitem(OBJECTIVES, "whip", noting)
    settings = learned(objective="whip", r1_lr=1e-4, batch_tokens=20, r1_epochs=epochs, early_stop=False)
    learn(numbered_rows(sites, tokens), settings)
    per_epoch = sites * 35 // 20
    assert len(steps) == epochs * per_epoch
    assert all({row // tokens for row in step} == set(range(sites)) for step in steps)
    taught = [row for row in range(sites * tokens) if row % tokens % VALIDATION_STRIDE != VALIDATION_STRIDE - 1]
    for epoch in range(epochs):
        drawn = [row for step in steps[epoch * per_epoch : (epoch + 1) * per_epoch] for row in step]
        assert sorted(drawn) == taught
    assert steps[:per_epoch] != steps[per_epoch : 2 * per_epoch]


@BOTH
def test_a_seed_gives_the_same_bits_and_another_one_others(parametrization: str) -> None:
    def found(seed: int) -> Tensor:
        return learn(uneven_channels(), learned(parametrization=parametrization, seed=seed, early_stop=False))[0]

    assert torch.equal(found(1), found(1))
    assert not torch.equal(found(1), found(2))


def test_what_is_given_stays_as_it_is() -> None:
    rows, at = uneven_channels(), start()
    before = rows.clone(), at.clone()
    learn(rows, learned(r1_epochs=1), at)
    assert torch.equal(rows, before[0])
    assert torch.equal(at, before[1])


def test_tokens_in_bfloat16_are_learned_from_in_float32() -> None:
    rows = uneven_channels().bfloat16()
    assert torch.equal(learn(rows, learned(r1_epochs=2))[0], learn(rows.float(), learned(r1_epochs=2))[0])


# --- it stops


@BOTH
def test_with_early_stop_the_best_checkup_is_kept(parametrization: str) -> None:
    settings = learned(parametrization=parametrization, r1_lr=0.03, cos_lr=False, r1_epochs=40)
    _, course = learn(heavy_tails(), settings)
    best = min(course.errors, key=lambda checkup: checkup.error)
    assert course.error_after == pytest.approx(best.error, rel=1e-5)
    assert course.best_step == best.step > 0
    assert best is not course.errors[-1]  # or this test shows nothing


def test_without_early_stop_the_last_step_is_kept_whatever_it_costs() -> None:
    settings = learned(r1_lr=0.03, cos_lr=False, r1_epochs=40, early_stop=False)
    _, course = learn(heavy_tails(), settings)
    assert course.error_after == pytest.approx(course.errors[-1].error, rel=1e-5)
    assert course.error_after > 1.01 * min(checkup.error for checkup in course.errors)
    assert course.best_step == course.steps


def test_where_nothing_can_be_gained_the_start_is_kept_and_learning_ends_early() -> None:
    """Tokens of +1 and -1 have the least whip there is, and the least error too."""
    rows = torch.randint(2, (4, 256, SIZE), generator=seeded(0)) * 2.0 - 1.0
    settings = learned(objective="whip", r1_epochs=100)
    rotation, course = learn(rows, settings, torch.eye(SIZE))
    assert (course.steps, course.best_step) == (PATIENCE * VALIDATE_EVERY, 0)
    assert course.error_after == course.error_before
    assert torch.equal(rotation, torch.eye(SIZE, dtype=torch.float64))
    assert course.moved == 0


@BOTH
def test_a_rate_beyond_all_bounds_is_told_by_its_key(parametrization: str) -> None:
    settings = learned(parametrization=parametrization, r1_lr=1e39, r2_lr=1e39)
    with pytest.raises(NumericsError, match=r"^rotation\.r1_lr=1e\+39: R1 has diverged by step 10; lower it$"):
        learn(uneven_channels(), settings)
    at = torch.stack([start(seed, 16) for seed in range(4)])
    with pytest.raises(NumericsError, match=r"^rotation\.r2_lr=1e\+39: R2 of block 5 has diverged by step 10"):
        learn_r2("R2 of block 5", uneven_channels()[0], at, settings, CPU, lambda: None)


@BOTH
@pytest.mark.parametrize("lr", [0.1, 1.0, 100.0])
def test_a_rate_that_is_too_large_harms_nobody_who_stops_early(lr: float, parametrization: str) -> None:
    rotation, course = learn(uneven_channels(), learned(parametrization=parametrization, r1_lr=lr))
    assert course.error_after <= course.error_before * (1 + 1e-5)
    assert gram_error(rotation) < 1e-13


def test_learning_can_be_stopped_between_any_two_steps() -> None:
    seen = Seen(stop_at=4)
    with pytest.raises(Interrupted):
        learn_r1(uneven_channels(), start(), learned(), CPU, seen.progress)
    assert seen.bars["learn R1"][1].position == 4


# --- where it starts


@pytest.mark.parametrize("size", [12, 64, 92])
@pytest.mark.parametrize("init", INITS)
def test_every_start_is_orthogonal(init: str, size: int) -> None:
    mean = torch.randn(size, generator=seeded(1))
    found = initial_rotation(size, init, seeded(0), mean)
    assert (found.shape, found.dtype) == ((size, size), torch.float64)
    assert gram_error(found) < 1e-13
    assert torch.equal(found, initial_rotation(size, init, seeded(0), mean))


@pytest.mark.parametrize("init", INITS)
def test_the_random_starts_and_no_others_depend_on_the_seed(init: str) -> None:
    mean = torch.ones(SIZE)
    same = torch.equal(initial_rotation(SIZE, init, seeded(0), mean), initial_rotation(SIZE, init, seeded(1), mean))
    assert same == (init not in ("random_hadamard", "orthogonal"))


def test_random_orthogonal_starts_prefer_no_direction() -> None:
    """Haar's measure: LAPACK's own Q has a first entry that is never positive."""
    generator = seeded(0)
    entries = torch.stack([initial_rotation(3, "orthogonal", generator) for _ in range(2000)])
    assert entries.mean(dim=0).abs().max() < 6 * (1 / 3 / 2000) ** 0.5
    assert (entries.square().mean(dim=0) - 1 / 3).abs().max() < 0.05


def test_dc_aligned_turns_what_tokens_have_in_common_into_an_offset() -> None:
    mean = torch.randn(SIZE, generator=seeded(0), dtype=torch.float64)
    found = initial_rotation(SIZE, "dc_aligned", seeded(0), mean)
    torch.testing.assert_close(mean @ found, torch.full_like(mean, float(mean.norm()) / SIZE**0.5), rtol=0, atol=1e-12)
    aside = torch.randn(SIZE, generator=seeded(1), dtype=torch.float64)
    aside -= aside @ mean / mean.square().sum() * mean
    assert abs(float((aside @ found).sum())) < 1e-12


@pytest.mark.parametrize("factor", [0.0, 1.0, 3.0, -2.0])
def test_dc_aligned_can_do_with_any_mean(factor: float) -> None:
    mean = torch.full((SIZE,), factor)
    found = initial_rotation(SIZE, "dc_aligned", seeded(0), mean)
    torch.testing.assert_close(mean.double() @ found, torch.full((SIZE,), abs(factor), dtype=torch.float64))


# --- its parts


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_each_query_head_is_turned_by_its_kv_head(heads: int, kv_heads: int) -> None:
    rows = torch.randn(5, heads * 8, generator=seeded(0))
    rotation = torch.randn(kv_heads, 8, 8, generator=seeded(1))
    found = rotate_heads(rows, rotation)
    for token in range(5):
        for head in range(heads):
            columns = slice(head * 8, (head + 1) * 8)
            expected = rows[token, columns] @ rotation[head // (heads // kv_heads)]
            torch.testing.assert_close(found[token, columns], expected, rtol=1e-5, atol=1e-5)


def test_an_error_is_relative_to_the_signal() -> None:
    rows = uneven_channels()[0]
    assert relative_error(2**10 * rows, 4) == pytest.approx(relative_error(rows, 4))
    assert relative_error(rows, 8, clip_ratio=1.0) < relative_error(rows, 4, clip_ratio=1.0) / 100
    assert relative_error(torch.zeros(3, 8), 4) == 0
    assert math.isnan(relative_error(torch.full((1, 8), math.nan), 4))


def test_decibels_count_the_tenths_of_the_powers_of_ten() -> None:
    assert [sqnr_db(error) for error in (1.0, 0.1, 0.001, 0.0)] == [0.0, 10.0, 30.0, math.inf]
