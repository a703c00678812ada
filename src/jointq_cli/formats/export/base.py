"""The contract of an exporter: a frozen dataclass that writes a quantised model in the layout of a runtime."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from jointq_cli.errors import ConfigError
from jointq_cli.formats.base import StoredWeight
from jointq_cli.formats.binary_product import BinaryProduct
from jointq_cli.formats.column_scaled import ColumnScaledWeight
from jointq_cli.formats.k_quant import KQuantWeight
from jointq_cli.formats.turned import TurnedWeight
from jointq_cli.formats.uniform import UniformWeight
from jointq_cli.models.checkpoint import Checkpoint

CHUNK = 1 << 20  # elements compared at a time


@dataclass(frozen=True, eq=False)
class QuantizedModel:
    """A quantised model to export, or one that is yet to be quantised, of which exporters look at the forms only.

    checkpoint: its dequantised form; before it is quantised, the original. forms: by name of a weight in the
    checkpoint, the form of each quantised one, tensors on the meta device but for its `form_tensors`. linear: names in
    the checkpoint of the weights of all linear layers, quantised or not. load: the stored weight of one name in
    `forms`, on the CPU. transposed: those of `linear` that the checkpoint stores as (in, out).
    """

    checkpoint: Checkpoint
    forms: Mapping[str, StoredWeight]
    linear: Sequence[str]
    load: Callable[[str], StoredWeight]
    transposed: Collection[str] = ()

    def load_uniform(self, name: str) -> UniformWeight:
        weight = self.load(name)
        assert isinstance(weight, UniformWeight), f"{name}: {weight.kind}"
        return weight

    @cached_property
    def plain(self) -> list[str]:
        """Names of the tensors that are not quantised."""
        return [name for name in self.checkpoint.tensors if name not in self.forms]


class Exporter(ABC):
    """Writes a quantised model for one runtime. Its fields are the settings of `jointq export` for this format."""

    format: ClassVar[str]
    engine: ClassVar[str]  # which loads it, of those in `evaluation.engines`
    engine_needs: ClassVar[tuple[str, ...]] = ()  # modules of other packages with which the engine reads the format
    engine_kl: ClassVar[float] = 5e-4  # nats per token from float32 that the engine's own rounding may cause
    engine_change: ClassVar[float] = 0.002  # the same of perplexity, relative
    holds_turned: ClassVar[bool] = False  # weights that are stored in another basis of their input (formats.turned)
    tolerance: ClassVar[float] = 0.0  # largest difference between a decoded and a stored weight, in steps of the grid

    @property
    @abstractmethod
    def label(self) -> str:
        """The format and its type, such as "gguf-q4_0": names the directory of the export."""

    @abstractmethod
    def check(self, model: QuantizedModel) -> list[str]:
        """What a user should know of this export: which runtimes do not take it, what it cannot hold.

        Reads no weight. Raises ConfigError, in one line with a way out, where the format cannot hold the model.
        """

    @abstractmethod
    def write(self, model: QuantizedModel, directory: Path) -> None:
        """Writes weights, config and tokenizer into an empty directory, one tensor in memory at a time."""

    @abstractmethod
    def reader(self, model: QuantizedModel, directory: Path) -> Callable[[str], Tensor]:
        """What reads the written files: name of a weight in the checkpoint -> its value, quantised ones in float32.

        Shares no code with `write`, or code that has an oracle of its own: exports are verified by it.
        """

    def plain_tolerance(self, model: QuantizedModel, name: str) -> float:
        """The largest error of a decoded tensor that is not quantised, relative to its largest magnitude."""
        return 0.0

    def engine_reads(self, model: QuantizedModel) -> bool:
        """Whether the engine computes all that the format can hold; `check` says so where it does not."""
        return True

    def stored_bits(self, model: QuantizedModel) -> int:
        """Bits that the quantised weights take in the format."""
        return sum(form.stored_bits for form in model.forms.values())

    def types(self, model: QuantizedModel, directory: Path) -> dict[str, int]:
        """How many of the written tensors have each of the format's types; none where it has no names for them."""
        return {}

    @abstractmethod
    def commands(self, model: QuantizedModel, name: str) -> list[tuple[str, str]]:
        """(runtime, shell command) that serve the export from the directory `name`, for its README."""


