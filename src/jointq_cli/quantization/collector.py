"""Collects the statistics of a group's input, batch by batch, from the forward passes through a block."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from jointq_cli.data.token_weights import weighted_by_energy
from jointq_cli.errors import NumericsError
from jointq_cli.models.layer_ref import LayerRef
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.accumulator import Accumulator
from jointq_cli.quantization.block import BlockForward, BlockStructure, GroupInput
from jointq_cli.quantization.gradients import Gradients
from jointq_cli.quantization.hidden_states import Stream
from jointq_cli.quantization.quantizers.statistics import ExpertTokens, HeldOut, Statistics
from jointq_cli.quantization.settings import LoopSettings
from jointq_cli.system.distributed import Team


@dataclass(frozen=True)
class Collector:
    """Collects what `settings` need. The processes of a team share the batches, and all receive the sums.

    `pause` is called after each batch and may raise.
    """

    settings: LoopSettings
    model: StreamedModel
    pause: Callable[[], None]
    team: Team
    gradients: Gradients | None = None

    def collect(self, structure: BlockStructure, number: int, forwards: Mapping[Stream, BlockForward]) -> Statistics:
        """The statistics of a group's input over all batches, and those of the held-out ones separately.

        Raises NumericsError, with the name of a layer, where they cannot be used.
        """
        settings, layers, factor = self.settings, structure.groups[number], structure.write_factor(number)
        cross = any(settings.qep.corrects(layer.name) for layer in layers)
        drift = cross and factor > 0 and settings.qep.needs_drift
        accumulators = self.accumulators(layers[0], cross=cross, drift=drift)
        inputs = forwards[settings.solved_for].inputs_of_group(number)
        originals = forwards["original"].inputs_of_group(number) if cross else repeat(None)
        first = self.team.part(settings.batches).start
        energies = self._energies(layers)
        for batch, (current, original) in enumerate(zip(inputs, originals, strict=False), first):
            if current.inputs is not None:
                weights = self._token_weights(layers[0], current, factor)
                if energies is not None:
                    part = energies[batch * settings.batch :][: len(current.entered)].to(current.entered.device)
                    weights = weighted_by_energy(weights, part, settings.curvature.tokens_by_energy)
                pair = original if original and original.has_all_tokens and current.has_all_tokens else None
                lost = (pair.residual() - current.residual()) / factor if pair and drift else None
                with naming(layers[0]):
                    for accumulator in accumulators if batch >= settings.heldout_from else accumulators[:1]:
                        accumulator.add(current.inputs, pair.inputs if pair else None, weights, lost)
            self.pause()
        for accumulator in accumulators:
            accumulator.sum_over(self.team.all_reduce_sum)
        return self.statistics(layers[0], accumulators)

    @property
    def parts(self) -> int:
        """How many sums are collected: of all tokens, and of the held-out ones where there are any."""
        return 2 if self.settings.heldout_from < self.settings.batches else 1

    def accumulators(self, layer: LayerRef, *, cross: bool = False, drift: bool = False) -> list[Accumulator]:
        """As many as there are `parts`, for a layer's input."""
        size, rows = layer.in_features, layer.out_features if drift else 0
        precision = self.settings.precision
        return [
            Accumulator(size, self.model.device, cross=cross, drift=rows, precision=precision)
            for _ in range(self.parts)
        ]

    def statistics(
        self, layer: LayerRef, accumulators: list[Accumulator], tokens: ExpertTokens | None = None
    ) -> Statistics:
        """Of complete sums, which are used up. Raises NumericsError, with the layer's name, where they cannot be
        used."""
        with naming(layer):
            heldout = _held_out(*accumulators)
            everything = accumulators[0]
            statistics = Statistics(everything.hessian(), everything.cross(), everything.drift(), heldout, tokens)
        self._require_finite(layer, statistics)
        return statistics

    def of_no_token(self, layer: LayerRef) -> Statistics:
        """Those of a layer that no token reaches."""
        return Statistics(self.accumulators(layer)[0].hessian())

    def _require_finite(self, layer: LayerRef, statistics: Statistics) -> None:
        """NaN or Inf in a feature of any token is on the diagonal of H and C, and in that feature's row of D."""
        cross, drift = statistics.cross, statistics.drift
        for sums in (
            statistics.hessian.diagonal(),
            None if cross is None else cross.diagonal(),
            None if drift is None else drift[:, 0],
        ):
            if sums is not None:
                self.model.require_finite_activations(f"the inputs of {layer.name}", sums)

    def _energies(self, layers: Sequence[LayerRef]) -> Tensor | None:
        """How much the outputs of these layers matter to the loss at each token (windows, tokens): the mean over the
        layers of |g|^2, each over its mean; None where tokens are not weighted so."""
        if self.gradients is None or not self.settings.curvature.tokens_by_energy:
            return None
        block = self.model.block_of(layers[0].name)
        assert block is not None  # only layers of blocks are quantised
        found = [self.gradients.energies(block, layer.name) for layer in layers]
        known = [energy / energy.mean() for energy in found if energy is not None and bool(energy.any())]
        return torch.stack(known).mean(dim=0) if known else None

    def _token_weights(self, layer: LayerRef, current: GroupInput, factor: float) -> Tensor | None:
        assert current.inputs is not None
        after = None  # the residual stream after a layer that writes into it
        if factor and self.settings.weights.of_residual:
            after = current.residual() + factor * layer.module.forward(current.inputs)  # without its hooks
        return self.settings.weights.per_token(current.inputs, after, tokens=current.entered.shape[1])


@contextmanager
def naming(layer: LayerRef) -> Iterator[None]:
    """Inside, the message of a NumericsError starts with the layer's name."""
    try:
        yield
    except NumericsError as error:
        raise NumericsError(f"{layer.name}: {error}") from error


def _held_out(everything: Accumulator, held: Accumulator | None = None) -> HeldOut | None:
    if held is None or everything.tokens == 0:  # weights by energy: all inputs are zero
        return None
    if not 0 < held.tokens < everything.tokens:
        raise NumericsError(
            "all or none of its tokens are held out; use quantizer.lambda_mode=fixed_lambda, qep.perccorr_mode=fixed"
        )
    return HeldOut(held.hessian(), held.tokens / everything.tokens, held.cross(), held.drift())
