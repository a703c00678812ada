"""Rotations that cannot be absorbed: R4 stands in front of down_proj whenever the model runs.

A checkpoint that needs one says so in its config, under a model type that no library knows: plain transformers refuses
it, where it would otherwise load it and compute nonsense. Here the real type is put back, and the rotation is a hook.
"""

from typing import Any

from torch import Tensor, nn

from jointq_cli.errors import ModelError
from jointq_cli.rotation.hadamard import turned

KEY = "jointq_online"
_TYPE = "needs jointq: a Hadamard rotation (R4) stands online in front of {layer}, which transformers does not run"


def with_online(config: dict[str, Any], layer: str) -> dict[str, Any]:
    """A config.json whose model has R4 in front of `layer` of every block."""
    real = {"model_type": config["model_type"], "r4": layer}
    return {**config, "model_type": _TYPE.format(layer=layer), KEY: real}


def without_online(config: dict[str, Any]) -> dict[str, Any]:
    """The config that transformers knows."""
    plain = {name: value for name, value in config.items() if name != KEY}
    return {**plain, "model_type": config[KEY]["model_type"]}


def needs_online(config: dict[str, Any]) -> bool:
    return KEY in config


def attach(blocks: list[nn.Module], config: dict[str, Any]) -> None:
    """Puts the rotation in front of its layer in every block, for good. Raises ModelError where it is not there."""
    layer = config[KEY].get("r4", "")
    for block in blocks:
        modules = dict(block.named_modules())
        if layer not in modules:
            raise ModelError(f"config.json: {KEY}.r4={layer}: must name a layer of the model's blocks")
        modules[layer].register_forward_pre_hook(_turn)


def _turn(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # float32: a Hadamard product in bfloat16 would round once per factor.
    return (turned(given[0].float()).to(given[0].dtype), *given[1:])
