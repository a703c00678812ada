"""The settings of the quantisation loop, from the parts of a recipe; all of them become part of the stages' keys."""

from collections.abc import Mapping
from typing import Any

from jointq_cli.data.token_file import Tokens
from jointq_cli.errors import ConfigError
from jointq_cli.evaluation.activation_settings import Activations
from jointq_cli.models.k_mixes import Place, kind_of, type_of
from jointq_cli.models.layer_selection import LayerSelection, find_routers, find_uncalled, override_key
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.overrides import fitting, most_common, on_type, quantizers_of_patterns, renamed
from jointq_cli.quantization.quantizers.base import Quantizer
from jointq_cli.quantization.quantizers.uniform import UniformQuantizer
from jointq_cli.quantization.settings import LoopSettings
from jointq_cli.recipe import Recipe
from jointq_cli.stages.base import windows_per_pass
from jointq_cli.transforms.architectures import FAMILIES
from jointq_cli.transforms.settings import Rotation

LLAMAS = ("llama", "mistral")  # model types that are llama.cpp's architecture of that name


def loop_settings(layers: Mapping[str, Quantizer], recipe: Recipe, tokens: Tokens) -> LoopSettings:
    """What the loop does to these layers, each with its quantizer. Raises ConfigError where the settings do not go
    together."""
    refuse_turned_twice(layers, recipe.rotation)
    usual = most_common(list(layers.values()))
    return LoopSettings(
        quantizer=usual,
        qep=recipe.qep,
        layers=frozenset(layers),
        inputs=recipe.calibration.inputs,
        weights=recipe.calibration.weights,
        windows=len(tokens.windows),
        batch=windows_per_pass(recipe.runtime, tokens.windows),
        suspended_bytes=recipe.runtime.suspended_activations_gb * 1e9,
        own={name: each for name, each in layers.items() if each != usual},
        experts=recipe.experts,
        curvature=recipe.curvature,
        precision=recipe.calibration.matmul_precision,
    )


def refuse_turned_twice(layers: Mapping[str, Quantizer], rotation: Rotation) -> None:
    """Raises ConfigError for incoherence where a rotation turns the input too. R2 mixes the inputs of o_proj inside of
    heads only."""
    readers = {name for family in FAMILIES.values() for names in family.readers.values() for name in names}
    turned = {
        *(readers if "R1" in rotation.parts else ()),
        *((family.down_proj for family in FAMILIES.values()) if "R4" in rotation.parts else ()),
    }
    for name, each in layers.items():
        if isinstance(each, UniformQuantizer) and each.is_turned and name.endswith(tuple(turned)):
            raise ConfigError(
                f"quantizer.incoherence=input: rotation turns the input of {name} already; rotation=none "
                "or quantizer.incoherence=none, and incoherence for other layers by layers.overrides"
            )


def selected_layers(
    model: StreamedModel, layers: LayerSelection, quantizer: Quantizer, activations: Activations
) -> dict[str, Quantizer]:
    """The quantizer of each layer to quantise, by name in the order of the model. Raises ConfigError before any
    computing, also for layers of `activations` that the model does not have."""
    linear = model.linear_layers()
    activations.check_layers(_in_blocks(model))
    found = {
        name: fitting(each, linear[name].in_features) for name, each in asked_for(model, layers, quantizer).items()
    }
    patterns = layers.match_overrides(_selected(model, layers))
    alike: dict[tuple[str | None, str], list[str]] = {}
    for name, each in found.items():
        alike.setdefault((patterns.get(name), repr(each)), []).append(name)
    for (pattern, _), names in alike.items():
        try:
            found[names[0]].check({name: linear[name].in_features for name in names})
        except ConfigError as error:
            if pattern is None:
                raise
            raise ConfigError(renamed(str(error), layers.overrides[pattern], override_key(pattern))) from error
    return found


def asked_for(model: StreamedModel, layers: LayerSelection, quantizer: Quantizer) -> dict[str, Quantizer]:
    """As `selected_layers`, on K grids also where these do not fit. Raises ConfigError for patterns and settings."""
    names = _selected(model, layers)
    patterns, choices = layers.match_overrides(names), quantizers_of_patterns(layers, quantizer)
    types = {} if layers.mix is None else _mixed(model, layers.mix)
    of_types = {name: on_type(quantizer, name, f"layers.mix={layers.mix}") for name in set(types.values())}
    chosen = {
        name: choices[patterns[name]] if name in patterns else of_types[types[name]] if name in types else quantizer
        for name in names
    }
    found = {name: each for name, each in chosen.items() if each is not None}
    if not found:
        raise ConfigError("layers.overrides: leaves all layers alone, so that there is nothing to quantise")
    return found


def overridden_layers(model: StreamedModel, layers: LayerSelection) -> set[str]:
    """Those that `layers.overrides` decides."""
    return set(layers.match_overrides(_selected(model, layers)))


def _in_blocks(model: StreamedModel) -> list[str]:
    return [name for name in model.linear_layers() if model.block_of(name) is not None]


def _selected(model: StreamedModel, layers: LayerSelection) -> list[str]:
    linear = model.linear_layers()
    return layers.select(_in_blocks(model), list(linear), find_routers(linear), find_uncalled(model.module))


def _mixed(model: StreamedModel, mix: str) -> dict[str, str]:
    """The type of each linear layer of the blocks. llama.cpp counts blocks by their attn_v, also those left alone."""
    config: Any = model.module.config.get_text_config()
    heads, shared = (_first(getattr(config, name, 0)) for name in ("num_attention_heads", "num_key_value_heads"))
    groups = heads // shared if shared else 1
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((count for name in names if (count := _first(getattr(config, name, 0)))), 0)
    is_70b = len(model) == 80 and (config.model_type == "qwen2" or (config.model_type in LLAMAS and groups > 1))
    blocks = {name: model.block_of(name) or 0 for name in _in_blocks(model)}
    valued = sorted({block for name, block in blocks.items() if kind_of(name) == "attn_v"})
    found = {}
    for name, block in blocks.items():
        kind = kind_of(name)
        counted = (valued.index(block), len(valued)) if kind == "attn_v" else (block, len(model))
        found[name] = type_of(mix, Place(kind, *counted, query_groups=groups, experts=experts, is_70b=is_70b))
    return found


def _first(value: Any) -> int:
    """Of a number that may be given per block; 0 for none."""
    return int((value[0] if isinstance(value, list) else value) or 0)
