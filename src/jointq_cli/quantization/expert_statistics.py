"""The statistics of the experts of a block, of as many experts at a time as fit into memory.

The experts' first layers, which read the tokens that enter the experts, come first, then those that read what these
compute. For each such stage every expert is run on its own tokens, or on all: see `ExpertSettings`. So an expert runs
once for each stage, and passes that cannot be suspended start anew once for each set of experts, not for each expert.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import repeat

import torch
from torch import Tensor

from jointq_cli.models.layer_ref import LayerRef
from jointq_cli.quantization.accumulator import Accumulator
from jointq_cli.quantization.block import Block, BlockForward
from jointq_cli.quantization.collector import Collector, naming
from jointq_cli.quantization.expert_settings import BLOCK_TOKENS_PER_COLUMN
from jointq_cli.quantization.expert_unit import ExpertUnit, RoutedUnit
from jointq_cli.quantization.hidden_states import Stream
from jointq_cli.quantization.quantizers.statistics import ExpertTokens, Statistics

Sums = list[Accumulator]  # of all tokens, and of the held-out ones where there are any
Groups = dict[int, list[LayerRef]]  # by expert: layers that share an input


@dataclass(frozen=True)
class _Batch:
    """What enters the experts. current, original: (tokens, hidden); rows: the numbers of each expert's tokens."""

    number: int
    current: Tensor
    original: Tensor | None  # where QEP needs it
    rows: dict[int, Tensor]


