"""The moments of what a group of layers is given, collected batch by batch from the streams that pass through a block.

Knows streams and which of them count. Knows neither what is done with the moments nor where they are kept.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor, nn

from jointq_cli.errors import NumericsError
from jointq_cli.quantization.accumulator import Accumulator
from jointq_cli.quantization.block import BlockStructure, Layer, Seen, Stream
from jointq_cli.quantization.quantizers.statistics import HeldOut, Statistics
from jointq_cli.quantization.settings import LoopSettings
from jointq_cli.system.distributed import Team


@dataclass(frozen=True)
class Collector:
    """Collects what a plan asks for, from `batches` batches that the processes of a team share between them.

    `pause` is called after each batch and may raise.
    """

    plan: LoopSettings
    batches: int
    device: torch.device
    pause: Callable[[], None]
    team: Team

    def waiting(self, groups: list[list[Layer]], hidden: Tensor) -> int:
        """How many passes of hidden states (windows, tokens, hidden) may wait between two groups."""
        widest = max((group[0].module.in_features for group in groups), default=0)
        # What lies in a pass that waits: at most the stream, what was written into it, and an attention's queries, keys
        # and values (as much as two streams), beside what the layers are given. Not the scores of an eager attention.
        bytes_per_token = (4 * hidden.shape[-1] + widest) * hidden.element_size()
        affordable = self.plan.waiting / (self.plan.batch * hidden.shape[1] * bytes_per_token)
        return int(min(affordable, 2.0**31))  # it may be infinite

    def collect(
        self, structure: BlockStructure, number: int, stream: Stream, original: Stream | None = None
    ) -> Statistics:
        """The moments of a group's input over all batches, and those of the held-out ones apart.

        stream: the one that layers are solved for. original: the other one, where QEP compares both.
        """
        group = structure.groups[number]
        writes = structure.writes(group)
        crossed = any(self.plan.qep.corrects(layer.name) for layer in group)
        drifted = crossed and writes > 0 and self.plan.qep.follows_residual
        held_from = self.plan.held_from(self.batches)
        everything = self._accumulator(group, crossed, drifted)
        held = self._accumulator(group, crossed, drifted) if held_from < self.batches else None
        wanted = original.at(number) if crossed and original is not None else repeat(None, len(stream))
        first = self.team.part(self.batches).start
        for batch, (seen, other) in enumerate(zip(stream.at(number), wanted, strict=True), first):
            if seen.given is not None:
                behind = self._behind(group[0], seen, writes)
                weights = self.plan.weights.per_token(seen.given, behind, tokens=seen.entered.shape[1])
                paired = other if other is not None and seen.whole and other.whole else None
                given = None if paired is None else paired.given
                lost = (paired.residual() - seen.residual()) / writes if drifted and paired is not None else None
                with named(group[0]):
                    everything.add(seen.given, given, weights, lost)
                    if held is not None and batch >= held_from:
                        held.add(seen.given, given, weights, lost)
            self.pause()
        for moments in filter(None, (everything, held)):
            moments.sum_over(self.team.all_reduce_sum)
        with named(group[0]):
            heldout = _held_out(everything, held)
            return Statistics(everything.hessian(), everything.cross(), everything.drift(), heldout)

    def _behind(self, layer: Layer, seen: Seen, writes: float) -> Tensor | None:
        """The residual stream behind a layer that writes into it, where the weights of tokens depend on it."""
        if not (writes and self.plan.weights.of_residual) or seen.given is None:
            return None
        output = nn.functional.linear(seen.given, layer.module.weight, layer.module.bias)
        return seen.residual() + writes * output

    def _accumulator(self, group: list[Layer], crossed: bool, drifted: bool) -> Accumulator:
        module = group[0].module
        drift = module.out_features if drifted else 0
        return Accumulator(module.in_features, self.device, cross=crossed, drift=drift)


@contextmanager
def named(layer: Layer) -> Iterator[None]:
    """Inside, a NumericsError is told with the layer's name."""
    try:
        yield
    except NumericsError as error:
        raise NumericsError(f"{layer.name}: {error}") from error


def _held_out(everything: Accumulator, held: Accumulator | None) -> HeldOut | None:
    if held is None:
        return None
    if not 0 < held.tokens < everything.tokens:
        raise NumericsError(
            "all or none of its tokens are held out; use quantizer.lambda_mode=fixed_lambda, qep.perccorr_mode=fixed"
        )
    return HeldOut(held.hessian(), held.tokens / everything.tokens, held.cross(), held.drift())
