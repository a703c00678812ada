"""Simulated quantisation of activations while a quantised model is evaluated: W4A4 and the like.

The inputs of quantised layers, and optionally keys and values, are quantised per token and dequantised. Arithmetic
stays in floating point: this measures accuracy, not speed. Nothing of it is stored in a checkpoint, which plain
transformers runs with unquantised activations.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from jointq_cli.errors import ModelError
from jointq_cli.evaluation.activation_settings import (
    UNQUANTIZED,
    Activations,
    best_clip,
    kv_clip_ratio,
    quantize_tokens,
)
from jointq_cli.kernels.hadamard import orthogonal_hadamard
from jointq_cli.models.forward import final_hidden
from jointq_cli.models.streamed import StreamedModel


@contextmanager
def simulated(
    model: StreamedModel, activations: Activations, layers: Iterable[str], clips: Mapping[str, float]
) -> Iterator[None]:
    """Inside, blocks of `model` run with quantised activations.

    layers: full names of the layers whose inputs are quantised, those with quantised weights; lm_head is not among
    them. clips: the clip ratio of each, from `search_clips`. Raises ConfigError for an unused key of `layer_bits`, and,
    once a block has run, ModelError where keys and values cannot be reached.
    """
    last: tuple[Tensor, tuple[int, float], Tensor] | None = None

    def quantize(name: str, x: Tensor) -> Tensor:
        nonlocal last
        settings = activations.bits_of(name), clips[name]
        if last is None or last[0] is not x or last[1] != settings:  # q_proj, k_proj and v_proj have the same input
            last = x, settings, quantize_tokens(x, settings[0], activations.symmetric, settings[1])
        return last[2]

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
    """The clip ratio of each layer: `clip_ratio`, or where that is null the one with the least error on its input.

    windows: (windows, tokens) int64 of calibration, of which the first `batch` run through the model; the squared error
    is that of the layer's input after the quantisation of all inputs before it. A layer that receives no token (an
    expert) gets 1. `pause` is called after each block and may raise.
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


@contextmanager
def _quantized(
    model: StreamedModel, activations: Activations, layers: Iterable[str], quantize: Callable[[str, Tensor], Tensor]
) -> Iterator[None]:
    """Inside, `quantize(name, input)` replaces the input of each layer, and attention is quantised by `activations`."""
    linear = model.linear_layers()
    activations.check_layers(name for name in linear if model.block_of(name) is not None)
    with ExitStack() as stack:
        for name in layers:
            if activations.bits_of(name) < UNQUANTIZED:
                # Modules persist while blocks are loaded and unloaded: only their parameters are replaced.
                hook = linear[name].module.register_forward_pre_hook(
                    lambda _, args, name=name: (quantize(name, args[0]), *args[1:])
                )
                stack.callback(hook.remove)
        if activations.kv_bits < UNQUANTIZED or activations.r3:
            stack.enter_context(_quantized_attention(model, activations))
        yield


@contextmanager
def _quantized_attention(model: StreamedModel, activations: Activations) -> Iterator[None]:
    """Inside, the attention functions that `model` uses quantise queries, keys and values by `activations`.

    A model looks its function up at each call, in a registry that all models share: other models are not affected.
    """
    own = set(model.module.modules())
    seen: set[nn.Module] = set()

    def around(function: Callable[..., Any]) -> Callable[..., Any]:
        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            if module in own:
                seen.add(module)
                query, key, value = _attention_inputs(activations, query, key, value)
            return function(module, query, key, value, *args, **kwargs)

        return attend

    def check(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # While the model records how its blocks are called, they are replaced by stubs with a forward of their own.
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


def _attention_inputs(
    activations: Activations, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What attention computes with instead: query (batch, heads, tokens, head_dim), key and value (batch, KV heads,
    tokens, head_dim), rotated by R3 and quantised; same shapes and dtypes."""
    if activations.r3:
        rotation = _r3(key.shape[-1], key.device)
        query, key = ((x.float() @ rotation).to(x.dtype) for x in (query, key))
    bits = activations.kv_bits
    key, value = (quantize_tokens(x, bits, False, kv_clip_ratio(bits)) for x in (key, value))
    return query, key, value


def _r3(head_dim: int, device: torch.device) -> Tensor:
    """(head_dim, head_dim) float32: orthogonal, so that the products of queries and keys do not change."""
    return orthogonal_hadamard(head_dim).to(device, torch.float32)


def _implementations(model: StreamedModel) -> set[str]:
    """The names under which the parts of `model` look up their attention function."""
    configs = [getattr(part, "config", None) for part in model.module.modules()]
    names = {str(getattr(config, "_attn_implementation", None)) for config in configs}
    return {name for name in names if name == "eager" or name in ALL_ATTENTION_FUNCTIONS}


def _eager(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The eager attention that a model defines in its own source file, used where the registry has no "eager"."""
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
