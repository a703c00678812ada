"""Descents stay on the orthogonal matrices, lower the objective, and agree with autograd."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from jointq_cli.transforms.optimizers import OPTIMIZERS, QrOrth, RotationOptimizer, newton_schulz, orthogonalize
from jointq_cli.transforms.settings import PARAMETRIZATIONS

SIZE = 24
BOTH = pytest.mark.parametrize("name", OPTIMIZERS)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def random_orthogonal(*shape: int, seed: int = 0) -> Tensor:
    q: Tensor = torch.linalg.qr(random_matrix(*shape, seed=seed))[0]
    return q


def gram_error(rotation: Tensor) -> float:
    return float((rotation.mT @ rotation - torch.eye(rotation.shape[-1], dtype=rotation.dtype)).abs().max())


def test_settings_offer_the_descents_there_are() -> None:
    assert sorted(OPTIMIZERS) == sorted(PARAMETRIZATIONS)


@BOTH
@pytest.mark.parametrize("lr", [1e-3, 3e-2])
def test_a_hundred_steps_against_any_gradients_stay_orthogonal(name: str, lr: float) -> None:
    descent = OPTIMIZERS[name](random_orthogonal(64, 64), 0.9)
    for step in range(100):
        descent.step(random_matrix(64, 64, seed=step).float(), lr)
        assert gram_error(descent.rotation) < 1e-5
    assert descent.rotation.dtype == torch.float32
    assert gram_error(orthogonalize(descent.rotation)) < 1e-13


@BOTH
@pytest.mark.parametrize("lr", [0.1, 1.0, 100.0])
def test_no_step_is_so_long_that_it_leaves_them(name: str, lr: float) -> None:
    """A gradient of one pair of vectors: Adam makes a step of spectral norm lr n / 2 of it, lr being small or not."""
    descent = OPTIMIZERS[name](random_orthogonal(64, 64), 0.9)
    for step in range(5):
        descent.step((random_matrix(64, 1, seed=step) @ random_matrix(1, 64, seed=step + 9)).float(), lr)
        assert gram_error(descent.rotation) < 1e-5


def test_polishing_goes_to_the_nearest_orthogonal_matrix() -> None:
    rough = random_orthogonal(3, SIZE, SIZE) + 1e-3 * random_matrix(3, SIZE, SIZE, seed=1)
    left, _, right = torch.linalg.svd(rough)
    torch.testing.assert_close(orthogonalize(rough), left @ right, rtol=0, atol=1e-12)


def test_one_newton_schulz_step_squares_the_error() -> None:
    rough = random_orthogonal(SIZE, SIZE) * 1.001
    assert gram_error(newton_schulz(rough)) < gram_error(rough) ** 2


# --- downwards


def falling(descent: RotationOptimizer, target: Tensor, steps: int, lr: float) -> list[float]:
    """Minus trace(R^T M) after each step, with a pace that shrinks: what is left is no oscillation."""
    losses = [-float((descent.rotation * target).sum())]
    for step in range(steps):
        descent.step(-target.float(), lr * (1 - step / steps))
        losses.append(-float((descent.rotation * target).sum()))
    return losses


def polar_problem(size: int) -> tuple[Tensor, Tensor]:
    """M (size, size) and its polar factor: where trace(R^T M) is largest over the orthogonal R (von Neumann)."""
    left, right = random_orthogonal(size, size), random_orthogonal(size, size, seed=1)
    return left @ torch.diag(torch.linspace(0.5, 2.0, size, dtype=torch.float64)) @ right, left @ right


def near(rotation: Tensor, angle: float) -> Tensor:
    """Each plane (i, j) turned by some `angle`."""
    noise = angle * random_matrix(*rotation.shape, seed=7)
    turned: Tensor = rotation @ torch.linalg.matrix_exp(noise - noise.T)
    return turned


@BOTH
def test_both_find_the_polar_factor_where_trace_is_largest(name: str) -> None:
    target, best = polar_problem(8)
    start = near(best, 0.15)
    assert (start - best).norm() / best.norm() > 0.4
    descent = OPTIMIZERS[name](start, 0.9)
    losses = falling(descent, target, steps=300, lr=0.02)
    assert losses[-1] < losses[0]
    torch.testing.assert_close(orthogonalize(descent.rotation), best, rtol=0, atol=2e-3)


@pytest.mark.parametrize("seed", range(5))
def test_lie_finds_it_from_anywhere_with_that_sign_of_the_determinant(seed: int) -> None:
    """There is no other maximum in the component. qr_orth does not: where columns of Z become alike, its U is nearly
    singular, its gradient large, and its next step leads anywhere."""
    target, best = polar_problem(8)
    start = random_orthogonal(8, 8, seed=seed)
    start[:, 0] *= torch.linalg.det(start).sign() * torch.linalg.det(best).sign()
    descent = OPTIMIZERS["lie"](start, 0.9)
    falling(descent, target, steps=400, lr=0.05)
    torch.testing.assert_close(orthogonalize(descent.rotation), best, rtol=0, atol=1e-4)


@BOTH
def test_a_small_step_lowers_any_smooth_loss(name: str) -> None:
    for seed in range(10):
        start, target = random_orthogonal(SIZE, SIZE, seed=seed), random_matrix(SIZE, SIZE, seed=seed + 50)
        before, after = falling(OPTIMIZERS[name](start, 0.0), target, steps=1, lr=1e-4)
        assert after < before


def test_lie_keeps_the_sign_of_the_determinant() -> None:
    """The orthogonal matrices are two pieces, and no way leads from one to the other."""
    start = random_orthogonal(SIZE, SIZE)
    descent = OPTIMIZERS["lie"](start, 0.9)
    falling(descent, random_matrix(SIZE, SIZE, seed=3), steps=50, lr=0.01)
    assert torch.linalg.det(descent.rotation.double()) * torch.linalg.det(start) > 0


@BOTH
def test_a_flat_loss_moves_nothing(name: str) -> None:
    descent = OPTIMIZERS[name](torch.eye(SIZE), 0.9)
    for _ in range(3):
        descent.step(torch.zeros(SIZE, SIZE), 0.1)
    assert torch.equal(descent.rotation, torch.eye(SIZE))


@BOTH
def test_the_matrix_that_was_given_stays_as_it_is(name: str) -> None:
    start = random_orthogonal(SIZE, SIZE).float()
    before = start.clone()
    OPTIMIZERS[name](start, 0.9).step(random_matrix(SIZE, SIZE).float(), 0.1)
    assert torch.equal(start, before)


@BOTH
def test_a_batch_goes_the_ways_of_its_members(name: str) -> None:
    starts, target = random_orthogonal(2, 3, 8, 8), random_matrix(2, 3, 8, 8, seed=1)
    together = OPTIMIZERS[name](starts, 0.9)
    falling(together, target, steps=20, lr=0.01)
    for one in range(2):
        for other in range(3):
            alone = OPTIMIZERS[name](starts[one, other], 0.9)
            falling(alone, target[one, other], steps=20, lr=0.01)
            torch.testing.assert_close(together.rotation[one, other], alone.rotation, rtol=0, atol=1e-5)


# --- against autograd


def by_autograd(start: Tensor, gradients: list[Tensor], lr: float, momentum: float) -> Tensor:
    """SGD with momentum on Z, R being Q of Z with diag U > 0, in float64 and by autograd through LAPACK's QR."""
    z, velocity = start.clone(), torch.zeros_like(start)

    def rotation(z: Tensor) -> Tensor:
        q, u = torch.linalg.qr(z)
        positive: Tensor = q * u.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
        return positive

    for gradient in gradients:
        variable = z.detach().requires_grad_()
        (pulled,) = torch.autograd.grad((rotation(variable) * gradient).sum(), variable)
        velocity = momentum * velocity + pulled
        z = z - lr * velocity
    return rotation(z)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_qr_orth_goes_where_autograd_through_qr_goes(momentum: float) -> None:
    start = random_orthogonal(3, SIZE, SIZE)
    gradients = [random_matrix(3, SIZE, SIZE, seed=step) for step in range(12)]
    descent = QrOrth(start, momentum)
    for gradient in gradients:
        descent.step(gradient.float(), 0.01)
    expected = by_autograd(start, gradients, 0.01, momentum)
    assert (expected - start).norm() > 0.5  # so far that U is no identity any more
    torch.testing.assert_close(descent.rotation.double(), expected, rtol=0, atol=1e-4)


