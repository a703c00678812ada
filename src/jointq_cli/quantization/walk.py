"""The walk through a model that calibrates its layers: block by block, and in a block group by group.

    for block in walk(model, windows, settings, ...):
        for group in block.groups():            # layers that read the same tensor, in the order they run
            statistics = group.statistics()     # the Hessian of that tensor on the calibration tokens, and more
            group.block.replace(layer, weight)  # what later groups and blocks compute with

The hidden states of the calibration windows pass through every block with its original weights, with those that replace
them, or with both. A file keeps those that leave the last finished block, and a stopped walk continues there. The
processes of a team share the windows, and process 0 writes the file.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, count

from torch import Tensor

from jointq_cli.models.forward import final_hidden
from jointq_cli.models.layer_ref import LayerRef
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.block import Block, BlockForward, BlockStructure
from jointq_cli.quantization.collector import Collector
from jointq_cli.quantization.expert_statistics import ExpertStatistics
from jointq_cli.quantization.gradients import Gradients
from jointq_cli.quantization.hidden_states import HiddenStateFile, HiddenStates, Stream
from jointq_cli.quantization.layer_groups import Run
from jointq_cli.quantization.quantizers.statistics import Statistics
from jointq_cli.quantization.settings import LoopSettings
from jointq_cli.system.distributed import Team


def walk(
    model: StreamedModel,
    windows: Tensor,
    settings: LoopSettings,
    file: HiddenStateFile,
    complete: Mapping[Stream, bool],
    kept: int,
    pause: Callable[[], None],
    team: Team,
    known_groups: Callable[[int], Run] | None = None,
    gradients: Gradients | None = None,
) -> Iterator["BlockVisit"]:
    """The unfinished blocks. A block is finished when the caller, having used all its groups, asks for the next one.

    windows: (windows, tokens) int64. complete: for each stream, whether all of them pass through the blocks, or the
    first batch only. kept: the number of windows whose hidden states are kept after the last block. pause is called
    after each batch and may raise. known_groups: the groups of each block, where their statistics are known already.
    gradients: by which tokens are weighted too.
    Raises ResourceError where processes find different numbers of finished blocks.
    """
    finished = team.require_equal(file.directory, "finished blocks", file.finished_blocks())
    if finished == len(model):
        return
    if not any(complete.values()):
        windows = windows[: settings.batch]
    hidden = _entering(model, windows, settings.batch, complete, file, team)
    collector = Collector(settings, model, pause, team, gradients)
    for index in range(finished, len(model)):
        yield BlockVisit(model, index, hidden, collector, known_groups)
        if index + 1 == len(model):
            hidden = {weights: states[team.part(kept, settings.batch)] for weights, states in hidden.items()}
        team.on_rank0(file.write, index + 1, {weights: team.gather_rows(states) for weights, states in hidden.items()})


def _entering(
    model: StreamedModel,
    windows: Tensor,
    batch: int,
    complete: Mapping[Stream, bool],
    file: HiddenStateFile,
    team: Team,
) -> HiddenStates:
    """This process's share of the hidden states that enter the first unfinished block."""
    every, first = team.part(len(windows), batch), team.part(batch, batch)
    finished = file.finished_blocks()
    if not finished:
        hidden = model.embed_all(windows, batch, every)
        largest = max(complete, key=lambda weights: complete[weights])
        others = {weights: hidden if complete[weights] else hidden[first] for weights in complete}
        return {weights: states if weights == largest else states.clone() for weights, states in others.items()}
    model.record_calls(windows, batch)
    own = {weights: every if complete[weights] else first for weights in complete}
    restored = {weights: file.read(weights, part).to(model.device) for weights, part in own.items()}
    if complete["original"] and len(restored["original"]) < every.stop - every.start:
        # Written by a walk that read its Hessians from the cache, and so had the first batch only.
        restored["original"] = final_hidden(model, windows, batch, own=every, blocks=finished)
    return restored


