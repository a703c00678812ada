"""Fewer bits for activations, simulated while a quantised model is evaluated: W4A4 and the like.

What a quantised layer is given, and on request keys and values, is put on a grid of a few levels and back, each token
by itself. Arithmetic stays in floating point: this tells what the accuracy would be, not the speed. Nothing of it is
stored in a checkpoint, which plain transformers runs with its activations as they are.

Knows models and how to reach their layers and their attention; nothing of how weights were quantised.
"""

import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from jointq_cli.errors import ConfigError, ModelError
from jointq_cli.evaluation import final_hidden
from jointq_cli.grid import Grid
from jointq_cli.model import StreamedModel

UNQUANTIZED = 16  # bits from which on a tensor is left as it is
CLIP_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)  # what a search chooses from


@dataclass(frozen=True)
class Activations:
    """Which activations are quantised, and how: see configs/activations/a4.yaml for what each field does."""

    bits: int
    symmetric: bool
    clip_ratio: float | None
    layer_bits: dict[str, int]
    kv_bits: int
    r3: bool

    def __post_init__(self) -> None:
        _check_bits("bits", self.bits, 4)
        for key, bits in self.layer_bits.items():
            _check_bits(f"layer_bits.{key}", bits, 4)
        _check_bits("kv_bits", self.kv_bits, 2)
        if self.clip_ratio is not None and not 0 < self.clip_ratio <= 1:
            raise ConfigError(
                f"activations.clip_ratio={self.clip_ratio}: must be above 0 and at most 1, or null for a search"
            )

    @property
    def simulates(self) -> bool:
        """Whether anything at all has fewer bits."""
        return self._quantizes_inputs or self.kv_bits < UNQUANTIZED

    @property
    def _quantizes_inputs(self) -> bool:
        return min([self.bits, *self.layer_bits.values()]) < UNQUANTIZED

    def bits_of(self, layer_name: str) -> int:
        """The bits of a layer's input. The longest key of `layer_bits` that its full name ends with decides."""
        keys = [key for key in self.layer_bits if _ends_with(layer_name, key)]
        return self.layer_bits[max(keys, key=len)] if keys else self.bits

    def describe(self) -> str:
        """A few words for people, "" where nothing is simulated."""
        words = []
        if self._quantizes_inputs:
            clip = "searched" if self.clip_ratio is None else f"{self.clip_ratio:g}"
            words += [f"A{self.bits}", "symmetric" if self.symmetric else "asymmetric", "per token", f"clip={clip}"]
            words += [f"{key}=A{bits}" for key, bits in self.layer_bits.items()]
        if self.kv_bits < UNQUANTIZED:
            words += [f"KV{self.kv_bits}", *(["R3"] if self.r3 else [])]
        return " ".join(words)

    def check_layers(self, names: Iterable[str]) -> None:
        """Raises ConfigError for a key of `layer_bits` that names none of these layers, all that the blocks have."""
        names = list(names)
        for key, bits in self.layer_bits.items():
            if not any(_ends_with(name, key) for name in names):
                raise ConfigError(
                    f"activations.layer_bits.{key}={bits}: must name one of the {len(names)} linear layers of the "
                    "model's blocks, by its last parts"
                )


def quantize_tokens(x: Tensor, bits: int, symmetric: bool, clip_ratio: float) -> Tensor:
    """`x` (..., features) with each token (...) on a grid of 2^bits levels of its own; same shape and dtype.

    The grid spans `clip_ratio` of the token's range with zero inside (asymmetric, as QuaRot and DartQuant have it), or
    of its largest absolute value to either side (symmetric). From UNQUANTIZED bits on this is `x` itself.
    """
    if bits >= UNQUANTIZED:
        return x
    grid = Grid(bits, symmetric)
    values = x.float()  # a bfloat16 could not even hold the codes of 9 bits
    low, high = torch.aminmax(values, dim=-1, keepdim=True)
    low, high = clip_ratio * low.clamp(max=0), clip_ratio * high.clamp(min=0)
    scale = _symmetric_scale(low, high, grid) if symmetric else grid.covering_scale(low, high)
    zero_point = grid.zero_point(low, scale)
    codes = torch.round(values / scale).add_(zero_point).clamp_(grid.lowest, grid.highest)
    return codes.sub_(zero_point).mul_(scale).to(x.dtype)


