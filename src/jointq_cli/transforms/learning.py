"""How R1 and R2 are learned: mini-batches of the kept activations, an objective, a descent, and a watch on the error
that matters.

The loss falls long after the quantisation error has stopped, or may never lower it: so the error of held-out tokens
on a 4-bit grid is what decides which rotation is kept. Knows tensors only.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from jointq_cli.errors import NumericsError
from jointq_cli.evaluation.activation_settings import quantize_tokens
from jointq_cli.kernels.hadamard import orthogonal, random_hadamard
from jointq_cli.records import RotationTraining, ValidationPoint
from jointq_cli.transforms.activation_samples import normalised
from jointq_cli.transforms.objectives import OBJECTIVES
from jointq_cli.transforms.optimizers import DESCENTS, polished
from jointq_cli.transforms.settings import LearnedRotation

HELD_OUT = 8  # every eighth kept token is only measured with
CHECK_EVERY = 10  # steps
PATIENCE = 5  # checks without a lower error
CLIP = 0.9  # of the grid that the error is measured on


class ProgressBar(Protocol):
    """Shows how far something is, and what is known by then."""

    def advance(self, n: int = 1, status: str = "") -> None: ...


@dataclass(frozen=True)
class Watch:
    """How learning tells of itself. bar(name, steps) opens a bar; pause is called where stopping is safe, and may
    raise."""

    bar: Callable[[str, int], AbstractContextManager[ProgressBar]]
    pause: Callable[[], None]


def initial(size: int, init: str, generator: torch.Generator, mean: Tensor | None = None) -> Tensor:
    """(size, size) float64. mean: (size,), of the rows that will be rotated; for dc_aligned."""
    if init == "identity":
        return torch.eye(size, dtype=torch.float64)
    if init == "hadamard":
        return orthogonal(size)
    if init == "random_hadamard":
        return random_hadamard(size, generator)
    if init == "orthogonal":
        q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
        haar: Tensor = q * r.diagonal().sign()
        return haar
    assert mean is not None  # the caller measures it for dc_aligned
    return _dc_aligned(mean.double())


def learn_r1(
    residual: Tensor, start: Tensor, settings: LearnedRotation, device: torch.device, watch: Watch
) -> tuple[Tensor, RotationTraining]:
    """R1 (hidden, hidden) float64 from rows of rms 1, (sites, tokens, hidden), and how it went."""
    train, held = _split(residual)
    problem = _Problem(train, held, lambda rows, rotation: rows @ rotation, settings, device)
    with watch.bar("learn R1", problem.steps(settings.r1_epochs)) as bar:

        def on_step(loss: float, error: float) -> None:
            bar.advance(status=f"loss {loss:.4g}, SQNR {decibels(error):.1f} dB")
            watch.pause()

        return problem.solve("R1", start, settings.r1_lr, settings.r1_epochs, on_step)


def learn_r2(
    name: str,
    inputs: Tensor,
    start: Tensor,
    settings: LearnedRotation,
    device: torch.device,
    pause: Callable[[], None],
) -> tuple[Tensor, RotationTraining]:
    """R2 of one block, (kv_heads, head_dim, head_dim) float64, from what o_proj is given: (tokens, heads x head_dim).

    A token's scale on the grid is that of all its heads, so a token is brought to rms 1 as a whole.
    """
    train, held = _split(normalised(inputs.float())[None])
    problem = _Problem(train, held, turn_heads, settings, device)
    return problem.solve(name, start, settings.r2_lr, settings.r2_epochs, lambda loss, error: pause())


def decibels(error: float) -> float:
    """The SQNR of a relative squared error."""
    return -10.0 * math.log10(error) if error > 0 else math.inf


def turn_heads(rows: Tensor, rotation: Tensor) -> Tensor:
    """rows (tokens, heads x head_dim) with every query head turned by its KV head's (kv_heads, head_dim, head_dim)."""
    kv_heads, head_dim, _ = rotation.shape
    # One large product per KV head: as many small ones as there are tokens take ten times as long.
    apart = rows.reshape(len(rows), kv_heads, -1, head_dim).transpose(0, 1)
    return (apart.flatten(1, 2) @ rotation).reshape(apart.shape).transpose(0, 1).reshape(rows.shape)


def relative_error(rows: Tensor, bits: int, clip: float = CLIP) -> float:
    """|x - q(x)|^2 / |x|^2 over rows (tokens, channels) on an asymmetric grid per token."""
    rows = rows.float()
    error = (quantize_tokens(rows, bits, symmetric=False, clip_ratio=clip) - rows).square().sum(dtype=torch.float64)
    signal = rows.square().sum(dtype=torch.float64)
    return 0.0 if signal == 0 else float(error / signal)