def uniform_forms(
    model: QuantizedModel,
    word: str,
    beside: tuple[type[StoredWeight], ...] = (),
    offsets: bool = False,
    turned: bool = False,
) -> dict[str, UniformWeight]:
    """The forms of all quantised weights but those of the kinds `beside`; of turned ones, where the format holds them,
    what has the codes. word: what the user wrote after export=. Raises ConfigError where one is not uniform, and where
    zero-points are no integers unless the format holds `offsets`."""
    found: dict[str, UniformWeight] = {}
    for name, stored in model.forms.items():
        form = stored.inner if turned and isinstance(stored, TurnedWeight) else stored
        if isinstance(form, UniformWeight):
            if form.grid.zero != "integer" and not offsets:
                others = "export=mlx, or " if form.bits > 1 and form is stored else "quantizer=jointq with "
                raise ConfigError(
                    f"export={word}: {name} is stored as {stored.label}, and the format holds integer zero-points "
                    f"alone; {others}quantizer.zero_point=integer"
                )
            found[name] = form
        elif not isinstance(form, beside):
            ways = {
                KQuantWeight.kind: "; export=gguf",
                TurnedWeight.kind: f"; a new run with export={word} (and no incoherence=input), or compressed-tensors",
                BinaryProduct.kind: "; quantizer=jointq, or the run's checkpoint as it is",
                ColumnScaledWeight.kind: "; quantizer=jointq, or the run's checkpoint as it is",
            }
            way_out = ways.get(form.kind, "")
            raise ConfigError(f"export={word}: {name} is stored as {form.label}, which the format cannot hold{way_out}")
    return found


def refuse_permutation(forms: Mapping[str, UniformWeight], word: str) -> None:
    """Raises ConfigError where the columns of a layer are grouped in another order."""
    name = next((name for name, form in forms.items() if form.permutation is not None), None)
    if name is not None:
        raise ConfigError(
            f"export={word}: {name} has its columns grouped in another order (act_order), which the format cannot "
            "hold; quantizer.static_groups=true or quantizer.act_order=false, or export=gptq (which vLLM does not take)"
        )


def refuse_wide_scales(forms: Mapping[str, UniformWeight], word: str) -> None:
    """Raises ConfigError where scales are float32, of which float16 holds but a few."""
    name = next((name for name, form in forms.items() if form.scale.dtype == torch.float32), None)
    if name is not None:
        raise ConfigError(
            f"export={word}: the scales of {name} are float32 as the checkpoint is, and the format stores float16; "
            "quantise a bfloat16 checkpoint, or export=compressed-tensors"
        )


def float16_scales(weight: UniformWeight, name: str, word: str) -> Tensor:
    """The scales in float16, which holds bfloat16 numbers from 2^-17 to 65504 exactly. Raises ConfigError where one
    would be rounded."""
    rounded = weight.scale.to(torch.float16)
    if count := int((rounded.double() != weight.scale.double()).sum()):
        raise ConfigError(
            f"export={word}: {count} scales of {name} are out of float16's range; export=compressed-tensors"
        )
    return rounded


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest magnitude of `expected`."""
    if found.shape != expected.shape:
        return torch.inf
    if found.dtype == expected.dtype and torch.equal(found, expected):  # of two dtypes it would copy one
        return 0.0
    # Some at a time: an embedding matrix in float64 would set the peak of memory.
    pairs = zip(found.flatten().split(CHUNK), expected.flatten().split(CHUNK), strict=True)
    differences, sizes = zip(
        *(((one.double() - two.double()).abs().max(), two.abs().max()) for one, two in pairs), strict=True
    )
    difference, largest = torch.stack(differences).max(), torch.stack(sizes).max().double()
    if not difference:  # of two dtypes, and maybe zeros alone: biases that were never trained
        return 0.0
    return float(difference / largest) if largest else torch.inf
