"""The training of a refinement: steps of Adam, and the state with the least loss of held-out windows.

Depends on the seed and on tensors alone. All that a step depends on is on the disk after each measurement, so that a
stopped training continues there with the same bits.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from jointq_cli.errors import NumericsError
from jointq_cli.quantization.refinement.settings import GradientRefinement
from jointq_cli.quantization.refinement.variables import Refined
from jointq_cli.records import RefinementCourse, RefinementPoint
from jointq_cli.system.files import write_atomically
from jointq_cli.system.tensor_files import save_tensors

_BEST = "best "  # begins the names of the best snapshot in the file


class Objective(ABC):
    """What is minimised: a loss of each window."""

    @abstractmethod
    def loss(self, window: int) -> float:
        """Of the weights that the modules have; mean over the tokens of this window."""

    @abstractmethod
    def backward(self, window: int, weight: float) -> float:
        """As `loss`; adds `weight` of its gradient to those of the parameters."""


def split_windows(count: int, settings: GradientRefinement) -> tuple[list[int], list[int]]:
    """Numbers of the windows to train on, and of those held out: evenly over all of them, or over the last ones where
    these are generated, since neighbours may come from one document. Raises ConfigError where there are too few."""
    seen = count - settings.generated if settings.generated else 0  # by the solvers; the rest may be held out
    size = settings.heldout(count - settings.generated)
    held_out = sorted({seen + (2 * number + 1) * (count - seen) // (2 * size) for number in range(size)})
    return [window for window in range(count) if window not in held_out], held_out


def train(
    name: str,
    refined: Refined,
    objective: Objective,
    windows: int,
    settings: GradientRefinement,
    file: Path,
    on_step: Callable[[int, float, float], None],
) -> tuple[dict[str, Tensor], RefinementCourse]:
    """The best snapshot, which the modules then have too, and how it was found.

    Where measurements are not lower, training goes back to the best state, with smaller rates.

    name: of what is trained. windows: how many there are. file: the state of this training, which it is continued from.
    on_step(step, loss, least loss of the windows held out): may raise, and nothing is lost. Takes no step where nothing
    is trained, as in a block whose layers are left alone. Raises NumericsError when the loss is no longer finite.
    """
    training, held_out = split_windows(windows, settings)
    order = _order(training, settings)

    def validate() -> float:
        return sum(map(objective.loss, held_out)) / len(held_out)

    if not refined.variables:
        return _copied(refined), RefinementCourse(name, 0, 0, [RefinementPoint(0, None, validate())])
    if file.exists():
        points, best = _read(file, refined)
    else:
        points, best = [RefinementPoint(0, None, validate())], _copied(refined)
        _write(file, points, best, refined)
    losses: list[float] = []
    for step in range(points[-1].step + 1, settings.steps + 1):
        if _is_over(points, settings):
            break
        chosen = order[(step - 1) * settings.windows_per_step : step * settings.windows_per_step]
        losses.append(sum(objective.backward(window, 1 / len(chosen)) for window in chosen) / len(chosen))
        refined.step(
            step,
            settings.backoff ** _returns(points, settings) * (1 + math.cos(math.pi * (step - 1) / settings.steps)) / 2,
        )
        if not math.isfinite(losses[-1]):
            raise NumericsError(f"refinement: {name} has diverged by step {step}; lower refinement.scale_lr and others")
        if step % settings.validate_every == 0 or step == settings.steps:
            points.append(RefinementPoint(step, sum(losses) / len(losses), validate()))
            losses = []
            if _best(points) is points[-1]:
                best = _copied(refined)
            elif _returns(points, settings) > _returns(points[:-1], settings):
                refined.begin_at(best)
            _write(file, points, best, refined)
        on_step(step, losses[-1] if losses else points[-1].loss or 0.0, _best(points).heldout_loss)
    refined.load(best)
    return best, RefinementCourse(name, points[-1].step, _best(points).step, points)


def _order(training: list[int], settings: GradientRefinement) -> list[int]:
    """The windows of all steps, one after the other: every one once before any comes again."""
    generator = torch.Generator().manual_seed(settings.seed)
    needed = settings.steps * settings.windows_per_step
    rounds = [torch.randperm(len(training), generator=generator) for _ in range(-(-needed // len(training)))]
    return [training[number] for number in torch.cat(rounds)[:needed].tolist()]


def _best(points: list[RefinementPoint]) -> RefinementPoint:
    return min(points, key=lambda point: point.heldout_loss)  # the first of equal ones


def _returns(points: list[RefinementPoint], settings: GradientRefinement) -> int:
    """How often training has gone back to the best state: after a measurement that is not lower than at the start if
    none has been lower, else after `patience` of them."""
    best, higher, returns = points[0], 0, 0
    for point in points[1:]:
        if point.heldout_loss < best.heldout_loss:
            best, higher = point, 0
            continue
        higher += 1
        if settings.backoff < 1 and (best is points[0] or higher == settings.patience):
            returns, higher = returns + 1, 0
    return returns


def _is_over(points: list[RefinementPoint], settings: GradientRefinement) -> bool:
    """Whether the last measurements were not lower than one before them, and training does not go back to that one."""
    too_high = points[-1].step - _best(points).step >= settings.patience * settings.validate_every
    return too_high and settings.backoff == 1


def _copied(refined: Refined) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in refined.snapshot().items()}


def _write(file: Path, points: list[RefinementPoint], best: dict[str, Tensor], refined: Refined) -> None:
    tensors = refined.state() | {f"{_BEST}{name}": tensor for name, tensor in best.items()}
    metadata = {"points": json.dumps([asdict(point) for point in points])}
    write_atomically(file, lambda path: save_tensors(path, tensors, metadata))


def _read(file: Path, refined: Refined) -> tuple[list[RefinementPoint], dict[str, Tensor]]:
    with safe_open(file, framework="pt") as opened:
        points = [RefinementPoint(**point) for point in json.loads(opened.metadata()["points"])]
    tensors = load_file(file)
    refined.restore(tensors)
    device = next(iter(refined.snapshot().values())).device
    best = {name.removeprefix(_BEST): one.to(device) for name, one in tensors.items() if name.startswith(_BEST)}
    return points, best
