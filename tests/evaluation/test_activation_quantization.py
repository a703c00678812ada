"""Quantised activations: the grid keeps its laws, hooks touch what they name and go away, attention stays exact."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import write_checkpoint
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from jointq_cli.cli import config_files
from jointq_cli.errors import ConfigError, ModelError
from jointq_cli.evaluation.activation_quantization import search_clips, simulated
from jointq_cli.evaluation.activation_settings import (
    CLIP_RATIOS,
    Activations,
    best_clip,
    kv_clip_ratio,
    quantize_tokens,
)
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.forward import final_hidden
from jointq_cli.models.streamed import StreamedModel

CPU = torch.device("cpu")
GRIDS = [(bits, symmetric, clip) for bits in (2, 4, 8) for symmetric in (False, True) for clip in (1.0, 0.8)]


def activations(**changes: object) -> Activations:
    """Nothing is quantised but by `changes`."""
    return Activations(**changes)  # type: ignore[arg-type]


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Random tokens, not centred, with a few large channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) + 0.3 * torch.randn(shape[-1], generator=generator)
    x[..., ::17] *= 8
    return x


# --- the grid


def levels(token: np.ndarray, bits: int, symmetric: bool, clip: float) -> np.ndarray:
    """Every value that a quantised token may take, in float64."""
    if symmetric:
        scale = clip * np.abs(token).max() / (2 ** (bits - 1) - 1)
        return scale * np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    low, high = clip * min(token.min(), 0.0), clip * max(token.max(), 0.0)
    scale = (high - low) / (2**bits - 1)
    return scale * (np.arange(2**bits) - np.round(-low / scale))


@pytest.mark.parametrize(("bits", "symmetric", "clip"), GRIDS)
def test_every_value_becomes_the_nearest_level_of_its_token(bits: int, symmetric: bool, clip: float) -> None:
    x = tokens(20, 33)
    found = quantize_tokens(x, bits, symmetric, clip)
    for token, quantized in zip(x.double().numpy(), found.double().numpy(), strict=True):
        grid = levels(token, bits, symmetric, clip)
        nearest = grid[np.abs(token[:, None] - grid).argmin(axis=1)]
        np.testing.assert_allclose(quantized, nearest, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 5, 8, 12])
def test_inside_the_range_nothing_moves_by_more_than_half_a_step(bits: int, symmetric: bool) -> None:
    x = tokens(7, 5, 64)
    error = (quantize_tokens(x, bits, symmetric, 1.0) - x).abs()
    if symmetric:
        step = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    else:
        step = (x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)) / (2**bits - 1)
    assert torch.all(error <= 0.5 * step * (1 + 1e-4))


@pytest.mark.parametrize(("bits", "symmetric", "clip"), GRIDS)
def test_a_token_has_at_most_two_to_the_bits_values(bits: int, symmetric: bool, clip: float) -> None:
    quantized = quantize_tokens(tokens(5, 4000), bits, symmetric, clip)
    assert max(len(token.unique()) for token in quantized) <= 2**bits


def test_eight_bits_are_eight_bits() -> None:
    for token in quantize_tokens(tokens(5, 4000), 8, False, 1.0):
        assert len(token.unique()) > 100


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantising_twice_is_quantising_once(bits: int, symmetric: bool) -> None:
    once = quantize_tokens(tokens(50, 64), bits, symmetric, 1.0)
    torch.testing.assert_close(quantize_tokens(once, bits, symmetric, 1.0), once, rtol=1e-5, atol=1e-6)


@given(exponent=st.integers(-40, 40), seed=st.integers(0, 99), grid=st.sampled_from(GRIDS))
@settings(max_examples=40, deadline=None)
def test_a_token_times_a_power_of_two_has_the_same_codes(
    exponent: int, seed: int, grid: tuple[int, bool, float]
) -> None:
    x, factor = tokens(3, 16, seed=seed), 2.0**exponent
    assert torch.equal(quantize_tokens(x * factor, *grid), quantize_tokens(x, *grid) * factor)


def test_tokens_know_nothing_of_each_other() -> None:
    x = tokens(4, 3, 32)
    alone = torch.stack([quantize_tokens(token, 4, False, 0.9) for token in x.flatten(0, 1)]).view_as(x)
    assert torch.equal(quantize_tokens(x, 4, False, 0.9), alone)


def test_sixteen_bits_are_the_tensor_itself() -> None:
    x = tokens(3, 8)
    assert quantize_tokens(x, 16, False, 0.5) is x


@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_stays_zero(symmetric: bool) -> None:
    x = tokens(4, 16)
    x[1] = 0
    x[2, 3:7] = 0
    quantized = quantize_tokens(x, 4, symmetric, 0.9)
    assert torch.all(quantized[x == 0] == 0)
    assert torch.all(quantized.isfinite())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_quantised_in_float32_and_stay_halves(dtype: torch.dtype) -> None:
    x = tokens(6, 64).to(dtype)
    before = x.clone()
    assert torch.equal(quantize_tokens(x, 8, False, 1.0), quantize_tokens(x.float(), 8, False, 1.0).to(dtype))
    assert torch.equal(x, before)


# --- the config


def test_the_end_of_a_name_decides_its_bits_and_the_longest_end_wins() -> None:
    config = activations(bits=4, layer_bits={"proj": 5, "down_proj": 8, "mlp.down_proj": 6, "layers.0.mlp.up": 7})
    assert config.bits_of("model.layers.1.mlp.down_proj") == 6
    assert config.bits_of("model.layers.1.down_proj") == 8
    assert config.bits_of("model.layers.1.q_proj") == 4  # "proj" is a part of a part
    assert config.bits_of("model.layers.0.mlp.up") == 7


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"r3": True}, ""),
        ({"layer_bits": {"down_proj": 16}}, ""),
        ({"bits": 8, "symmetric": True}, "A8 symmetric per token clip=1"),
        (
            {"bits": 4, "clip_ratio": 0.9, "layer_bits": {"down_proj": 8}},
            "A4 asymmetric per token clip=0.9 down_proj=A8",
        ),
        ({"bits": 4, "clip_ratio": None, "kv_bits": 4}, "A4 asymmetric per token clip=searched KV4"),
        ({"kv_bits": 4, "r3": True}, "KV4 R3"),
        ({"layer_bits": {"down_proj": 8}}, "A16 asymmetric per token clip=1 down_proj=A8"),
    ],
)
def test_what_is_simulated_is_told_and_nothing_else(changes: dict[str, object], words: str) -> None:
    config = activations(**changes)
    assert config.describe() == words
    assert config.simulates == bool(words)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "activations.bits=3: must be from 4 to 16"),
        ({"bits": 32}, "activations.bits=32: must be from 4 to 16"),
        ({"kv_bits": 1}, "activations.kv_bits=1: must be from 2 to 16"),
        ({"layer_bits": {"down_proj": 0}}, r"activations.layer_bits.down_proj=0: must be from 4 to 16"),
        ({"clip_ratio": 0.0}, "activations.clip_ratio=0.0: must be above 0 and at most 1, or null"),
        ({"clip_ratio": 1.5}, "activations.clip_ratio=1.5: must be above 0"),
        ({"clip_ratio": float("nan")}, "activations.clip_ratio=nan: must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused_by_key(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        activations(**changes)


def test_the_shipped_options_are_what_they_are_called() -> None:
    shipped = {}
    for name, path in config_files.options("activations").items():
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert values.pop("defaults") == [{"/schema@_here_": "Activations"}, "_self_"]
        shipped[name] = Activations(**values).describe()
    assert shipped == {
        "none": "",
        "a8": "A8 asymmetric per token clip=1",
        "a4": "A4 asymmetric per token clip=searched down_proj=A8",
    }


# --- layers


def streamed(directory: Path, family: str = "llama", **changes: object) -> StreamedModel:
    return StreamedModel(Checkpoint(write_checkpoint(directory, family, **changes)), CPU, torch.float32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> StreamedModel:
    return streamed(tmp_path_factory.mktemp("llama"))


def windows(count: int = 4, length: int = 16) -> Tensor:
    return torch.randint(3, 256, (count, length), generator=torch.Generator().manual_seed(1))


def block_layers(model: StreamedModel) -> list[str]:
    return [name for name in model.linear_layers() if model.block_of(name) is not None]


@torch.no_grad()
def logits(model: StreamedModel, config: Activations | None = None, layers: list[str] | None = None) -> Tensor:
    """Of `windows`, walked block by block with quantised activations; with none at all if `config` is None."""
    if config is None:
        hidden = final_hidden(model, windows(), batch=3)
    else:
        layers = block_layers(model) if layers is None else layers
        with simulated(model, config, layers, search_clips(model, config, layers, windows(), batch=2)):
            hidden = final_hidden(model, windows(), batch=3)
    with model.outer():
        return model.logits(hidden)


def inputs(model: StreamedModel, run: Callable[[], object]) -> dict[str, Tensor]:
    """What the linear layers of the blocks are given last while `run` runs, other hooks having done their work."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, given, output: found.__setitem__(name, given[0])

    handles = [model.linear_layers()[name].module.register_forward_hook(note(name)) for name in block_layers(model)]
    run()
    for handle in handles:
        handle.remove()
    return found


