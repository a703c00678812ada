"""The settings of the quantisation loop, from the parts of a recipe; all of them become part of the stages' keys."""

from collections.abc import Mapping

from jointq_cli.data.calibration import Calibration
from jointq_cli.data.token_file import Tokens
from jointq_cli.errors import ConfigError
from jointq_cli.evaluation.activation_settings import Activations
from jointq_cli.models.layer_selection import LayerSelection, find_routers, find_uncalled, override_key
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.overrides import most_common, quantizers_of_patterns, renamed
from jointq_cli.quantization.qep import QepSettings
from jointq_cli.quantization.quantizers.base import Quantizer
from jointq_cli.quantization.settings import LoopSettings
from jointq_cli.stages.base import windows_per_pass
from jointq_cli.system.settings import Runtime


def loop_settings(
    layers: Mapping[str, Quantizer],
    qep: QepSettings,
    calibration: Calibration,
    runtime: Runtime,
    tokens: Tokens,
) -> LoopSettings:
    """What the loop does to these layers, each with its quantizer. Raises ConfigError where the settings do not go
    together."""
    usual = most_common(list(layers.values()))
    return LoopSettings(
        quantizer=usual,
        qep=qep,
        layers=frozenset(layers),
        inputs=calibration.inputs,
        weights=calibration.weights,
        windows=len(tokens.windows),
        batch=windows_per_pass(runtime, tokens.windows),
        suspended_bytes=runtime.suspended_activations_gb * 1e9,
        own={name: each for name, each in layers.items() if each != usual},
    )


def selected_layers(
    model: StreamedModel, layers: LayerSelection, quantizer: Quantizer, activations: Activations
) -> dict[str, Quantizer]:
    """The quantizer of each layer to quantise, by name in the order of the model. Raises ConfigError before any
    computing, also for layers of `activations` that the model does not have."""
    linear = model.linear_layers()
    in_blocks = [name for name in linear if model.block_of(name) is not None]
    activations.check_layers(in_blocks)
    names = layers.select(in_blocks, list(linear), find_routers(linear), find_uncalled(model.module))
    patterns, choices = layers.match_overrides(names), quantizers_of_patterns(layers, quantizer)
    chosen = {name: choices[patterns[name]] if name in patterns else quantizer for name in names}
    found = {name: each for name, each in chosen.items() if each is not None}
    if not found:
        raise ConfigError("layers.overrides: leaves all layers alone, so that there is nothing to quantise")
    quantizer.check({name: linear[name].in_features for name in found if name not in patterns})
    for pattern, each in choices.items():
        if each is not None:
            try:
                each.check({name: linear[name].in_features for name in found if patterns.get(name) == pattern})
            except ConfigError as error:
                raise ConfigError(renamed(str(error), layers.overrides[pattern], override_key(pattern))) from error
    return found
