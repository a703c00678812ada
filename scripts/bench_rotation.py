"""How long R1 takes to learn, and how much memory: random activations with outlier channels, no model needed.

python scripts/bench_rotation.py                       # hidden 2048, 150 steps of 4096 tokens, as in docs/rotation.md
python scripts/bench_rotation.py --hidden 576 --steps 50
"""

import argparse
import resource
import time
from contextlib import AbstractContextManager, nullcontext

import torch
from rich.console import Console
from rich.table import Table

from jointq_cli.kernels.hadamard import random_hadamard
from jointq_cli.transforms.activation_samples import rms_normalize
from jointq_cli.transforms.learning import Progress, learn_r1, sqnr_db
from jointq_cli.transforms.settings import OBJECTIVES, PARAMETRIZATIONS, LearnedRotation

SITES, TOKENS = 32, 512  # those of a model of 16 blocks


class Quiet:
    def advance(self, n: int = 1, status: str = "") -> None:
        pass


def quiet(name: str, steps: int) -> AbstractContextManager[Quiet]:
    return nullcontext(Quiet())


def activations(hidden: int) -> torch.Tensor:
    """(sites, tokens, hidden) bfloat16 of rms 1; the scales of channels are log-normal, the same for all sites."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.randn(hidden, generator=generator).exp()
    rows = torch.randn(SITES, TOKENS, hidden, generator=generator) * scales
    return rms_normalize(rows).bfloat16()


def settings(objective: str, parametrization: str, steps: int, batch: int) -> LearnedRotation:
    per_epoch = max(1, SITES * TOKENS * 7 // 8 // batch)
    return LearnedRotation(
        r1=True, r2=False, r4=False, seed=0, init="random_hadamard", objective=objective,
        parametrization=parametrization, r1_lr=0.003 if parametrization == "lie" else 0.001,
        r1_epochs=max(1, round(steps / per_epoch)), r2_lr=0.01, r2_epochs=1, cos_lr=True, momentum=0.9,
        batch_tokens=batch, reservoir_tokens=TOKENS, early_stop=False, stop_bits=4,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--objectives", nargs="+", default=["range2"], choices=OBJECTIVES)
    parser.add_argument("--parametrizations", nargs="+", default=["lie"], choices=PARAMETRIZATIONS)
    arguments = parser.parse_args()
    residual = activations(arguments.hidden)
    start = random_hadamard(arguments.hidden, torch.Generator().manual_seed(0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    table = Table("objective", "descent", "steps", "s", "CPU s", "dB before", "after", "more MB")
    for objective in arguments.objectives:
        for parametrization in arguments.parametrizations:
            wanted = settings(objective, parametrization, arguments.steps, arguments.batch)
            wall, cpu = time.perf_counter(), time.process_time()
            with torch.no_grad():
                _, course = learn_r1(residual, start, wanted, torch.device("cpu"), Progress(quiet, lambda: None))
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            sqnr = (f"{sqnr_db(error):.2f}" for error in (course.error_before, course.error_after))
            table.add_row(
                objective, parametrization, str(course.steps), f"{wall:.0f}", f"{cpu:.0f}", *sqnr, f"{grown:.0f}"
            )
    Console().print(table)


if __name__ == "__main__":
    main()