@dataclass(frozen=True)
class Group:
    """Layers of a loaded block that read the same tensor."""

    block: Block
    number: int  # within the block
    layers: list[LayerRef]
    statistics: Callable[[], Statistics]  # runs the calibration windows up to here


class BlockVisit:
    """A block of the walk, and this process's share of the hidden states: at first those that enter the block, and when
    all groups have been used those that leave it."""

    def __init__(
        self,
        model: StreamedModel,
        index: int,
        hidden: HiddenStates,
        collector: Collector,
        known_groups: Callable[[int], Run] | None,
    ) -> None:
        self.index = index
        self.hidden = hidden
        self.tensors: dict[str, Tensor] = {}  # of the block by stored name, with the weights that replaced others
        self._model = model
        self._collector = collector
        self._known_groups = known_groups

    def groups(self) -> Iterator[Group]:
        """Loads the block, and in the end lets the hidden states leave it and unloads it.

        Layers that no token reaches come first: if quantised layers before them send tokens there after all, these
        pass through the weight that is stored.
        """
        settings, collector = self._collector.settings, self._collector
        self.tensors = self._model.block_tensors(self.index)
        with self._model.block(self.index, self.tensors):
            block = Block(self._model, self.index, self.tensors, settings.layers)
            structure = self._structure(block)
            suspendable = self._suspendable(block, structure.groups)
            forwards = {
                stream: BlockForward(block, stream, states, settings.batch, suspendable)
                for stream, states in self.hidden.items()
            }
            writers = structure.writers if settings.needs_residual else {}
            numbers = count()
            for layers in structure.passive:
                yield Group(block, next(numbers), layers, partial(collector.of_no_token, layers[0]))
            with structure.hooks(writers):
                for number, layers in enumerate(structure.groups):
                    if unit := structure.units.get(number):
                        experts = ExpertStatistics(collector, block, unit, number, forwards)
                        experts.replay()
                        for together, statistics in experts.groups():
                            yield Group(block, next(numbers), together, statistics)
                    else:
                        collect = partial(collector.collect, structure, number, forwards)
                        yield Group(block, next(numbers), layers, collect)
                for forward in forwards.values():
                    forward.finish(collector.pause)

    def _structure(self, block: Block) -> BlockStructure:
        """Of process 0's first batch; where that does not reach all layers (experts), of all batches until they are."""
        if self._known_groups is not None:
            return block.passive(self._known_groups(self.index))
        structure = block.structure(self._first_batch())
        if not structure.passive:
            return structure
        runs = self._collector.team.gather(block.runs_until_all_reached(self._batches()))
        first = [[layer.name for layer in layers] for layers in structure.groups]
        return block.grouped([first, *chain.from_iterable(runs)], structure.writers)

    def _batches(self) -> Iterator[Tensor]:
        """Of this process; none where it has no windows."""
        settings = self._collector.settings
        for part in self.hidden[settings.solved_for].split(settings.batch):
            if len(part):
                yield part
            self._collector.pause()

    def _first_batch(self) -> Tensor:
        """Of process 0, so that all processes find the same groups."""
        settings, team = self._collector.settings, self._collector.team
        return team.broadcast(self.hidden[settings.solved_for][: settings.batch].cpu()).to(self._model.device)

    def _suspendable(self, block: Block, groups: list[list[LayerRef]]) -> int:
        """How many forward passes with each set of weights may be suspended."""
        settings, states = self._collector.settings, self.hidden[self._collector.settings.solved_for]
        widest = max((layers[0].in_features for layers in groups), default=0)
        # At most the residual stream, what was added to it, and an attention's queries, keys and values (as much as two
        # streams), beside the layers' inputs. Not the scores of an eager attention.
        bytes_per_token = (4 * states.shape[-1] + widest) * states.element_size()
        passes = settings.suspended_bytes / (settings.batch * states.shape[1] * bytes_per_token)
        corrected = any(settings.qep.corrects(layer.name) for layer in block.layers)
        return int(min(passes, 2.0**31)) // (2 if corrected else 1)  # passes may be infinite
