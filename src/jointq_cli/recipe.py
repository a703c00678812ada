"""What a command is asked to do, as one value: the dataclasses that live next to their maths, composed.

Knows types and nothing of yaml, Hydra or defaults: yaml holds the values, `launch` brings both together.
"""

import dataclasses
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jointq_cli.data.calibration import Calibration
from jointq_cli.errors import ConfigError
from jointq_cli.evaluation.activation_settings import Activations
from jointq_cli.evaluation.windows import Evaluation
from jointq_cli.models.layer_selection import LayerSelection
from jointq_cli.models.sources import ModelSource
from jointq_cli.quantization import quantizers
from jointq_cli.quantization.qep import QepSettings
from jointq_cli.quantization.quantizers import Quantizer
from jointq_cli.system.settings import Runtime
from jointq_cli.transforms import Rotation, Smoothing


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what `jointq quantize` does."""

    name: str  # part of the run directory's path
    description: str
    model: ModelSource
    calibration: Calibration
    layers: LayerSelection
    quantizer: Quantizer
    qep: QepSettings
    rotation: Rotation
    smoothing: Smoothing
    activations: Activations
    evaluation: Evaluation
    runtime: Runtime
    output_dir: str  # run directories are made in here
    store: str  # artifacts that runs share

    def __post_init__(self) -> None:
        _check_name(self.name)
        self.qep.check_inputs(self.calibration.inputs)


@dataclass(frozen=True)
class CalibrateRecipe(Recipe):
    """A recipe of which only the calibration tokens are made, and kept in the file `output`."""

    output: str

    def __post_init__(self) -> None:
        _check_name(self.name)


@dataclass(frozen=True)
class RotateRecipe(Recipe):
    """A recipe of which only the smoothed and rotated model is made, at full precision."""

    def __post_init__(self) -> None:
        _check_name(self.name)
        if not (self.rotation.parts or self.smoothing.places):
            raise ConfigError("rotation=none: with smoothing=none nothing changes; use rotation=hadamard or learned")


@dataclass(frozen=True)
class EvaluateRecipe:
    """Everything that decides what `jointq evaluate` does."""

    name: str
    model: ModelSource
    reference: str | None  # the original, as in model.path: adds KL divergence and top-1 agreement
    evaluation: Evaluation
    runtime: Runtime
    output_dir: str
    store: str

    def __post_init__(self) -> None:
        _check_name(self.name)


RECIPES: dict[str, type[Any]] = {
    "quantize": Recipe,
    "plan": Recipe,
    "rotate": RotateRecipe,
    "evaluate": EvaluateRecipe,
    "calibrate": CalibrateRecipe,
}
"""Command -> what its primary config, a yaml file of the same name, becomes."""


def schemas() -> list[type[Any]]:
    """The recipes and every concrete dataclass that they may hold; subclasses are found by themselves."""
    for module in pkgutil.iter_modules(quantizers.__path__, quantizers.__name__ + "."):
        importlib.import_module(module.name)
    found: dict[type[Any], None] = {}
    for recipe in RECIPES.values():
        _collect(recipe, found)
    return list(found)


def keys(recipe: type[Any], prefix: str = "") -> Iterator[str]:
    """Every key that a config of this type may have, with dots: quantizer, quantizer.bits and so on."""
    hints = typing.get_type_hints(recipe)
    for field in dataclasses.fields(recipe):
        yield prefix + field.name
        for choice in concrete(hints[field.name]):
            yield from keys(choice, f"{prefix}{field.name}.")


def concrete(annotation: Any) -> list[type[Any]]:
    """The dataclasses that may stand where `annotation` does: it and its subclasses, none abstract."""
    if not (isinstance(annotation, type) and dataclasses.is_dataclass(annotation)):
        return []
    below = [choice for child in annotation.__subclasses__() for choice in concrete(child)]
    return below if inspect.isabstract(annotation) else [annotation, *below]


def _collect(choice: type[Any], found: dict[type[Any], None]) -> None:
    if choice in found:
        return
    found[choice] = None
    hints = typing.get_type_hints(choice)
    for field in dataclasses.fields(choice):
        for nested in concrete(hints[field.name]):
            _collect(nested, found)


def _check_name(name: str) -> None:
    if not name or "/" in name or "\\" in name or name in (".", ".."):
        raise ConfigError(f"name={name}: must be a plain name, since the run directory is called by it")
