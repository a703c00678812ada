"""Experts that transformers holds as fused parameters, as linear layers of their own.

In transformers the experts of a block are one module with, for instance, gate_up_proj (experts, 2 * intermediate,
hidden) and down_proj (experts, hidden, intermediate). `split_experts` replaces each by a module that computes the same
from linear layers named `experts.3.gate_proj`, `experts.3.up_proj` and `experts.3.down_proj`, which are calibrated,
quantised and reported as any others.
"""

import inspect
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from jointq_cli.models.stored_parts import FusedSlice

_TOLERANCE = 1e-3  # of float32 sums in another order, relative to the largest output


class Expert(nn.Module):
    """The layers of one expert: up_proj, down_proj and, where experts are gated, gate_proj."""

    def __init__(self, layers: dict[str, nn.Linear], activation: Callable[..., Tensor]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._activation = activation  # of the outputs of the layers before the last

    def forward(self, tokens: Tensor) -> Tensor:
        *first, down = self.children()
        output: Tensor = down(self._activation(*(layer(tokens) for layer in first)))
        return output


class Experts(nn.Module):
    """Experts 0, 1, ... as submodules, and `forward` as transformers' modules have it."""

    post_expert_norm: nn.Module  # of each expert's output, in a few families

    def __init__(self, layout: "Layout", fused: nn.Module) -> None:
        super().__init__()
        self.num_experts = layout.experts
        self.slices: dict[str, FusedSlice] = {}  # parameter here -> where `fused` has it
        activation = _activation(fused, layout)
        for number in range(layout.experts):
            self.add_module(str(number), Expert(layout.linear_layers(), activation))
            self.slices |= {f"{number}.{name}": part for name, part in layout.slices(number).items()}
        for name, module in fused.named_children():  # an activation, a norm after each expert
            self.add_module(name, module)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The sum of the experts' outputs (tokens, hidden), each times its weight.

        hidden_states: (tokens, hidden). top_k_index, top_k_weights: (tokens, experts per token); an index of
        `num_experts` or more is no expert, or one that returns its input (LongCat-Flash). An expert sees the tokens
        that are routed to it, in their order, and none else. The sum is of float32, as in transformers' faster
        implementations.
        """
        output = torch.zeros_like(hidden_states, dtype=torch.float32)
        for number in top_k_index.unique().tolist():
            if number < self.num_experts or hasattr(self, "identity_expert"):
                tokens, choice = torch.where(top_k_index == number)
                routed = self._expert(number, hidden_states[tokens])
                output.index_add_(0, tokens, (routed * top_k_weights[tokens, choice, None]).float())
        return output.to(hidden_states.dtype)

    def _expert(self, number: int, tokens: Tensor) -> Tensor:
        if number >= self.num_experts:
            return tokens
        output: Tensor = self.get_submodule(str(number))(tokens)
        return self.post_expert_norm(output) if hasattr(self, "post_expert_norm") else output


class WeightedExperts(Experts):
    """Llama 4's, which receive every token once per expert, times its weight: zeros where it is not routed there."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """hidden_states, and the result: (experts * tokens, hidden)."""
        output = torch.zeros_like(hidden_states)
        for number, (tokens, result) in enumerate(
            zip(hidden_states.chunk(self.num_experts), output.chunk(self.num_experts), strict=True)
        ):
            routed = tokens.any(dim=-1).nonzero().squeeze(1)
            if len(routed):
                result[routed] = self._expert(number, tokens[routed])
        return output


class SortedLinears(nn.Module):
    """JetMoE's: linear layers 0.proj, 1.proj, ... of the tokens that are sorted by their expert."""

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        weight = fused.get_parameter("weight")
        self.num_experts, out_features, in_features = weight.shape
        self.slices: dict[str, FusedSlice] = {}
        for number in range(self.num_experts):
            layer = nn.Linear(in_features, out_features, bias=False, device="meta", dtype=weight.dtype)
            self.add_module(str(number), nn.ModuleDict({"proj": layer}))
            self.slices[f"{number}.proj.weight"] = FusedSlice("weight", number, is_transposed=False, rows=slice(None))

    def forward(self, inputs: Tensor, expert_size: list[int]) -> Tensor:
        """inputs: (tokens, in). expert_size: the number of tokens of each expert."""
        layers = [part for part in self.modules() if isinstance(part, nn.Linear)]
        routed = zip(layers, inputs.split(expert_size), strict=True)
        return torch.cat([layer(tokens) for layer, tokens in routed if len(tokens)])


@dataclass(frozen=True)
class Layout:
    """How a fused module has its experts."""

    experts: int
    hidden: int
    intermediate: int
    is_gated: bool
    is_transposed: bool  # parameters are (experts, in, out)
    is_interleaved: bool  # rows of gate and up take turns, rather than follow each other
    has_bias: bool
    dtype: torch.dtype

    @property
    def _fused(self) -> dict[str, tuple[str, slice]]:
        """Layer of an expert, in the order they run -> parameter of all experts, rows in it."""
        down = {"down_proj": ("down_proj", slice(None))}
        if not self.is_gated:
            return {"up_proj": ("up_proj", slice(None)), **down}
        halves = slice(0, self.intermediate), slice(self.intermediate, None)
        gate, up = (slice(0, None, 2), slice(1, None, 2)) if self.is_interleaved else halves
        return {"gate_proj": ("gate_up_proj", gate), "up_proj": ("gate_up_proj", up), **down}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter of all experts -> its shape."""
        first, wide = ("gate_up_proj", 2 * self.intermediate) if self.is_gated else ("up_proj", self.intermediate)
        matrices = {first: (wide, self.hidden), "down_proj": (self.hidden, self.intermediate)}
        found: dict[str, tuple[int, ...]] = {
            name: (self.experts, *(shape[::-1] if self.is_transposed else shape)) for name, shape in matrices.items()
        }
        if self.has_bias:
            found |= {f"{name}_bias": (self.experts, shape[0]) for name, shape in matrices.items()}
        return found

    def linear_layers(self) -> dict[str, nn.Linear]:
        """Of one expert, on the meta device, in the order they run."""
        shapes = dict.fromkeys(self._fused, (self.hidden, self.intermediate))
        shapes["down_proj"] = (self.intermediate, self.hidden)
        return {
            name: nn.Linear(inside, outside, bias=self.has_bias, device="meta", dtype=self.dtype)
            for name, (inside, outside) in shapes.items()
        }

    def slices(self, expert: int) -> dict[str, FusedSlice]:
        """Parameter of an expert -> where it is."""
        found = {}
        for layer, (parameter, rows) in self._fused.items():
            found[f"{layer}.weight"] = FusedSlice(parameter, expert, self.is_transposed, rows)
            if self.has_bias:
                found[f"{layer}.bias"] = FusedSlice(f"{parameter}_bias", expert, False, rows)
        return found


def split_experts(model: nn.Module) -> tuple[dict[str, tuple[str, FusedSlice]], dict[str, str]]:
    """Replaces the fused experts of a model that is on the meta device.

    Returns the name of each new parameter with that of the fused one and the place in it, and why modules that hold
    experts too were left as they are, by name. A replacement is made only where it computes what the module computes,
    for made-up weights and tokens.
    """
    places: dict[str, tuple[str, FusedSlice]] = {}
    unsplit: dict[str, str] = {}
    tried: dict[object, str] = {}
    for name, module in list(model.named_modules()):
        experts = _split(module)
        if experts is None:
            if parameter := _unknown(module):
                unsplit[name] = f"what {type(module).__name__} computes with its {parameter} is not known here"
            continue
        if (kind := (type(module), *_shapes(module).items())) not in tried:
            tried[kind] = _difference(module)
        if tried[kind]:
            unsplit[name] = tried[kind]
            continue
        model.set_submodule(name, experts)
        places |= {f"{name}.{new}": (f"{name}.{part.parameter}", part) for new, part in experts.slices.items()}
    return places, unsplit


def _split(fused: nn.Module) -> Experts | SortedLinears | None:
    """The replacement of a module; None for one that holds no fused experts, or unknown ones."""
    inputs = list(inspect.signature(inspect.unwrap(type(fused).forward)).parameters)[1:]
    if layout := _layout(fused):
        return (WeightedExperts if len(inputs) == 1 else Experts)(layout, fused)
    is_sorted = inputs[1:] == ["expert_size"] and [len(shape) for shape in _shapes(fused).values()] == [3]
    return SortedLinears(fused) if is_sorted else None


def _unknown(module: nn.Module) -> str:
    """A parameter that seems to hold experts, "" where there is none."""
    is_named = "Expert" in type(module).__name__
    for name, shape in _shapes(module).items():
        is_fused = len(shape) == 3 and min(shape) > 1 and not isinstance(module, nn.Conv1d)
        if is_fused or (is_named and len(shape) > 1):
            return name
    return ""


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}


def _layout(module: nn.Module) -> Layout | None:
    """None for a module that holds no fused experts, or in other parameters."""
    own = dict(module.named_parameters(recurse=False))
    first, down = own.get("gate_up_proj", own.get("up_proj")), own.get("down_proj")
    if first is None or down is None or first.dim() != 3 or down.dim() != 3 or len(first) < len(down):
        return None
    is_gated = "gate_up_proj" in own
    weights = {"gate_up_proj" if is_gated else "up_proj", "down_proj"}
    biases = {f"{name}_bias" for name in weights}
    if own.keys() not in (weights, weights | biases):
        return None
    wide = 2 if is_gated else 1
    straight, turned = (first.shape[1] == wide * down.shape[2], first.shape[2] == wide * down.shape[1])
    is_transposed = getattr(module, "is_transposed", turned and not straight)
    hidden, intermediate = reversed(down.shape[1:]) if is_transposed else down.shape[1:]
    return Layout(
        experts=len(down),
        hidden=hidden,
        intermediate=intermediate,
        is_gated=is_gated,
        is_transposed=bool(is_transposed),
        is_interleaved=not getattr(module, "is_concatenated", True),
        has_bias=own.keys() != weights,
        dtype=down.dtype,
    )


def _activation(fused: Any, layout: Layout) -> Callable[..., Tensor]:
    """Of the outputs of gate_proj and up_proj, or of up_proj alone."""
    if not layout.is_gated:
        return lambda up: fused.act_fn(up)
    if not hasattr(fused, "_apply_gate"):
        return lambda gate, up: fused.act_fn(gate) * up
    if layout.is_interleaved:
        return lambda gate, up: fused._apply_gate(torch.stack([gate, up], dim=-1).flatten(-2))
    return lambda gate, up: fused._apply_gate(torch.cat([gate, up], dim=-1))


def _difference(fused: nn.Module) -> str:
    """What is different between a module's outputs and those of its experts split, "" for nothing. Of both, a few
    narrow experts with made-up weights are tried, in float32 on the CPU."""
    original: Any = deepcopy(fused)
    random = torch.Generator().manual_seed(0)
    for part in original.modules():
        shapes = _few(part) if part is original else _shapes(part)
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=random) * min(shape[-2:]) ** -0.5
            part.register_parameter(name, nn.Parameter(value, requires_grad=False))
    weights = dict(original.named_parameters(recurse=False))
    experts = _split(original)
    assert experts is not None  # as `fused`
    original.num_experts = experts.num_experts
    own = {name: nn.Parameter(each.of(weights[each.parameter]).contiguous()) for name, each in experts.slices.items()}
    experts.load_state_dict(own, strict=False, assign=True)
    try:
        with torch.no_grad():
            inputs = _made_up_inputs(experts, random)
            expected = inspect.unwrap(type(original).forward)(original, *inputs)
            error = float((experts(*inputs) - expected).abs().max() / expected.abs().max())
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as failure:
        return f"{type(fused).__name__} cannot be run alone: {' '.join(str(failure).split())[:200]}"
    if error < _TOLERANCE:
        return ""
    return f"{type(fused).__name__} computes something else than its experts one by one (relative error {error:.2g})"


def _few(fused: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a module's parameters with fewer and narrower experts."""
    if layout := _layout(fused):
        return replace(layout, experts=min(layout.experts, 2), intermediate=min(layout.intermediate, 48)).shapes
    return {name: (min(shape[0], 2), *shape[1:]) for name, shape in _shapes(fused).items()}


def _made_up_inputs(experts: Experts | SortedLinears, random: torch.Generator) -> tuple[Any, ...]:
    """Of the forward pass: six tokens, of which each expert sees some."""
    first = next(part for part in experts.modules() if isinstance(part, nn.Linear))
    tokens = torch.randn(6, first.in_features, generator=random)
    if isinstance(experts, SortedLinears):
        return tokens, [2, 4] if experts.num_experts > 1 else [6]
    if isinstance(experts, WeightedExperts):
        return (tokens * torch.tensor([1, 0, 1, 1, 1, 0])[:, None],)
    index = torch.tensor([[0, 1], [1, 1], [1, 0], [1, 1], [1, 1], [0, 0]]).clamp(max=experts.num_experts - 1)
    return tokens, index, torch.rand(6, 2, generator=random)
