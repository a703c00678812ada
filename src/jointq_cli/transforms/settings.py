"""The config groups `rotation` and `smoothing`: which transform, and with which parameters."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jointq_cli.errors import ConfigError
from jointq_cli.setting_rules import check_settings, setting

INITS = ("random_hadamard", "hadamard", "orthogonal", "identity", "dc_aligned")
OBJECTIVES = ("whip", "l8", "range2")
PARAMETRIZATIONS = ("lie", "qr_orth")
SAMPLED_TOKENS = 512  # per site, where a rotation does not say


@dataclass(frozen=True)
class LearningCost:
    """What learning a rotation costs."""

    operations: float = 0.0  # in float32
    elements: float = 0.0  # of the activations that are in memory at the same time


@dataclass(frozen=True)
class Rotation(ABC):
    """Base of the rotations: changes of basis of the residual stream (R1), of each KV head's values (R2) and, online,
    of the inputs of down_proj (R4)."""

    @property
    @abstractmethod
    def parts(self) -> list[str]:
        """The rotations that it has, of R1, R2 and R4."""

    @property
    def sampled_tokens(self) -> int:
        """Tokens per site whose activations are sampled, to learn from and to measure with."""
        return SAMPLED_TOKENS

    @property
    def seeds(self) -> dict[str, int]:
        """The seeds of all random choices, by the key of the recipe."""
        return {}

    def learning_cost(self, hidden: int, heads: int, blocks: int, tokens: int) -> LearningCost:
        """What learning costs for a model of these sizes; tokens: those of calibration."""
        return LearningCost()

    @abstractmethod
    def describe(self) -> str:
        """One line for reports, "" for none."""


@dataclass(frozen=True)
class NoRotation(Rotation):
    """The model keeps its basis."""

    @property
    def parts(self) -> list[str]:
        return []

    def describe(self) -> str:
        return ""


@dataclass(frozen=True)
class SeededRotation(Rotation):
    """Base of the rotations that consist of chosen parts and begin at random."""

    r1: bool = setting(True)
    r2: bool = setting(True)
    r4: bool = setting(False)
    seed: int = setting(0, least=0, most=2**63 - 1)

    def __post_init__(self) -> None:
        check_settings(self, "rotation")
        if not self.parts:
            raise ConfigError("rotation.r1=false: with r2=false and r4=false nothing is rotated; use rotation=none")

    @property
    def parts(self) -> list[str]:
        return [part for part in ("R1", "R2", "R4") if getattr(self, part.lower())]

    @property
    def seeds(self) -> dict[str, int]:
        return {"rotation.seed": self.seed}


@dataclass(frozen=True)
class HadamardRotation(SeededRotation):
    """Hadamard matrices with random signs on their inputs (QuaRot, arXiv 2404.00456): nothing is learned."""

    def describe(self) -> str:
        return f"{'+'.join(self.parts)} random Hadamard seed={self.seed}"


@dataclass(frozen=True)
class LearnedRotation(SeededRotation):
    """R1 (one for the model) and R2 (one per KV head) minimise an objective of the rotated activations; R4 is fixed.

    objective: a mean over tokens of RMS 1, see `objectives`. parametrization: how a step stays orthogonal, see
    `optimizers`. An epoch is one pass over the sampled tokens of all sites, `batch_tokens` of them per step; `cos_lr`
    is a cosine schedule of the learning rate. With `early_stop` the rotation with the least quantisation error of
    held-out tokens at `stop_bits` is kept, and learning ends when that error stops falling.
    """

    init: str = setting("random_hadamard", choices=INITS)
    objective: str = setting("range2", choices=OBJECTIVES)
    parametrization: str = setting("lie", choices=PARAMETRIZATIONS)
    r1_lr: float = setting(0.003, above=0)
    r1_epochs: int = setting(20, least=1)
    r2_lr: float = setting(0.01, above=0)
    r2_epochs: int = setting(100, least=1)
    cos_lr: bool = setting(True)
    momentum: float = setting(0.9, least=0, below=1)
    batch_tokens: int = setting(1024, least=1)
    reservoir_tokens: int = setting(SAMPLED_TOKENS, least=16)
    early_stop: bool = setting(True)
    stop_bits: int = setting(4, least=2, most=4)  # on finer grids the clip ratio of the error measure would decide

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.r1 or self.r2):
            raise ConfigError("rotation.r1=false: with r2=false nothing is learned; use rotation=hadamard")

    @property
    def sampled_tokens(self) -> int:
        return self.reservoir_tokens

    def learning_cost(self, hidden: int, heads: int, blocks: int, tokens: int) -> LearningCost:
        """The constants were fitted to measured runs (docs/plan.md)."""
        tokens = min(self.reservoir_tokens, tokens)
        kept = 2 * blocks * tokens
        steps = self.r1_epochs * max(1, kept // self.batch_tokens)
        step = 6 * self.batch_tokens * hidden**2 + 30 * hidden**3
        validation = kept / 8 * (2 * hidden**2) / 10
        width = hidden / heads
        per_head = self.r2_epochs * blocks * (6 * tokens * hidden * width + 30 * hidden * width**2)
        return LearningCost(
            operations=self.r1 * steps * (step + validation) + self.r2 * per_head, elements=self.r1 * 3 * kept * hidden
        )

    def describe(self) -> str:
        how = f"{self.objective} {self.parametrization} from {self.init} seed={self.seed}"
        learned = "+".join(part for part in self.parts if part != "R4")
        return f"{learned} learned {how}{' + R4 Hadamard' if self.r4 else ''}"


@dataclass(frozen=True)
class Smoothing(ABC):
    """Base of the smoothings: scales per channel, moved from activations into weights."""

    @property
    @abstractmethod
    def places(self) -> list[str]:
        """The layers whose inputs are smoothed: o_proj, down_proj."""

    @abstractmethod
    def describe(self) -> str:
        """One line for reports, "" for none."""


@dataclass(frozen=True)
class NoSmoothing(Smoothing):
    """Channels keep their scales."""

    @property
    def places(self) -> list[str]:
        return []

    def describe(self) -> str:
        return ""


@dataclass(frozen=True)
class SmoothQuant(Smoothing):
    """s = max|x|^alpha / max|w|^(1 - alpha) per channel (SmoothQuant, arXiv 2211.10438, eq. 4) for the inputs of
    `o_proj` and `down_proj`; the layers that produce them are divided by s. Outputs of norms are left to R1."""

    alpha: float = setting(0.5, least=0, most=1)
    o_proj: bool = setting(True)
    down_proj: bool = setting(True)

    def __post_init__(self) -> None:
        check_settings(self, "smoothing")
        if not (self.o_proj or self.down_proj):
            raise ConfigError("smoothing.down_proj=false: with o_proj=false nothing is left; use smoothing=none")

    @property
    def places(self) -> list[str]:
        return [name for name in ("o_proj", "down_proj") if getattr(self, name)]

    def describe(self) -> str:
        return f"SmoothQuant alpha={self.alpha:g} {'+'.join(self.places)}"


def changes_basis(rotation: Rotation, smoothing: Smoothing) -> bool:
    """Whether the two change anything at all."""
    return bool(rotation.parts or smoothing.places)