def distance(one: Tensor, other: Tensor) -> float:
    return (one - other).norm().item() / other.norm().item()


def test_sixteen_bits_give_the_same_logits_to_the_bit(llama: StreamedModel) -> None:
    assert torch.equal(logits(llama, activations()), logits(llama))


@pytest.mark.parametrize("symmetric", [False, True])
def test_more_bits_are_nearer_to_the_model_as_it_is(llama: StreamedModel, symmetric: bool) -> None:
    plain = logits(llama)
    errors = [distance(logits(llama, activations(bits=bits, symmetric=symmetric)), plain) for bits in (4, 6, 8, 12)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.1 < errors[0]


def test_the_layers_that_are_named_and_no_others_get_quantised_inputs(llama: StreamedModel) -> None:
    layers = [f"model.layers.{block}.{kind}" for block in (0, 2) for kind in ("self_attn.k_proj", "mlp.down_proj")]
    given = inputs(llama, lambda: logits(llama, activations(bits=4), layers))
    few = {name for name, x in given.items() if max(len(token.unique()) for token in x.flatten(0, 1)) <= 16}
    assert few == set(layers)


def test_a_layer_with_bits_of_its_own_keeps_them(llama: StreamedModel) -> None:
    config = activations(bits=4, layer_bits={"down_proj": 8, "o_proj": 16})
    plain = inputs(llama, lambda: logits(llama))
    given = inputs(llama, lambda: logits(llama, config))
    values = {name: max(len(token.unique()) for token in x.flatten(0, 1)) for name, x in given.items()}
    for name, x in plain.items():
        if name.endswith("down_proj"):
            assert 16 < values[name] <= 256
        elif name.endswith("o_proj"):
            assert values[name] == x.shape[-1]
        else:
            assert values[name] <= 16


def test_the_input_of_a_layer_is_that_of_the_law(llama: StreamedModel) -> None:
    name = "model.layers.0.self_attn.q_proj"
    plain = inputs(llama, lambda: logits(llama))[name]
    given = inputs(llama, lambda: logits(llama, activations(bits=4, clip_ratio=0.9), [name]))[name]
    assert torch.equal(given, quantize_tokens(plain, 4, False, 0.9))


def test_a_key_that_names_no_layer_is_refused(llama: StreamedModel) -> None:
    for key in ("down_prj", "lm_head", "proj"):
        with pytest.raises(ConfigError, match=rf"^activations.layer_bits.{key}=8: must name one of the 21 linear"):
            logits(llama, activations(bits=4, layer_bits={key: 8}))


class _Stopped(Exception):
    pass


@pytest.mark.parametrize("config", [activations(bits=4), activations(bits=4, kv_bits=4, r3=True)])
def test_nothing_is_left_behind_even_after_an_exception(llama: StreamedModel, config: Activations) -> None:
    plain = logits(llama)
    registered = dict(ALL_ATTENTION_FUNCTIONS)
    layers = block_layers(llama)
    for action in (lambda: None, _Stopped):
        try:
            with simulated(llama, config, layers, dict.fromkeys(layers, 1.0)):
                assert not torch.equal(logits(llama), plain)
                if error := action():
                    raise error
        except _Stopped:
            pass
        assert torch.equal(logits(llama), plain)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in llama.module.modules())
    assert dict(ALL_ATTENTION_FUNCTIONS) == registered
    assert not ALL_ATTENTION_FUNCTIONS._local_mapping


