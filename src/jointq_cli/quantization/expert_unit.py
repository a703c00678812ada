"""The experts of a block as one module, which is called with all tokens and sends each to a few of them.

Passes through a block stop where that module is called. What an expert's layers receive is then computed expert by
expert, from the tokens that a router has chosen for it or from others, without running the rest of the block again.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from inspect import signature
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from jointq_cli.errors import ModelError
from jointq_cli.models.experts import WeightedExperts
from jointq_cli.models.layer_ref import LayerRef, layer_refs
from jointq_cli.models.streamed import BlockwiseModel
from jointq_cli.quantization.resumable_forward import ModuleCall

_INDEX, _WEIGHTS = "top_k_index", "top_k_weights"  # of the router, (tokens, experts per token) each


@dataclass(frozen=True, eq=False, kw_only=True)
class ExpertUnit(ABC):
    """experts: the module whose submodules 0, 1, ... are the experts. module: what is called with all tokens. holder:
    the module that holds them, with the router. layers: those to quantise of each expert, by its number.

    Known once a call has been seen: groups, the layers of each expert in the order they run, those that share an input
    together; readers, the experts whose first layers read tokens as they enter the module.
    """

    experts: nn.Module
    module: nn.Module
    holder: nn.Module
    layers: Mapping[int, list[LayerRef]]
    groups: Mapping[int, list[list[LayerRef]]] = field(default_factory=dict)
    readers: frozenset[int] = frozenset()

    def __iter__(self) -> Iterator[LayerRef]:
        return chain.from_iterable(self.layers.values())

    def __contains__(self, layer: LayerRef) -> bool:
        return layer.name in self._names

    def expert(self, number: int) -> nn.Module:
        return self.experts.get_submodule(str(number))

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(layer.name for layer in self)

    def watched(self, call: ModuleCall) -> "ExpertUnit | None":
        """With what a call shows; None where it does not show what the experts receive, or one cannot be run alone."""
        token = self.tokens(call)[:1]
        try:
            self.rows(call)
            found = {number: self._inputs(number, token) for number in self.layers}
        except (ModelError, RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return None
        groups = {number: [layers for _, layers in inputs] for number, inputs in found.items()}
        if any(
            sorted(chain(*groups[number]), key=_name) != sorted(self.layers[number], key=_name) for number in groups
        ):
            return None  # a layer is not called, or twice
        readers = frozenset(number for number, inputs in found.items() if torch.equal(inputs[0][0], token))
        return replace(self, groups=groups, readers=readers)

    @abstractmethod
    def tokens(self, call: ModuleCall) -> Tensor:
        """What the module is called with, as (tokens, hidden)."""

    @abstractmethod
    def rows(self, call: ModuleCall) -> dict[int, Tensor]:
        """The numbers of the tokens that each expert receives in this call. Raises ModelError where that cannot be
        found out."""

    def input_of(self, layer: LayerRef, expert: int, tokens: Tensor) -> Tensor:
        """What a layer of an expert receives, (tokens, in), where the expert receives tokens (tokens, hidden)."""
        if not len(tokens):
            return tokens.new_empty(0, layer.in_features)

        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            raise _Reached(args[0])

        handle = layer.module.register_forward_pre_hook(stop)
        try:
            self.expert(expert)(tokens)
        except _Reached as reached:
            return reached.inputs
        finally:
            handle.remove()
        raise ModelError(f"{layer.name}: its expert runs without calling it; exclude it")

    def _inputs(self, expert: int, tokens: Tensor) -> list[tuple[Tensor, list[LayerRef]]]:
        """What the layers of an expert receive for tokens (tokens, hidden), and which layers, in the order they run."""
        groups: list[tuple[Tensor, list[LayerRef]]] = []

        def note(layer: LayerRef, inputs: Tensor) -> None:
            for tensor, layers in groups:
                if tensor is inputs:
                    return layers.append(layer)
            return groups.append((inputs, [layer]))

        handles = [
            layer.module.register_forward_pre_hook(lambda _, args, layer=layer: note(layer, args[0]))
            for layer in self.layers[expert]
        ]
        try:
            self.expert(expert)(tokens)
        finally:
            for handle in handles:
                handle.remove()
        return groups


def _name(layer: LayerRef) -> str:
    return layer.name


class _Reached(Exception):
    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.inputs = inputs


class RoutedUnit(ExpertUnit):
    """A module that is called with the router's choices: (hidden_states, top_k_index, top_k_weights)."""

    def tokens(self, call: ModuleCall) -> Tensor:
        hidden: Tensor = self._arguments(call)["hidden_states"]
        return hidden.reshape(-1, hidden.shape[-1])

    def rows(self, call: ModuleCall) -> dict[int, Tensor]:
        index = self._arguments(call)[_INDEX]
        return {number: (index == number).any(dim=-1).nonzero().squeeze(1) for number in self.layers}

    def choices(self, call: ModuleCall) -> dict[str, Tensor]:
        """Those of the router in this call."""
        return {name: tensor for name, tensor in self._arguments(call).items() if name in (_INDEX, _WEIGHTS)}

    def rerouted(self, call: ModuleCall, choices: dict[str, Tensor]) -> ModuleCall:
        """`call` with the router's choices of another one."""
        return ModuleCall((), self._arguments(call) | choices)

    def _arguments(self, call: ModuleCall) -> dict[str, Any]:
        return signature(self.module.forward).bind(*call.args, **call.kwargs).arguments


