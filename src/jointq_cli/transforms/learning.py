"""Learns R1 and R2 by gradient descent over mini-batches of sampled activations.

An objective may go on falling after the quantisation error has stopped falling, or without lowering it at all. So the
error of held-out tokens on a grid of few bits decides which rotation is kept. Depends on tensors and settings only.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from jointq_cli.errors import NumericsError
from jointq_cli.evaluation.activation_settings import quantize_tokens
from jointq_cli.kernels.hadamard import orthogonal_hadamard, random_hadamard
from jointq_cli.records import RotationTraining, ValidationPoint
from jointq_cli.report.console.progress import Phase
from jointq_cli.transforms.activation_samples import rms_normalize
from jointq_cli.transforms.objectives import OBJECTIVES
from jointq_cli.transforms.optimizers import OPTIMIZERS, orthogonalize
from jointq_cli.transforms.settings import LearnedRotation

VALIDATION_STRIDE = 8  # every eighth sampled token is held out
VALIDATE_EVERY = 10  # steps
PATIENCE = 5  # validations without a lower error
CLIP_RATIO = 0.9  # of the grid that the error is measured on


@dataclass(frozen=True)
class Progress:
    """How learning reports its progress and is stopped."""

    bar: Callable[[str, int], AbstractContextManager[Phase]]  # opens a bar, from its description and total steps
    pause: Callable[[], None]  # called where stopping is safe; may raise


def initial_rotation(size: int, init: str, generator: torch.Generator, mean: Tensor | None = None) -> Tensor:
    """(size, size) float64. mean: (size,), of the rows that will be rotated; for dc_aligned."""
    if init == "identity":
        return torch.eye(size, dtype=torch.float64)
    if init == "hadamard":
        return orthogonal_hadamard(size)
    if init == "random_hadamard":
        return random_hadamard(size, generator)
    if init == "orthogonal":
        q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
        haar: Tensor = q * r.diagonal().sign()  # uniform over the orthogonal matrices (Mezzadri, math-ph/0609050)
        return haar
    assert mean is not None  # the caller measures it for dc_aligned
    return _dc_aligned(mean.double())


def learn_r1(
    residual: Tensor, start: Tensor, settings: LearnedRotation, device: torch.device, progress: Progress
) -> tuple[Tensor, RotationTraining]:
    """R1 (hidden, hidden) float64 on the CPU, and how it was learned.

    residual: rows of RMS 1 (sites, tokens, hidden); start: (hidden, hidden). Raises NumericsError when the error is no
    longer finite.
    """
    train, held_out = _split(residual)
    trainer = _Trainer(train, held_out, torch.matmul, settings, device)
    with progress.bar("learn R1", trainer.steps(settings.r1_epochs)) as bar:

        def on_step(loss: float, error: float) -> None:
            bar.advance(status=f"loss {loss:.4g}, SQNR {sqnr_db(error):.1f} dB")
            progress.pause()

        return trainer.train_rotation("R1", start, settings.r1_lr, settings.r1_epochs, on_step)


def learn_r2(
    name: str,
    inputs: Tensor,
    start: Tensor,
    settings: LearnedRotation,
    device: torch.device,
    pause: Callable[[], None],
) -> tuple[Tensor, RotationTraining]:
    """R2 of one block, (num_kv_heads, head_dim, head_dim) float64 on the CPU, and how it was learned.

    inputs: of o_proj, (tokens, num_heads x head_dim); start: as the result. A token has one scale for all its heads, so
    it is normalised to RMS 1 over all of them. Raises NumericsError when the error is no longer finite.
    """
    train, held_out = _split(rms_normalize(inputs.float())[None])
    trainer = _Trainer(train, held_out, rotate_heads, settings, device)
    return trainer.train_rotation(name, start, settings.r2_lr, settings.r2_epochs, lambda loss, error: pause())


def sqnr_db(error: float) -> float:
    """The signal-to-quantisation-noise ratio in dB, from |x - q(x)|^2 / |x|^2."""
    return -10.0 * math.log10(error) if error > 0 else math.inf


def rotate_heads(rows: Tensor, rotation: Tensor) -> Tensor:
    """rows (tokens, num_heads x head_dim), each query head times its KV head's (num_kv_heads, head_dim, head_dim)."""
    kv_heads, head_dim, _ = rotation.shape
    # One large product per KV head: one small product per token takes ten times as long.
    by_head = rows.reshape(len(rows), kv_heads, -1, head_dim).transpose(0, 1)
    return (by_head.flatten(1, 2) @ rotation).reshape(by_head.shape).transpose(0, 1).reshape(rows.shape)


def relative_error(rows: Tensor, bits: int, clip_ratio: float = CLIP_RATIO) -> float:
    """|x - q(x)|^2 / |x|^2 over rows (tokens, channels), each token on an asymmetric grid of its own."""
    rows = rows.float()
    noise = (quantize_tokens(rows, bits, symmetric=False, clip_ratio=clip_ratio) - rows).square()
    signal = rows.square().sum(dtype=torch.float64)
    return 0.0 if signal == 0 else float(noise.sum(dtype=torch.float64) / signal)


