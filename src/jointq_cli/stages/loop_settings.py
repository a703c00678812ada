"""The settings of the quantisation loop, from the parts of a recipe; all of them become part of the stages' keys."""

from jointq_cli.data.token_file import Tokens
from jointq_cli.evaluation.activation_settings import Activations
from jointq_cli.models.layer_selection import LayerSelection, find_routers, find_uncalled
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.quantizers.base import Quantizer
from jointq_cli.quantization.settings import LoopSettings
from jointq_cli.recipe import Recipe
from jointq_cli.stages.base import windows_per_pass


def loop_settings(layers: list[str], recipe: Recipe, tokens: Tokens) -> LoopSettings:
    """What the loop does to these layers. Raises ConfigError where the settings do not go together."""
    return LoopSettings(
        quantizer=recipe.quantizer,
        qep=recipe.qep,
        layers=frozenset(layers),
        inputs=recipe.calibration.inputs,
        weights=recipe.calibration.weights,
        windows=len(tokens.windows),
        batch=windows_per_pass(recipe.runtime, tokens.windows),
        suspended_bytes=recipe.runtime.suspended_activations_gb * 1e9,
        experts=recipe.experts,
    )


def selected_layers(
    model: StreamedModel, layers: LayerSelection, quantizer: Quantizer, activations: Activations
) -> list[str]:
    """Names of the layers to quantise, in the order of the model. Raises ConfigError before any computing, also for
    layers of `activations` that the model does not have."""
    linear = model.linear_layers()
    in_blocks = [name for name in linear if model.block_of(name) is not None]
    activations.check_layers(in_blocks)
    names = layers.select(in_blocks, list(linear), find_routers(linear), find_uncalled(model.module))
    quantizer.check({name: linear[name].in_features for name in names})
    return names
