"""A recipe: everything that a command needs to know, as one value composed of the dataclasses of all rooms.

Knows types. `cli.compose` fills them with the values of yaml files and of the command line.
"""

import dataclasses
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Iterator
from dataclasses import Field, dataclass
from typing import Any

from jointq_cli.data.calibration import Calibration
from jointq_cli.errors import ConfigError
from jointq_cli.evaluation.activation_settings import Activations
from jointq_cli.evaluation.engines import ENGINES
from jointq_cli.evaluation.windows import Evaluation
from jointq_cli.formats.export import Exporter, exporters_of
from jointq_cli.models.layer_selection import LayerSelection, override_key
from jointq_cli.models.sources import ModelSource
from jointq_cli.quantization import quantizers
from jointq_cli.quantization.allocation import NO_ALLOCATION, Allocation
from jointq_cli.quantization.curvature import NO_CURVATURE, Curvature
from jointq_cli.quantization.expert_settings import DEFAULT_EXPERTS, ExpertSettings
from jointq_cli.quantization.overrides import quantizers_of_patterns
from jointq_cli.quantization.qep import QepSettings
from jointq_cli.quantization.quantizers import Quantizer
from jointq_cli.quantization.quantizers.uniform import UniformQuantizer, with_incoherence
from jointq_cli.quantization.refinement.settings import NoRefinement, Refinement
from jointq_cli.report.limits import Limits
from jointq_cli.setting_rules import SettingRoles, check_settings, rule_of, setting
from jointq_cli.system.settings import Runtime
from jointq_cli.tracking import NoTracking, Tracking
from jointq_cli.transforms import Rotation, Smoothing


