"""Which candidate each layer gets, so that the loss of the model is least within a budget of bits."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import yaml

from jointq_cli.data.token_file import Tokens
from jointq_cli.errors import ConfigError
from jointq_cli.models.checkpoint import DTYPES
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.allocation import Budget, in_words
from jointq_cli.quantization.curvature import Kfac
from jointq_cli.quantization.expert_unit import model_units
from jointq_cli.quantization.knapsack import Choice, Knapsack
from jointq_cli.quantization.overrides import fitting, renamed
from jointq_cli.quantization.qep import NoQep
from jointq_cli.quantization.quantizers.base import Quantizer
from jointq_cli.quantization.sensitivity import Losses, LossFiles
from jointq_cli.quantization.settings import LoopSettings
from jointq_cli.recipe import Recipe
from jointq_cli.records.allocation import AllocationPoint, AllocationRecord
from jointq_cli.stages.base import Context, Stage
from jointq_cli.stages.loop_settings import loop_settings, overridden_layers
from jointq_cli.stages.plan.preflight import export_warnings
from jointq_cli.stages.sensitivity import measure
from jointq_cli.system.files import write_text_atomically
from jointq_cli.system.record_json import encode, load_record

ALLOCATION, RECORD, MAP = "allocation", "allocation.json", "allocation.yaml"
POINTS = 60  # of the curve in the report
OTHER_TIE = {"none": "kernel", "kernel": "none"}

Estimate = Callable[[str, int], float]  # the loss of a layer with its candidate of this number


@dataclass(frozen=True)
class Allocated:
    """The quantizer of each layer; without a budget those that the recipe gives, and no record. file: the map."""

    layers: dict[str, Quantizer]
    record: AllocationRecord | None = None
    file: Path | None = None


def allocate(
    context: Context, model: StreamedModel, tokens: Tokens, layers: dict[str, Quantizer], recipe: Recipe
) -> Allocated:
    """Runs `allocation_stage` if the recipe has a budget, and what comes before it. layers: as the recipe has them."""
    problem = find_problem(model, layers, recipe)
    if problem is None:
        return Allocated(layers)
    measured = measure(context, model, tokens, problem.loop(recipe, tokens), problem.candidates, problem.sensitivity)
    allocated = open_allocation(problem, context.run(allocation_stage(problem, measured)).path)
    context.console.note(problem.budget_line())
    context.console.note(describe(allocated))
    return allocated


def expected_layers(model: StreamedModel, layers: dict[str, Quantizer], recipe: Recipe) -> dict[str, Quantizer]:
    """As `allocate` gives, but as if errors of all layers mattered alike: for what has to be known before. Raises
    ConfigError for a budget that no choice holds."""
    problem = find_problem(model, layers, recipe)
    if problem is None:
        return layers

    def estimate(name: str, number: int) -> float:
        weights = problem.sizes[name]
        return weights * math.pow(4.0, -problem.bits[name][number] / weights)

    return problem.with_choice(problem.distribute(estimate, problem.allocation.tie))


def allocation_stage(problem: "Problem", measured: Stage) -> Stage:
    """measured: the stage of the losses."""

    def make(scratch: Path, context: Context) -> None:
        def write() -> None:
            record = problem.solve(LossFiles(context.directory(measured)).read())
            write_text_atomically(scratch / MAP, problem.as_yaml(record))
            write_text_atomically(scratch / RECORD, encode(record))

        context.team.on_rank0(write)

    return Stage(
        name=ALLOCATION,
        kind=ALLOCATION,
        spec={
            "allocation": problem.allocation,
            "budget": problem.budget,
            "layers": list(problem.layers),
            "fixed": problem.fixed,
        },
        inputs=(measured.key,),
        make=make,
        together=True,
    )


def open_allocation(problem: "Problem", directory: Path) -> Allocated:
    """The result of `allocation_stage`, once it has been run."""
    record = load_record(AllocationRecord, directory / RECORD)
    return Allocated(problem.with_choice(record.layers), record, directory / MAP)


def describe(allocated: Allocated) -> str:
    """How many layers each candidate has, and the loss that is predicted."""
    record = allocated.record
    assert record is not None
    numbers = list(record.layers.values())
    counts = [f"{numbers.count(number)} of {words}" for number, words in enumerate(record.candidates)]
    chosen = record.chosen
    size = f"{chosen.bits_per_weight:.4g} bits per weight"
    return f"allocation: {', '.join(counts)}; {size}, predicted KL {chosen.loss:.3g}"


@dataclass(frozen=True)
class Problem:
    """What there is to distribute. layers: those to quantise as the recipe has them. candidates: of those that no
    override decides. bits: what each candidate stores. fixed: bits of the other layers. budget: bits of all."""

    allocation: Budget
    layers: Mapping[str, Quantizer]
    candidates: Mapping[str, Sequence[Quantizer]]
    bits: Mapping[str, Sequence[int]]
    sizes: Mapping[str, int]  # weights of each layer
    kernels: Mapping[str, str]  # of each layer the kernel that runs it with others
    experts: Mapping[str, str]  # of those of experts the layers that are tied always
    fixed: int
    budget: int
    plain: int  # bytes of all other weights

    def loop(self, recipe: Recipe, tokens: Tokens) -> LoopSettings:
        """Of the walk that measures losses: layers are solved for inputs of the original model."""
        loop = loop_settings({name: self.layers[name] for name in self.candidates}, recipe, tokens)
        first = next(iter(self.candidates.values()))[0]
        curvature = loop.curvature
        if self.allocation.sensitivity == "kfac" and not isinstance(curvature, Kfac):
            curvature = Kfac(strength=0.0)
        return replace(loop, quantizer=first, own={}, inputs="original", qep=NoQep(), curvature=curvature)

    @property
    def sensitivity(self) -> str:
        return self.allocation.sensitivity

    @cached_property
    def weights(self) -> int:
        return sum(self.sizes.values())

    def solve(self, losses: Losses) -> AllocationRecord:
        """losses: of the candidates of each layer."""

        def estimate(name: str, number: int) -> float:
            return losses[name][number]

        tie = self.allocation.tie
        chosen = self.distribute(estimate, tie)
        other = self._units(OTHER_TIE[tie])
        numbers = range(len(self.allocation.candidates))
        fits = Knapsack([self._choices(unit, estimate) for unit in other]).least <= self.budget - self.fixed
        return AllocationRecord(
            allocation=self.allocation.describe(),
            chosen=self._point(chosen, estimate),
            candidates=[in_words(settings) for settings in self.allocation.candidates],
            uniform=[self._point(dict.fromkeys(self.candidates, number), estimate) for number in numbers],
            curve=[
                AllocationPoint((self.fixed + point.bits) / self.weights, point.loss)
                for point in self._knapsack(estimate, tie).curve(POINTS)
            ],
            other_tie=(
                self._point(self.distribute(estimate, OTHER_TIE[tie]), estimate)
                if fits and len(other) != len(self._units(tie))
                else None
            ),
            layers=chosen,
        )

    def distribute(self, estimate: Estimate, tie: str) -> dict[str, int]:
        """The number of the candidate of each layer. Raises ConfigError where no choice holds the budget."""
        knapsack = self._knapsack(estimate, tie)
        if knapsack.least + self.fixed > self.budget:
            raise ConfigError(f"allocation.{self.allocation.budget}: {self._too_small(knapsack.least + self.fixed)}")
        numbers = knapsack.choose(self.budget - self.fixed)
        return {name: number for unit, number in zip(self._units(tie), numbers, strict=True) for name in unit}

    def with_choice(self, chosen: Mapping[str, int]) -> dict[str, Quantizer]:
        """The quantizer of each layer."""
        return {
            name: self.candidates[name][chosen[name]] if name in chosen else quantizer
            for name, quantizer in self.layers.items()
        }

    def as_yaml(self, record: AllocationRecord) -> str:
        """The map as `layers.overrides` takes it."""
        settings = {name: dict(self.allocation.candidates[number]) for name, number in record.layers.items()}
        text = yaml.safe_dump(settings, default_flow_style=None, sort_keys=False, width=200)
        return f"# allocation.{record.allocation}\n# for layers.overrides=@{MAP}\n{text}"

    def budget_line(self) -> str:
        """What the budget is, and what each candidate would take in all layers."""
        texts = []
        for number, settings in enumerate(self.allocation.candidates):
            taken = self.fixed + sum(bits[number] for bits in self.bits.values())
            texts.append(f"{in_words(settings)} {taken / self.weights:.4g} ({self._gigabytes(taken):.3g})")
        size = f"{self.budget / self.weights:.4g} bits per weight ({self._gigabytes(self.budget):.3g} GB in all)"
        largest = self.fixed + sum(map(max, self.bits.values()))
        unused = "; the largest leave a part of it unused" if largest < self.budget else ""
        return f"allocation: the budget is {size}; in all layers alike would take {', '.join(texts)}{unused}"

    def _gigabytes(self, bits: int) -> float:
        """Of all weights, where those to quantise take so many bits."""
        return (self.plain + bits / 8) / 1e9

    def _too_small(self, least: int) -> str:
        if self.allocation.size_gb is not None:
            size, plain = self._gigabytes(least), self._gigabytes(0)
            taken = f"{size:.4g} GB, of which {plain:.4g} are of weights not quantised"
        else:
            taken = f"{least / self.weights:.4g}"
        return f"the smallest candidates take {taken}; a larger budget, or smaller allocation.candidates"

    def _units(self, tie: str) -> list[list[str]]:
        """The layers that get the same candidate, in the order of the model."""
        tied = self.kernels if tie == "kernel" else self.experts
        found: dict[str, list[str]] = {}
        for name in self.candidates:
            found.setdefault(tied.get(name, name), []).append(name)
        return list(found.values())

    def _choices(self, unit: Sequence[str], estimate: Estimate) -> list[Choice]:
        return [
            Choice(sum(self.bits[name][number] for name in unit), sum(estimate(name, number) for name in unit))
            for number in range(len(self.allocation.candidates))
        ]

    def _knapsack(self, estimate: Estimate, tie: str) -> Knapsack:
        return Knapsack([self._choices(unit, estimate) for unit in self._units(tie)])

    def _point(self, chosen: Mapping[str, int], estimate: Estimate) -> AllocationPoint:
        bits = self.fixed + sum(self.bits[name][number] for name, number in chosen.items())
        return AllocationPoint(bits / self.weights, sum(estimate(name, number) for name, number in chosen.items()))


def find_problem(model: StreamedModel, layers: dict[str, Quantizer], recipe: Recipe) -> Problem | None:
    """None without a budget. layers: those to quantise, as the recipe has them. Raises ConfigError where candidates do
    not fit layers, or all layers are decided already."""
    allocation = recipe.allocation
    if not isinstance(allocation, Budget):
        return None
    linear, dtype = model.linear_layers(), model.checkpoint.dtype
    decided = overridden_layers(model, recipe.layers)
    candidates = {
        name: [fitting(each, linear[name].in_features) for each in allocation.of(quantizer)]
        for name, quantizer in layers.items()
        if name not in decided
    }
    if not candidates:
        raise ConfigError("allocation=budget: layers.overrides decides all layers, so that nothing is left to choose")
    _check(allocation, candidates, {name: linear[name].in_features for name in candidates})

    def stored(name: str, quantizer: Quantizer) -> int:
        return quantizer.storage(linear[name].out_features, linear[name].in_features, dtype).stored_bits

    sizes = {name: linear[name].out_features * linear[name].in_features for name in layers}
    tensors = model.checkpoint.tensors
    plain = sum(tensor.nbytes for tensor in tensors.values()) - sum(
        sizes[name] * DTYPES[tensors[model.stored_name(f"{name}.weight")].dtype].itemsize for name in layers
    )
    if allocation.bits_per_weight is not None:
        budget = int(allocation.bits_per_weight * sum(sizes.values()))
    else:
        assert allocation.size_gb is not None
        budget = int(8 * (allocation.size_gb * 1e9 - plain))
    kernels, experts = _tied(model, list(candidates))
    problem = Problem(
        allocation=allocation,
        layers=layers,
        candidates=candidates,
        bits={name: [stored(name, each) for each in quantizers] for name, quantizers in candidates.items()},
        sizes=sizes,
        kernels=kernels,
        experts=experts,
        fixed=sum(stored(name, quantizer) for name, quantizer in layers.items() if name in decided),
        budget=budget,
        plain=plain,
    )
    _check_exports(problem, model, recipe)
    return problem


def _check_exports(problem: Problem, model: StreamedModel, recipe: Recipe) -> None:
    """Raises ConfigError where a format of the recipe cannot hold one of the candidates: any may be chosen."""
    for number, settings in enumerate(problem.allocation.candidates):
        try:
            export_warnings(recipe, model, problem.with_choice(dict.fromkeys(problem.candidates, number)))
        except ConfigError as error:
            raise ConfigError(renamed(str(error), settings, f"allocation.candidates[{number}]")) from error


def _check(allocation: Budget, candidates: Mapping[str, Sequence[Quantizer]], in_features: Mapping[str, int]) -> None:
    for number, settings in enumerate(allocation.candidates):
        alike: dict[str, list[str]] = {}
        for name, each in candidates.items():
            alike.setdefault(repr(each[number]), []).append(name)
        for names in alike.values():
            try:
                candidates[names[0]][number].check({name: in_features[name] for name in names})
            except ConfigError as error:
                key = f"allocation.candidates[{number}]"
                raise ConfigError(renamed(str(error), settings, key)) from error


def _tied(model: StreamedModel, names: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Of each layer the name of what a runtime runs as one kernel: layers of one module with as many inputs, but for
    the last, which reads what the others have computed; all experts of a block. And of each layer of an expert, that of
    the layers of the same kind in all experts of its block."""
    last: dict[str, str] = {}
    for name in model.linear_layers():
        last[name.rpartition(".")[0]] = name
    linear = model.linear_layers()
    kernels = {
        name: f"{parent} {linear[name].in_features}"
        for name in names
        if name != last[parent := name.rpartition(".")[0]]
    }
    experts = {
        layer.name: f"{model.block_of(layer.name)} {layer.name.rpartition('.')[2]}"
        for unit in model_units(model, set(names))
        for layer in unit
    }
    return {**kernels, **{name: f"experts of {model.block_of(name)}" for name in experts}}, experts
