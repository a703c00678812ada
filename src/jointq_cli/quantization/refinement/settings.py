"""The config group `refinement`: whether a quantised model is trained on, and how."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from jointq_cli.errors import ConfigError
from jointq_cli.setting_rules import check_settings, setting

SCALES, NORMS, CODES = "scales", "norms", "codes"
FLOATS_OF_A_CODE = 4  # that is trained: value, gradient and Adam's two moments
BYTES_OF_A_CODE = 2  # at the start, and in the best state so far


@dataclass(frozen=True)
class Refinement(ABC):
    """Base of the refinements."""

    @property
    def seeds(self) -> Mapping[str, int]:
        """The seeds of all random choices, by the key of the recipe."""
        return {}

    @abstractmethod
    def describe(self) -> str:
        """One line for reports, "" for none."""


@dataclass(frozen=True)
class NoRefinement(Refinement):
    """The model stays as the solvers leave it."""

    def describe(self) -> str:
        return ""


@dataclass(frozen=True)
class GradientRefinement(Refinement):
    """Base of the refinements by Adam, whose learning rate falls as a half cosine.

    train: what changes, of scales, norms (gains) and codes. scale_lr and norm_lr are relative to the value that is
    trained, code_lr is in steps between codes: Adam moves a value by about its rate in one step. Every
    `validate_every` steps the loss of the windows held out is measured, and the best state is kept. After `patience`
    measurements without a lower one, and after any while none was lower than at the start, training goes back to the
    best state with `backoff` of the rates; it ends there where backoff is 1. generated: windows more, which the
    original model writes as continuations of the calibration's; those held out are among these then, which no solver
    has seen.
    """

    train: list[str] = setting([SCALES, NORMS, CODES], choices=(SCALES, NORMS, CODES))
    steps: int = setting(120, least=1)
    windows_per_step: int = setting(2, least=1)
    scale_lr: float = setting(0.002, above=0, below=1)
    norm_lr: float = setting(0.001, above=0, below=1)
    code_lr: float = setting(0.03, above=0, below=1)
    heldout_share: float = setting(0.125, above=0, below=1)
    generated: int = setting(0, least=0)
    validate_every: int = setting(20, least=1)
    patience: int = setting(3, least=1)
    backoff: float = setting(0.3, above=0, most=1)
    seed: int = setting(0, least=0, most=2**63 - 1)

    def __post_init__(self) -> None:
        check_settings(self, "refinement")
        if not self.train:
            raise ConfigError("refinement.train=[]: leaves nothing to train; use refinement=none")

    def heldout(self, windows: int) -> int:
        """How many are held out, where the calibration has so many windows. Raises ConfigError where none would be
        left to train on."""
        if self.generated:
            return max(1, round(self.heldout_share * self.generated))
        held_out = max(1, round(self.heldout_share * windows))
        if held_out >= windows:
            raise ConfigError(
                f"calibration.num_samples={windows}: refinement.heldout_share={self.heldout_share:g} holds out "
                f"{held_out} of them and leaves none to train on; raise calibration.num_samples"
            )
        return held_out

    def state_bytes(self, codes: int) -> float:
        """Bytes of what is kept of so many codes, beside the weights that the forward pass reads."""
        return codes * (FLOATS_OF_A_CODE * 4 * (CODES in self.train) + BYTES_OF_A_CODE)

    def describe(self) -> str:
        more = f" generated={self.generated}" if self.generated else ""
        steps = f"{self.steps} x {self.windows_per_step} windows"
        return f"{self.scope} {'+'.join(self.train)} {steps}{more} seed={self.seed}"

    @property
    @abstractmethod
    def scope(self) -> str:
        """What is trained at a time: block or model."""

    @property
    def seeds(self) -> Mapping[str, int]:
        return {"refinement.seed": self.seed}


@dataclass(frozen=True)
class BlockRefinement(GradientRefinement):
    """Each block in turn is trained to give the original block's output for what the blocks before it now give, in the
    memory of one block. Tokens count by rms^-2 of that output, as in the next norm."""

    @property
    def scope(self) -> str:
        return "block"


@dataclass(frozen=True)
class ModelRefinement(GradientRefinement):
    """All blocks and the final norm together, for KL(original || refined) of the next token. Needs the complete model
    in memory, and so can have windows generated too."""

    generated: int = setting(64, least=0)

    @property
    def scope(self) -> str:
        return "model"