class WeightedUnit(ExpertUnit):
    """A module that is called with every token once per expert, times its weight: zeros where it is not routed there
    (Llama 4). Its "tokens" are these; rows of zeros add nothing to any sum."""

    def tokens(self, call: ModuleCall) -> Tensor:
        hidden: Tensor = call.args[0] if call.args else next(iter(call.kwargs.values()))
        return hidden.reshape(-1, hidden.shape[-1])

    def rows(self, call: ModuleCall) -> dict[int, Tensor]:
        tokens = self.tokens(call)
        count = len(tokens) // cast("WeightedExperts", self.experts).num_experts
        routed = tokens.any(dim=-1)
        return {n: n * count + routed[n * count : (n + 1) * count].nonzero().squeeze(1) for n in self.layers}


class ListedUnit(ExpertUnit):
    """A module that routes inside, to experts in a ModuleList of its own that it calls with rows of its input."""

    def tokens(self, call: ModuleCall) -> Tensor:
        hidden: Tensor = call.args[0] if call.args else next(iter(call.kwargs.values()))
        return hidden.reshape(-1, hidden.shape[-1])

    def rows(self, call: ModuleCall) -> dict[int, Tensor]:
        received: dict[int, Tensor] = {}
        handles = [
            self.expert(number).register_forward_pre_hook(
                lambda _, args, number=number: received.update({number: args[0]})
            )
            for number in self.layers
        ]
        try:
            self.module(*call.args, **call.kwargs)
        finally:
            for handle in handles:
                handle.remove()
        tokens = self.tokens(call)
        nothing = torch.empty(0, dtype=torch.int64, device=tokens.device)
        return {n: self._positions(tokens, received[n]) if n in received else nothing for n in self.layers}

    def _positions(self, tokens: Tensor, received: Tensor) -> Tensor:
        """Which of the tokens (tokens, hidden) an expert has received."""
        known, order = _fingerprints(tokens).sort(stable=True)
        wanted = _fingerprints(received.reshape(-1, received.shape[-1]))
        found = torch.searchsorted(known, wanted).clamp_max(len(known) - 1)
        if tokens.shape[-1] != received.shape[-1] or not torch.equal(known[found], wanted):
            raise ModelError("experts receive other vectors than the module that holds them")
        return order[found]


def _fingerprints(rows: Tensor) -> Tensor:
    """One integer (rows,) for the bits of each row: equal for equal rows, and hardly ever for others."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    factors = torch.randint(-(2**62), 2**62, rows.shape[-1:], generator=torch.Generator().manual_seed(0))
    return (rows.contiguous().view(integers).long() * factors.to(rows.device)).sum(dim=-1)


def find_units(block: nn.Module, prefix: str, layers: Collection[LayerRef]) -> Iterator[ExpertUnit]:
    """The modules of a block that may be units, those without a layer to quantise left out. prefix: of names in it."""
    for name, by_expert in _by_expert(prefix, layers).items():
        part, parent = block.get_submodule(name), name.rpartition(".")[0]
        holder = block.get_submodule(parent)
        if _INDEX in signature(part.forward).parameters:
            yield RoutedUnit(experts=part, module=part, holder=holder, layers=by_expert)
        elif isinstance(part, WeightedExperts):
            yield WeightedUnit(experts=part, module=part, holder=holder, layers=by_expert)
        elif isinstance(part, nn.ModuleList) and name.endswith("experts") and parent:
            yield ListedUnit(experts=part, module=holder, holder=holder, layers=by_expert)


@contextmanager
def watching(units: Iterable[ExpertUnit]) -> Iterator[list[ExpertUnit]]:
    """Inside, the block is to be run once. The list then has those units that can be used, with what that has shown:
    not where a module is not called once, what its experts receive cannot be seen, or one cannot be run alone."""
    calls: dict[ExpertUnit, list[ModuleCall]] = {unit: [] for unit in units}
    handles = [
        unit.module.register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append(ModuleCall(args, kwargs)), with_kwargs=True
        )
        for unit, seen in calls.items()
    ]
    found: list[ExpertUnit] = []
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    watched = [unit.watched(*seen) for unit, seen in calls.items() if len(seen) == 1]
    found += [unit for unit in watched if unit is not None]


def _by_expert(prefix: str, layers: Collection[LayerRef]) -> dict[str, dict[int, list[LayerRef]]]:
    """The layers called NAME.NUMBER.REST after the prefix, by name and number."""
    found: dict[str, dict[int, list[LayerRef]]] = {}
    for layer in layers:
        parts = layer.name.removeprefix(prefix).split(".")
        for position, part in enumerate(parts):
            if position and part.isdigit():
                found.setdefault(".".join(parts[:position]), {}).setdefault(int(part), []).append(layer)
    return found


def has_routed_units(model: BlockwiseModel, names: Collection[str]) -> bool:
    """Whether a model has experts to quantise (layers of these names) that are called with the router's choices."""
    return any(isinstance(unit, RoutedUnit) for unit in model_units(model, names))


def model_units(model: BlockwiseModel, names: Collection[str]) -> Iterator[ExpertUnit]:
    """As `find_units`, in all blocks of a model; names: of the layers to quantise."""
    for index, block in enumerate(model.blocks):
        prefix = model.prefix(index)
        found = layer_refs(block, prefix)
        yield from find_units(block, prefix, [layer for name, layer in found.items() if name in names])