# --- clip ratios


def test_a_given_clip_ratio_is_everyones_and_needs_no_walk(llama: StreamedModel) -> None:
    config = activations(bits=4, clip_ratio=0.85)
    assert search_clips(llama, config, ["a", "b"], torch.empty(0), 1) == {"a": 0.85, "b": 0.85}


def test_where_no_input_is_quantised_no_ratio_is_searched(llama: StreamedModel) -> None:
    assert search_clips(llama, activations(clip_ratio=None), ["a"], torch.empty(0), 1) == {"a": 1.0}


def brute_force_error(x: Tensor, bits: int, symmetric: bool, clip: float) -> float:
    """Sum over tokens (tokens, features) of the squared distances to the nearest levels."""
    errors = [np.abs(token[:, None] - levels(token, bits, symmetric, clip)).min(axis=1) for token in x.double().numpy()]
    return float(np.square(errors).sum())


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (4, True), (8, False)])
def test_the_searched_ratio_is_the_best_of_the_grid(bits: int, symmetric: bool, llama: StreamedModel) -> None:
    first = block_layers(llama)[0]
    given = inputs(llama, lambda: final_hidden(llama, windows()[:2], batch=2))[first]
    errors = [brute_force_error(given.flatten(0, 1), bits, symmetric, ratio) for ratio in CLIP_RATIOS]
    config = activations(bits=bits, symmetric=symmetric, clip_ratio=None)
    assert search_clips(llama, config, [first], windows(), batch=2) == {first: CLIP_RATIOS[np.argmin(errors)]}