@dataclass(frozen=True)
class _Problem:
    """train, held: (sites, tokens, channels); turn(rows, rotation): rows in the new basis."""

    train: Tensor
    held: Tensor
    turn: Callable[[Tensor, Tensor], Tensor]
    settings: LearnedRotation
    device: torch.device

    def solve(
        self, name: str, start: Tensor, lr: float, epochs: int, on_step: Callable[[float, float], None]
    ) -> tuple[Tensor, RotationTraining]:
        """The rotation, float64 on the CPU, and its record under `name`. on_step(loss, least error): last measured."""
        settings = self.settings
        descent = DESCENTS[settings.parametrization](start.to(self.device), settings.momentum)
        before = loss, least = self._measure(descent.rotation)
        best, best_step, step = descent.rotation.clone(), 0, 0
        errors = [ValidationPoint(0, least)]
        steps = self.steps(epochs)
        for step, rows in enumerate(self._batches(epochs), 1):
            pace = (1 + math.cos(math.pi * (step - 1) / steps)) / 2 if settings.cos_lr else 1.0
            descent.step(self._gradient(rows, descent.rotation), pace * lr)
            if step % CHECK_EVERY == 0 or step == steps:
                loss, error = self._measure(descent.rotation)
                if not math.isfinite(error):
                    key = f"rotation.{name.split()[0].lower()}_lr"
                    raise NumericsError(f"{key}={lr:g}: {name} has run away by step {step}; lower it")
                errors.append(ValidationPoint(step, error))
                if error < least or not settings.early_stop:
                    best, least, best_step = descent.rotation.clone(), error, step
            on_step(loss, least)
            if settings.early_stop and step - best_step >= PATIENCE * CHECK_EVERY:
                break
        rotation = polished(best)
        after = self._measure(rotation.float())
        origin = start.to(rotation)
        moved = float((rotation - origin).norm() / origin.norm())
        return rotation.cpu(), RotationTraining(
            name, step, best_step, before[0], after[0], before[1], after[1], moved, errors
        )

    def _gradient(self, rows: Tensor, rotation: Tensor) -> Tensor:
        """(…, n, n) float32: of the objective with respect to the rotation."""
        with torch.enable_grad():
            variable = rotation.detach().requires_grad_()
            loss = OBJECTIVES[self.settings.objective](self.turn(rows, variable))
            gradient: Tensor = torch.autograd.grad(loss, variable)[0]
            return gradient

    def _measure(self, rotation: Tensor) -> tuple[float, float]:
        """Loss, and error on the grid as a mean over sites, of the held-out tokens."""
        losses, errors = [], []
        for site in self.held:
            rows = self.turn(site.to(self.device, torch.float32), rotation)
            losses.append(float(OBJECTIVES[self.settings.objective](rows)))
            errors.append(relative_error(rows, self.settings.stop_bits))
        return sum(losses) / len(losses), sum(errors) / len(errors)

    def steps(self, epochs: int) -> int:
        return epochs * self._steps_per_epoch()

    def _steps_per_epoch(self) -> int:
        return max(1, self.train.shape[0] * self.train.shape[1] // self.settings.batch_tokens)

    def _batches(self, epochs: int) -> Iterator[Tensor]:
        """Every step draws from every site, as far as there are that many tokens in a step."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        sites, tokens, _ = self.train.shape
        for _ in range(epochs):
            order = torch.rand(sites, tokens, generator=generator).argsort(dim=1)
            # Column after column: the first token of every site, then the second.
            picked = (order + tokens * torch.arange(sites)[:, None]).T.flatten()
            flat = self.train.flatten(0, 1)
            for chosen in picked.tensor_split(self._steps_per_epoch()):
                yield flat[chosen].to(self.device, torch.float32)


def _split(samples: Tensor) -> tuple[Tensor, Tensor]:
    """(sites, tokens, channels) -> those to learn from, those to measure with."""
    held = torch.arange(samples.shape[1]) % HELD_OUT == HELD_OUT - 1
    return samples[:, ~held], samples[:, held]


def _dc_aligned(mean: Tensor) -> Tensor:
    """The Householder reflection that sends the direction of `mean` (n,) to (1, ..., 1) / sqrt(n): what all tokens have
    in common becomes an offset, which an asymmetric grid takes for nothing."""
    size = len(mean)
    goal = torch.full_like(mean, size**-0.5)
    length = mean.norm()
    if length == 0:
        return torch.eye(size, dtype=torch.float64)
    normal = mean / length - goal
    if normal.norm() < 1e-12:
        return torch.eye(size, dtype=torch.float64)
    normal = normal / normal.norm()
    reflection: Tensor = torch.eye(size, dtype=torch.float64) - 2.0 * normal[:, None] * normal[None]
    return reflection