class ExpertStatistics:
    """Of one unit, at whose call, group `number` of the block, the passes `forwards` stop."""

    def __init__(
        self, collector: Collector, block: Block, unit: ExpertUnit, number: int, forwards: Mapping[Stream, BlockForward]
    ) -> None:
        self._collector = collector
        self._settings = collector.settings
        self._block = block
        self._unit = unit
        self._number = number
        self._forwards = forwards
        self._rows: list[dict[int, Tensor]] = []  # of each expert's tokens, batch by batch
        self._counts: dict[int, int] = {}  # of each expert's tokens
        self._entering: Sums = []  # of all tokens that enter the experts
        self._found: dict[int, Statistics] = {}  # of experts, until they are asked for

    def replay(self) -> None:
        """Makes the quantised stream send its tokens to the experts that the original model sends them to."""
        unit = self._unit
        if isinstance(unit, RoutedUnit) and "checkpoint" in self._forwards:
            originals = self._forwards["original"].calls_of_group(self._number)
            changes = [partial(unit.rerouted, choices=unit.choices(call)) for call in originals]
            self._forwards["quantized"].change_calls(self._number, changes)

    def groups(self) -> Iterator[tuple[list[LayerRef], Callable[[], Statistics]]]:
        """The layers that share an input and what collects its statistics, stage by stage: to be used in this order."""
        for stage in range(max(map(len, self._unit.groups.values()))):
            groups = {expert: found[stage] for expert, found in self._unit.groups.items() if stage < len(found)}
            if self._settings.experts.calibration == "all" and self._reads_tokens(stage, groups):
                layers = [layer for group in groups.values() for layer in group]
                yield layers, partial(self._of_all_tokens, layers)
                continue
            for expert in groups:
                yield groups[expert], partial(self._of_expert, stage, expert, groups)

    def _reads_tokens(self, stage: int, groups: Groups) -> bool:
        """Whether these layers read the tokens as they enter the experts."""
        return stage == 0 and all(expert in self._unit.readers for expert in groups)

    def _of_all_tokens(self, layers: list[LayerRef]) -> Statistics:
        sums = self._sums_entering(layers[0])
        return self._statistics(layers, sums, 1.0)

    def _of_expert(self, stage: int, expert: int, groups: Groups) -> Statistics:
        if expert not in self._found:
            experts = list(groups)
            start, matrices = experts.index(expert), self._collector.parts * (1 + self._settings.corrects)
            at_once = self._settings.experts.at_once(groups[expert][0].in_features, matrices)
            self._found = self._collect(stage, {each: groups[each] for each in experts[start : start + at_once]})
        return self._found.pop(expert)

    def _collect(self, stage: int, groups: Groups) -> dict[int, Statistics]:
        settings = self._settings.experts
        if settings.calibration == "all":
            of_all = self._sums(groups, of_all=True)
            return {expert: self._statistics(groups[expert], of_all[expert], 1.0) for expert in groups}
        sums = self._sums(groups, of_all=False)
        added = {expert: self._tokens_of_block(sums[expert], groups[expert][0]) for expert in groups}
        lacking = {expert: groups[expert] for expert in groups if added[expert]}
        others: dict[int, Sums] = {}
        if lacking and self._reads_tokens(stage, lacking):
            others = dict.fromkeys(lacking, self._sums_entering(next(iter(lacking.values()))[0]))
        elif lacking:
            others = self._sums(lacking, of_all=True)
        found = {}
        for expert, group in groups.items():
            block_share = _add_block(sums[expert], others[expert], added[expert]) if expert in others else 0.0
            found[expert] = self._statistics(group, sums[expert], block_share)
        return found

    def _tokens_of_block(self, sums: Sums, layer: LayerRef) -> int:
        everything, held = sums[0], sums[-1]
        added = self._settings.experts.tokens_of_block(everything.rows, layer.in_features)
        divided = everything is held or 0 < held.tokens < everything.tokens
        return added if divided else max(added, 1)  # held-out tokens are some of all, never none and never all

    def _statistics(self, group: list[LayerRef], sums: Sums, block_share: float) -> Statistics:
        counts = {
            layer.name: self._counts[expert] for expert in self._unit.layers for layer in self._unit.layers[expert]
        }
        tokens = ExpertTokens({layer.name: counts[layer.name] for layer in group}, block_share)
        return self._collector.statistics(group[0], sums, tokens)

    def _sums_entering(self, layer: LayerRef) -> Sums:
        if not self._entering:
            self._entering = self._collector.accumulators(layer, cross=self._settings.corrects)
            for batch in self._batches():
                self._add(self._entering, batch.number, batch.current, batch.original, of_all=True)
            self._reduce([self._entering])
        return self._entering

    def _sums(self, groups: Groups, *, of_all: bool) -> dict[int, Sums]:
        """Of what each expert's layers receive for its own tokens, or for all."""
        corrects = self._settings.qep.corrects
        cross = {expert: any(corrects(layer.name) for layer in group) for expert, group in groups.items()}
        sums = {expert: self._collector.accumulators(groups[expert][0], cross=cross[expert]) for expert in groups}
        for batch in self._batches():
            for expert, [layer, *_] in groups.items():
                if of_all and not self._is_sampled(batch.number, layer.in_features):
                    continue
                chosen = slice(None) if of_all else batch.rows[expert]
                current = self._input(self._settings.solved_for, layer, expert, batch.current[chosen])
                original = None
                if batch.original is not None and cross[expert]:
                    original = self._input("original", layer, expert, batch.original[chosen])
                with naming(layer):
                    self._add(sums[expert], batch.number, current, original, of_all=of_all)
            self._collector.pause()
        self._reduce(list(sums.values()))
        return sums

    def _is_sampled(self, batch: int, in_features: int) -> bool:
        """Whether the tokens of this batch are among those that represent the block in a blend: some batches, evenly
        spaced, both of the held-out ones and of the others."""
        settings = self._settings
        if settings.experts.calibration == "all":
            return True
        wanted = BLOCK_TOKENS_PER_COLUMN * in_features / (settings.batch * self._forwards[settings.solved_for].tokens)
        start = 0 if batch < settings.heldout_from else settings.heldout_from
        return (batch - start) % max(1, int(settings.batches // max(1.0, wanted))) == 0

    def _input(self, stream: Stream, layer: LayerRef, expert: int, tokens: Tensor) -> Tensor:
        self._block.activate(stream, self._unit.layers[expert])
        return self._unit.input_of(layer, expert, tokens)

    def _add(self, sums: Sums, batch: int, current: Tensor, original: Tensor | None, *, of_all: bool) -> None:
        window = self._forwards[self._settings.solved_for].tokens
        # Of a part of the tokens none counts as the first of its window.
        weights = self._settings.weights.per_token(current, None, tokens=window if of_all else len(current) + 1)
        for each in sums if batch >= self._settings.heldout_from else sums[:1]:
            each.add(current, original, weights)

    def _reduce(self, found: list[Sums]) -> None:
        team = self._collector.team
        for sums in found:
            for each in sums:
                each.sum_over(team.all_reduce_sum)
        if not self._counts:
            counts = [sum(len(rows[expert]) for rows in self._rows) for expert in self._unit.layers]
            summed = team.all_reduce_sum(torch.tensor(counts, dtype=torch.float64, device=self._collector.model.device))
            self._counts = dict(zip(self._unit.layers, map(round, summed.tolist()), strict=True))

    def _batches(self) -> Iterator[_Batch]:
        """Of this process."""
        settings, unit = self._settings, self._unit
        calls = self._forwards[settings.solved_for].calls_of_group(self._number)
        originals = self._forwards["original"].calls_of_group(self._number) if settings.corrects else repeat(None)
        first = self._collector.team.part(settings.batches).start
        for number, (call, original) in enumerate(zip(calls, originals, strict=False)):
            if number == len(self._rows):
                follows = original is not None and settings.experts.routing == "original"
                self._block.activate("original" if follows else settings.solved_for, unit)
                self._rows.append(unit.rows(original if follows and original else call))
            entering = None if original is None else unit.tokens(original)
            yield _Batch(first + number, unit.tokens(call), entering, self._rows[number])


def _add_block(sums: Sums, others: Sums, tokens: int) -> float:
    """Adds `tokens` of the average of the tokens in `others`; returns their share of all."""
    share = tokens / others[0].rows
    for own, other in zip(sums, others, strict=True):
        own.add_share(other, share)
    return share * others[0].tokens / sums[0].tokens if sums[0].tokens else 0.0