@torch.no_grad()
def test_each_layer_searches_on_what_the_quantised_layers_before_it_give(
    llama: StreamedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With few ratios all layers of such a model agree on one.
    monkeypatch.setattr("jointq_cli.evaluation.activation_settings.CLIP_RATIOS", [1 - step / 200 for step in range(80)])
    config = activations(bits=4, clip_ratio=None, kv_bits=4)
    layers = block_layers(llama)
    clips = search_clips(llama, config, layers, windows(), batch=3)
    assert list(clips) == layers
    assert len(set(clips.values())) > 5
    for name in layers:
        others = [layer for layer in layers if layer != name]
        with simulated(llama, config, others, clips):
            given = inputs(llama, lambda: final_hidden(llama, windows()[:3], batch=3))[name]
        assert clips[name] == best_clip(given, 4, False)


@torch.no_grad()
def test_a_search_can_be_stopped_and_leaves_nothing_behind(llama: StreamedModel) -> None:
    def stop() -> None:
        raise _Stopped

    with pytest.raises(_Stopped):
        search_clips(llama, activations(bits=4, clip_ratio=None), block_layers(llama), windows(), 2, stop)
    assert not any(module._forward_pre_hooks for module in llama.module.modules())


# --- attention

# Qwen3 and Gemma 3 normalise queries and keys, GPT-NeoX gives RoPE a part of each head only.
ATTENTION = ["llama", "mistral", "qwen3", "gemma3", "phi3", "gpt_neox"]


@pytest.mark.parametrize("family", ATTENTION)
def test_r3_alone_keeps_the_logits(family: str, tmp_path: Path) -> None:
    model = streamed(tmp_path, family)
    assert 0 < distance(logits(model, activations(r3=True)), logits(model)) < 1e-5


@pytest.mark.parametrize("family", ATTENTION)
def test_fewer_bits_for_keys_and_values_change_the_logits_by_and_by(family: str, tmp_path: Path) -> None:
    model = streamed(tmp_path, family)
    plain = logits(model)
    errors = [distance(logits(model, activations(kv_bits=bits)), plain) for bits in (3, 6, 12)]
    assert errors[0] > errors[1] > errors[2] > 0
    assert errors[2] < 0.01


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
def test_keys_and_values_are_clipped_only_where_that_helps(bits: int) -> None:
    gaussian = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))

    def error(ratio: float) -> float:
        return distance(quantize_tokens(gaussian, bits, False, ratio), gaussian)

    assert min((0.95, 1.0), key=error) == kv_clip_ratio(bits)