def test_adam_turns_each_plane_by_the_learning_rate_at_first() -> None:
    """Whatever the gradient's size: the first step of Adam is its sign. A plane (i, j) turns by lr to first order."""
    lr = 1e-4
    for scale in (1e-6, 1.0, 1e6):
        descent = OPTIMIZERS["lie"](torch.eye(SIZE), 0.9)
        gradient = scale * random_matrix(SIZE, SIZE).float()
        descent.step(gradient, lr)
        expected = torch.eye(SIZE) - lr * (gradient - gradient.T).sign()
        torch.testing.assert_close(descent.rotation, expected, rtol=0, atol=1e-6)


# --- signs of a library


def flipping(qr: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A QR with other signs at every call: as right as LAPACK's."""
    calls = iter(range(1000))

    def flipped(z: Tensor) -> tuple[Tensor, Tensor]:
        q, u = qr(z)
        signs = torch.randint(2, u.shape[:-1], generator=seeded(next(calls))).to(u) * 2 - 1
        return q * signs[..., None, :], u * signs[..., None]

    return flipped


def test_qr_orth_does_not_depend_on_the_signs_that_lapack_picks(monkeypatch: pytest.MonkeyPatch) -> None:
    start = random_orthogonal(2, SIZE, SIZE)

    def walked() -> Tensor:
        descent = QrOrth(start, 0.9)
        falling(descent, random_matrix(2, SIZE, SIZE, seed=1), steps=20, lr=0.01)
        return descent.rotation

    expected = walked()
    monkeypatch.setattr(torch.linalg, "qr", flipping(torch.linalg.qr))
    torch.testing.assert_close(walked(), expected, rtol=0, atol=0)


def test_qr_orth_starts_where_it_is_told_to() -> None:
    """Not at LAPACK's Q of it, which mirrors columns."""
    start = random_orthogonal(SIZE, SIZE)
    torch.testing.assert_close(QrOrth(start, 0.9).rotation.double(), start, rtol=0, atol=1e-6)