@dataclass(frozen=True)
class _Trainer:
    """train, held_out: (sites, tokens, channels); rotate(rows, rotation): rows in the new basis."""

    train: Tensor
    held_out: Tensor
    rotate: Callable[[Tensor, Tensor], Tensor]
    settings: LearnedRotation
    device: torch.device

    def train_rotation(
        self, name: str, start: Tensor, lr: float, epochs: int, on_step: Callable[[float, float], None]
    ) -> tuple[Tensor, RotationTraining]:
        """The rotation, float64 on the CPU, and its record under `name`.

        on_step(loss, error): the loss of the last validation, and the least error so far.
        """
        settings = self.settings
        optimizer = OPTIMIZERS[settings.parametrization](start.to(self.device), settings.momentum)
        before = loss, least = self._validate(optimizer.rotation)
        best, best_step, step = optimizer.rotation.clone(), 0, 0
        errors = [ValidationPoint(0, least)]
        steps = self.steps(epochs)
        for step, rows in enumerate(self._batches(epochs), 1):
            decay = (1 + math.cos(math.pi * (step - 1) / steps)) / 2 if settings.cos_lr else 1.0
            optimizer.step(self._gradient(rows, optimizer.rotation), decay * lr)
            if step % VALIDATE_EVERY == 0 or step == steps:
                loss, error = self._validate(optimizer.rotation)
                if not math.isfinite(error):
                    key = f"rotation.{name.split()[0].lower()}_lr"
                    raise NumericsError(f"{key}={lr:g}: {name} has diverged by step {step}; lower it")
                errors.append(ValidationPoint(step, error))
                if error < least or not settings.early_stop:
                    best, least, best_step = optimizer.rotation.clone(), error, step
            on_step(loss, least)
            if settings.early_stop and step - best_step >= PATIENCE * VALIDATE_EVERY:
                break
        rotation = orthogonalize(best)
        after = self._validate(rotation.float())
        origin = start.to(rotation)
        moved = float((rotation - origin).norm() / origin.norm())
        return rotation.cpu(), RotationTraining(
            name, step, best_step, before[0], after[0], before[1], after[1], moved, errors
        )

    def _gradient(self, rows: Tensor, rotation: Tensor) -> Tensor:
        """(..., n, n) float32: of the objective with respect to the rotation."""
        with torch.enable_grad():
            variable = rotation.detach().requires_grad_()
            loss = OBJECTIVES[self.settings.objective](self.rotate(rows, variable))
            gradient: Tensor = torch.autograd.grad(loss, variable)[0]
            return gradient

    def _validate(self, rotation: Tensor) -> tuple[float, float]:
        """Loss and quantisation error of the held-out tokens, means over sites."""
        losses, errors = [], []
        for site in self.held_out:
            rows = self.rotate(site.to(self.device, torch.float32), rotation)
            losses.append(float(OBJECTIVES[self.settings.objective](rows)))
            errors.append(relative_error(rows, self.settings.stop_bits))
        return sum(losses) / len(losses), sum(errors) / len(errors)

    def steps(self, epochs: int) -> int:
        return epochs * self._steps_per_epoch()

    def _steps_per_epoch(self) -> int:
        return max(1, self.train.shape[0] * self.train.shape[1] // self.settings.batch_tokens)

    def _batches(self, epochs: int) -> Iterator[Tensor]:
        """Every batch has tokens of every site, as far as a batch has that many tokens."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        sites, tokens, _ = self.train.shape
        for _ in range(epochs):
            order = torch.rand(sites, tokens, generator=generator).argsort(dim=1)
            # Column by column: the first token of every site, then the second.
            picked = (order + tokens * torch.arange(sites)[:, None]).T.flatten()
            flat = self.train.flatten(0, 1)
            for chosen in picked.tensor_split(self._steps_per_epoch()):
                yield flat[chosen].to(self.device, torch.float32)


def _split(samples: Tensor) -> tuple[Tensor, Tensor]:
    """(sites, tokens, channels) -> those to learn from, those held out."""
    held_out = torch.arange(samples.shape[1]) % VALIDATION_STRIDE == VALIDATION_STRIDE - 1
    return samples[:, ~held_out], samples[:, held_out]


def _dc_aligned(mean: Tensor) -> Tensor:
    """The Householder reflection that maps the direction of `mean` (n,) to (1, ..., 1) / sqrt(n).

    What all tokens have in common becomes an offset, which the zero-point of an asymmetric grid represents at no cost.
    """
    size = len(mean)
    identity = torch.eye(size, dtype=torch.float64)
    length = mean.norm()
    if length == 0:
        return identity
    normal = mean / length - torch.full_like(mean, size**-0.5)
    if normal.norm() < 1e-12:
        return identity
    normal = normal / normal.norm()
    reflection: Tensor = identity - 2.0 * normal[:, None] * normal[None]
    return reflection
