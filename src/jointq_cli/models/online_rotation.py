"""Online rotations: R4 cannot be merged into weights and is applied to the input of down_proj in every forward pass.

A checkpoint that needs one has an invalid model_type and hidden_size in its config.json. Plain transformers, which
would otherwise load it and compute nonsense, therefore refuses it, through AutoModel and through the model's own class.
Here the real values are restored, and the rotation is a forward hook.
"""

from typing import Any

from torch import Tensor, nn

from jointq_cli.errors import ModelError
from jointq_cli.kernels.hadamard import hadamard_transform

KEY = "jointq_online"
_INVALIDATED = ("model_type", "hidden_size")
_MESSAGE = "needs jointq: a Hadamard rotation (R4) stands online in front of {layer}, which transformers does not run"


def with_online(config: dict[str, Any], layer: str) -> dict[str, Any]:
    """The config.json of a model with R4 before `layer` of every block, such as "mlp.down_proj"."""
    # Nested one level deeper: transformers takes a dict with a model_type for the config of a submodel and loads it.
    real = {name: config[name] for name in _INVALIDATED if name in config}
    return {**config, **dict.fromkeys(_INVALIDATED, _MESSAGE.format(layer=layer)), KEY: {"r4": layer, "real": real}}


def without_online(config: dict[str, Any]) -> dict[str, Any]:
    """The config with its real values, as transformers needs it."""
    plain = {name: value for name, value in config.items() if name not in (KEY, *_INVALIDATED)}
    return {**plain, **config[KEY]["real"]}


def needs_online(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of a model with an online rotation."""
    return KEY in config


def attach(blocks: list[nn.Module], config: dict[str, Any]) -> None:
    """Registers the rotation before its layer in every block. Raises ModelError where a block has no such layer."""
    layer = config[KEY].get("r4", "")
    for block in blocks:
        module = dict(block.named_modules()).get(layer)
        if not isinstance(module, nn.Linear):
            raise ModelError(f"config.json: {KEY}.r4={layer}: must name a linear layer of the model's blocks")
        module.register_forward_pre_hook(_rotate)


def _rotate(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # float32: a Hadamard transform in bfloat16 would round once per factor.
    return (hadamard_transform(inputs[0].float()).to(inputs[0].dtype), *inputs[1:])