def test_attention_gets_keys_and_values_by_the_law_and_queries_as_they_are(
    llama: StreamedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = llama.module.config._attn_implementation
    attention = ALL_ATTENTION_FUNCTIONS[name]
    seen: list[tuple[Tensor, ...]] = []

    def note(module: torch.nn.Module, *args: Tensor, **kwargs: object) -> object:
        seen.append(args[:3])
        return attention(module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, name, note)
    logits(llama)
    plain, seen = seen, []
    logits(llama, activations(kv_bits=3))
    for before, after in zip(plain[0], seen[0], strict=True):
        expected = before if before is plain[0][0] else quantize_tokens(before, 3, False, 0.95)
        assert torch.equal(after, expected)
    assert ALL_ATTENTION_FUNCTIONS[name] is note


def test_eager_attention_is_reached_too(tmp_path: Path) -> None:
    model = streamed(tmp_path)
    default = logits(model, activations(kv_bits=4, r3=True))
    model = streamed(tmp_path)
    model.module.config._attn_implementation = "eager"
    assert 0 < distance(logits(model, activations(kv_bits=4, r3=True)), default) < 1e-5
    assert "eager" not in ALL_ATTENTION_FUNCTIONS


@torch.no_grad()
def test_another_model_keeps_its_keys_and_values(llama: StreamedModel, tmp_path: Path) -> None:
    other = streamed(tmp_path)
    plain = logits(other)
    with simulated(llama, activations(kv_bits=2), [], {}):
        assert torch.equal(logits(other), plain)
        with simulated(other, activations(kv_bits=4), [], {}):
            assert not torch.equal(logits(other), plain)
        assert torch.equal(logits(other), plain)
        assert not torch.equal(logits(llama), plain)
    assert torch.equal(logits(llama), plain)


@torch.no_grad()
def test_a_model_whose_attention_is_not_in_the_registry_is_refused(tmp_path: Path) -> None:
    model = streamed(tmp_path, "falcon")
    with pytest.raises(ModelError, match=r"^activations.kv_bits=4: block 0 of FalconForCausalLM does not look"):
        logits(model, activations(kv_bits=4))
    assert not torch.equal(logits(model, activations(bits=4)), logits(model))


def test_r3_helps_keys_with_a_few_large_channels() -> None:
    from jointq_cli.evaluation.activation_quantization import _attention_inputs

    query, key, value = tokens(1, 2, 50, 64), tokens(1, 2, 50, 64, seed=1), tokens(1, 2, 50, 64, seed=2)
    exact = query @ key.transpose(-1, -2)
    errors = []
    for r3 in (False, True):
        rotated, quantized, _ = _attention_inputs(activations(kv_bits=4, r3=r3), query, key, value)
        errors.append(distance(rotated @ quantized.transpose(-1, -2), exact))
    assert errors[1] < 0.7 * errors[0]
