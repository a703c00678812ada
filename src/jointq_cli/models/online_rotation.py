"""Rotations that cannot be absorbed: R4 stands in front of down_proj whenever the model runs.

A checkpoint that needs one says so in its config, as a model type that no library knows and a hidden size that is no
number: plain transformers refuses it, by AutoModel and by the model's own class, where it would otherwise load it and
compute nonsense. Here the real values are put back, and the rotation is a hook.
"""

from typing import Any

from torch import Tensor, nn

from jointq_cli.errors import ModelError
from jointq_cli.kernels.hadamard import hadamard_transform

KEY = "jointq_online"
_SPOILT = ("model_type", "hidden_size")
_MESSAGE = "needs jointq: a Hadamard rotation (R4) stands online in front of {layer}, which transformers does not run"


def with_online(config: dict[str, Any], layer: str) -> dict[str, Any]:
    """A config.json whose model has R4 in front of `layer` of every block."""
    # One level further down: a dict with a model_type is to transformers the config of a part of the model, and read.
    real = {name: config[name] for name in _SPOILT if name in config}
    return {**config, **dict.fromkeys(_SPOILT, _MESSAGE.format(layer=layer)), KEY: {"r4": layer, "real": real}}


def without_online(config: dict[str, Any]) -> dict[str, Any]:
    """The config that transformers knows."""
    plain = {name: value for name, value in config.items() if name not in (KEY, *_SPOILT)}
    return {**plain, **config[KEY]["real"]}


def needs_online(config: dict[str, Any]) -> bool:
    return KEY in config


def attach(blocks: list[nn.Module], config: dict[str, Any]) -> None:
    """Puts the rotation in front of its layer in every block, for good. Raises ModelError where it is not there."""
    layer = config[KEY].get("r4", "")
    for block in blocks:
        module = dict(block.named_modules()).get(layer)
        if not isinstance(module, nn.Linear):
            raise ModelError(f"config.json: {KEY}.r4={layer}: must name a linear layer of the model's blocks")
        module.register_forward_pre_hook(_turn)


def _turn(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # float32: a Hadamard product in bfloat16 would round once per factor.
    return (hadamard_transform(given[0].float()).to(given[0].dtype), *given[1:])