def _symmetric_scale(low: Tensor, high: Tensor, grid: Grid) -> Tensor:
    # Unlike the grid of weights, which lets half a step be cut off: this is what activations are published with.
    scale = torch.maximum(high, -low) / grid.highest
    return torch.where(scale == 0, 1.0, scale)


@contextmanager
def simulated(
    model: StreamedModel, activations: Activations, layers: Iterable[str], clips: Mapping[str, float]
) -> Iterator[None]:
    """Inside, blocks of `model` run with quantised activations.

    layers: full names of the layers whose inputs are quantised, those that have quantised weights; lm_head is not among
    them. clips: the clip ratio of each, from `search_clips`. Raises ConfigError for an idle key of `layer_bits`, and,
    as soon as a block has run, ModelError where keys and values cannot be reached.
    """

    def quantize(name: str, x: Tensor) -> Tensor:
        return quantize_tokens(x, activations.bits_of(name), activations.symmetric, clips[name])

    with _quantized(model, activations, layers, quantize):
        yield


def search_clips(
    model: StreamedModel,
    activations: Activations,
    layers: Iterable[str],
    windows: Tensor,
    batch: int,
    pause: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The clip ratio of each layer: `clip_ratio`, or where that is null the best one for the layer's own input.

    windows: (windows, tokens) int64 of calibration, of which the first `batch` walk through the model; each layer
    chooses by the squared error of its input, which the layers before it have quantised already. A layer that no token
    comes to (an expert) has 1. `pause` is called after each block and may raise.
    """
    names = list(layers)
    chosen: dict[str, float] = {}

    def quantize(name: str, x: Tensor) -> Tensor:
        bits = activations.bits_of(name)
        if name not in chosen:
            chosen[name] = best_clip(x, bits, activations.symmetric)
        return quantize_tokens(x, bits, activations.symmetric, chosen[name])

    if activations.clip_ratio is not None:
        return dict.fromkeys(names, activations.clip_ratio)
    if any(activations.bits_of(name) < UNQUANTIZED for name in names):
        with _quantized(model, activations, names, quantize):
            final_hidden(model, windows[:batch], batch, pause=pause)
    return {name: chosen.get(name, 1.0) for name in names}


def best_clip(x: Tensor, bits: int, symmetric: bool) -> float:
    """The ratio of CLIP_RATIOS with the least squared error over all tokens of `x` (..., features)."""

    def error(ratio: float) -> float:
        difference = quantize_tokens(x, bits, symmetric, ratio).float() - x.float()
        return difference.square().sum(dtype=torch.float64).item()

    return min(CLIP_RATIOS, key=error)


@contextmanager
def _quantized(
    model: StreamedModel, activations: Activations, layers: Iterable[str], quantize: Callable[[str, Tensor], Tensor]
) -> Iterator[None]:
    """Inside, `quantize(name, input)` stands in for the input of each layer, and attention is as `activations` says."""
    linear = model.linear_layers()
    activations.check_layers(name for name in linear if model.block_of(name) is not None)
    with ExitStack() as stack:
        for name in layers:
            if activations.bits_of(name) < UNQUANTIZED:
                # Modules stay while blocks come and go: only their parameters are exchanged.
                hook = linear[name].register_forward_pre_hook(
                    lambda _, given, name=name: (quantize(name, given[0]), *given[1:])
                )
                stack.callback(hook.remove)
        if activations.kv_bits < UNQUANTIZED or activations.r3:
            stack.enter_context(_quantized_attention(model, activations))
        yield


@contextmanager
def _quantized_attention(model: StreamedModel, activations: Activations) -> Iterator[None]:
    """Inside, the attention functions that `model` names take queries, keys and values as `activations` says.

    A model looks its function up at each call, in a registry that all models share: others get what they always got.
    """
    own = set(model.module.modules())
    seen: set[nn.Module] = set()

    def around(function: Callable[..., Any]) -> Callable[..., Any]:
        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            if module in own:
                seen.add(module)
                query, key, value = _given_to_attention(activations, query, key, value)
            return function(module, query, key, value, *args, **kwargs)

        return attend

    def check(block: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        # While the model notes how its blocks are called they stand aside, with a forward of their own.
        if "forward" not in vars(block) and seen.isdisjoint(block.modules()):
            raise ModelError(
                f"activations.kv_bits={activations.kv_bits}: block {model.blocks.index(block)} of "
                f"{type(model.module).__name__} does not look its attention up in transformers' registry, so its keys "
                "and values cannot be reached; use activations.kv_bits=16 and activations.r3=false"
            )

    with ExitStack() as stack:
        for block in model.blocks:
            stack.callback(block.register_forward_hook(check).remove)
        for name in _implementations(model):
            stack.enter_context(_registered(name, around(ALL_ATTENTION_FUNCTIONS.get(name, _eager))))
        yield


def _given_to_attention(
    activations: Activations, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """query (batch, heads, tokens, head_dim), key and value with heads of their own: what attention gets instead."""
    if activations.r3:
        rotation = _r3(key.shape[-1], key.device)
        query, key = ((x.float() @ rotation).to(x.dtype) for x in (query, key))
    bits = activations.kv_bits
    key, value = (quantize_tokens(x, bits, False, kv_clip_ratio(bits)) for x in (key, value))
    return query, key, value


def kv_clip_ratio(bits: int) -> float:
    """QuaRot's 0.95 for up to 4 bits. With finer steps what is cut off costs more than what the steps gain."""
    return 0.95 if bits <= 4 else 1.0


@functools.cache
def _r3(head_dim: int, device: torch.device) -> Tensor:
    """(head_dim, head_dim) float32: orthogonal, so that the products of queries and keys stay."""
    if head_dim & (head_dim - 1):
        raise ConfigError(f"activations.r3=true: head_dim {head_dim} is not a power of two")
    matrix = torch.ones(1, 1)
    while len(matrix) < head_dim:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return (matrix / math.sqrt(head_dim)).to(device)


def _implementations(model: StreamedModel) -> set[str]:
    """The names by which the parts of `model` look their attention up."""
    configs = [getattr(part, "config", None) for part in model.module.modules()]
    names = {str(getattr(config, "_attn_implementation", None)) for config in configs}
    return {name for name in names if name == "eager" or name in ALL_ATTENTION_FUNCTIONS}


def _eager(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What a model calls where the registry has no "eager": the function of that meaning in its own source file."""
    return sys.modules[type(module).forward.__module__].eager_attention_forward(module, *args, **kwargs)


@contextmanager
def _registered(name: str, function: Callable[..., Any]) -> Iterator[None]:
    before = ALL_ATTENTION_FUNCTIONS.get(name)
    ALL_ATTENTION_FUNCTIONS[name] = function
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
        if ALL_ATTENTION_FUNCTIONS.get(name) is not before:  # it was an override too, not transformers' own
            ALL_ATTENTION_FUNCTIONS[name] = before


def _ends_with(layer_name: str, key: str) -> bool:
    return layer_name == key or layer_name.endswith(f".{key}")


def _check_bits(key: str, bits: int, least: int) -> None:
    if not least <= bits <= UNQUANTIZED:
        raise ConfigError(f"activations.{key}={bits}: must be from {least} to {UNQUANTIZED}")