def _plain_name() -> Any:
    form = "be a plain name, since the run directory is called by it"
    return setting(pattern=r"(?!\.\.?$)[^/\\]+", form=form, decides=False)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what `jointq quantize` does."""

    name: str = _plain_name()
    description: str = setting(decides=False)
    model: ModelSource = setting(decides=False)  # nor does the name of the option; the hash of the weights decides
    calibration: Calibration
    layers: LayerSelection
    quantizer: Quantizer
    qep: QepSettings
    rotation: Rotation
    smoothing: Smoothing
    activations: Activations
    evaluation: Evaluation
    curvature: Curvature = setting(NO_CURVATURE)
    allocation: Allocation = setting(NO_ALLOCATION)
    experts: ExpertSettings = setting(DEFAULT_EXPERTS)
    refinement: Refinement = setting(NoRefinement())
    limits: Limits = setting(Limits(), decides=False)
    runtime: Runtime
    tracking: Tracking = setting(NoTracking(), decides=False)  # of jointq quantize
    export: Any = setting(None)  # a format, or a list of formats: see `formats.export.exporters_of`
    check_exports: bool = setting(True, decides=False)  # in their engines, where these are installed
    generate_tokens: int = setting(32, least=0, decides=False)  # that both models write after each of three prompts
    output_dir: str = setting(decides=False)  # run directories are made in here
    store: str = setting(decides=False)  # artifacts that runs share

    def __post_init__(self) -> None:
        check_settings(self)
        self.qep.check_inputs(self.calibration.inputs)
        quantizers_of_patterns(self.layers, self.quantizer)
        self.allocation.check(self.quantizer)
        if self.layers.mix and self.allocation.describe():
            raise ConfigError(f"layers.mix={self.layers.mix}: decides all layers, and so does allocation=budget; null")
        # Here and not where a config becomes a recipe: only a complete recipe knows what it exports and rotates, and
        # none is to hold an incoherence=auto that stages and keys of the store would have to decide about again.
        object.__setattr__(self, "quantizer", with_incoherence(self.quantizer, self._may_turn()))
        if self.evaluation.tasks and "R4" in self.rotation.parts:
            tasks = ",".join(self.evaluation.tasks)
            raise ConfigError(
                f"evaluation.tasks=[{tasks}]: run in plain transformers, which refuses R4; use rotation.r4=false"
            )

    @property
    def exporters(self) -> list[Exporter]:
        return exporters_of(self.export)

    @property
    def seeds(self) -> dict[str, int]:
        """The seeds of all random choices, by key; of layers with settings of their own those that differ."""
        usual = self.quantizer.seeds
        own: dict[str, Quantizer | None] = {
            override_key(pattern): each for pattern, each in quantizers_of_patterns(self.layers, self.quantizer).items()
        }
        own |= {f"allocation.candidates[{at}]": each for at, each in enumerate(self.allocation.of(self.quantizer))}
        others = {
            name.replace("quantizer", key, 1): seed
            for key, each in own.items()
            for name, seed in (each.seeds if each else {}).items()
            if usual.get(name) != seed
        }
        fixed = {"calibration.seed": self.calibration.seed}
        return {**fixed, **usual, **others, **self.rotation.seeds, **self.curvature.seeds, **self.refinement.seeds}

    def _may_turn(self) -> bool:
        """Whether quantizer.incoherence=auto turns the layers: not for a packed export, which its reader would have to
        turn back, and not where a rotation turns inputs or a layer is on a K grid. Raises ConfigError for an export
        that is unknown, and where settings of single layers are wrong."""
        if self.exporters or self.rotation.parts or self.layers.mix:
            return False
        chosen = [*quantizers_of_patterns(self.layers, self.quantizer).values(), *self.allocation.of(self.quantizer)]
        return all(each.turnable for each in chosen if isinstance(each, UniformQuantizer))


@dataclass(frozen=True, kw_only=True)
class CalibrateRecipe(Recipe):
    """Of this recipe, `jointq calibrate` computes the calibration tokens alone and writes them to the file `output`."""

    output: str

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class RotateRecipe(Recipe):
    """Of this recipe, `jointq rotate` writes the smoothed and rotated model alone, at full precision."""

    def __post_init__(self) -> None:
        check_settings(self)
        if not (self.rotation.parts or self.smoothing.places):
            raise ConfigError("rotation=none: with smoothing=none nothing changes; use rotation=hadamard or learned")


@dataclass(frozen=True, kw_only=True)
class EvaluateRecipe:
    """Everything that decides what `jointq evaluate` does."""

    name: str = _plain_name()
    model: ModelSource
    reference: str | None = setting(None, place=True)  # the original, as in model.path: adds KL divergence
    engine: str | None = setting(None, choices=tuple(ENGINES), null="for jointq's own")  # that computes the model
    evaluation: Evaluation
    runtime: Runtime
    output_dir: str
    store: str

    def __post_init__(self) -> None:
        check_settings(self)
        if self.evaluation.tasks and self.engine not in (None, "transformers"):
            raise ConfigError(
                f"engine={self.engine}: evaluation.tasks are measured in transformers; leave one of both out"
            )


RECIPES: dict[str, type[Any]] = {
    "quantize": Recipe,
    "plan": Recipe,
    "rotate": RotateRecipe,
    "evaluate": EvaluateRecipe,
    "calibrate": CalibrateRecipe,
}
"""Command -> the type of its primary config, a yaml file of the same name."""


def schemas() -> list[type[Any]]:
    """The recipes and every concrete dataclass that their fields may hold, subclasses included."""
    for module in pkgutil.iter_modules(quantizers.__path__, quantizers.__name__ + "."):
        importlib.import_module(module.name)
    found: dict[type[Any], None] = {}
    for recipe in RECIPES.values():
        _collect(recipe, found)
    return list(found)


def keyed_fields(recipe: type[Any], prefix: str = "") -> Iterator[tuple[str, Field[Any]]]:
    """Every dotted key that a config of this type may have (quantizer, quantizer.bits and so on) and its field.

    A key of several types, such as rotation.seed, comes once for each.
    """
    hints = typing.get_type_hints(recipe)
    for field in dataclasses.fields(recipe):
        yield prefix + field.name, field
        for choice in concrete(hints[field.name]):
            yield from keyed_fields(choice, f"{prefix}{field.name}.")


def keys(recipe: type[Any]) -> list[str]:
    return [key for key, _ in keyed_fields(recipe)]


def setting_roles(recipe: type[Any] = Recipe) -> SettingRoles:
    """What the keys of a recipe are to a run's result, as their fields declare."""
    found = list(keyed_fields(recipe))
    return SettingRoles(
        known=frozenset(key for key, _ in found),
        undeciding=frozenset(key for key, field in found if not rule_of(field).decides),
        dictionaries=frozenset(key for key, field in found if typing.get_origin(field.type) is dict),
    )


def concrete(annotation: Any) -> list[type[Any]]:
    """`annotation` and its subclasses, those that are dataclasses and not abstract."""
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
