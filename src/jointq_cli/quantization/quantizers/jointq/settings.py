"""What is asked of JointQ: its settings, lambda, and the words that describe them."""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Self

from torch import Tensor

from jointq_cli.errors import ConfigError
from jointq_cli.quantization.quantizers.jointq.metric import penalty
from jointq_cli.quantization.quantizers.uniform import INCOHERENCE, UniformQuantizer, is_uniform
from jointq_cli.setting_rules import changed, check_settings, setting, shown

LAMBDA = 0.3  # where nothing is corrected
NOISE = 5.0  # lambda with QEP, for one calibration token per column


@dataclass(frozen=True)
class GptqStart:
    """Settings of GPTQ as a start of the search; bits, groups and symmetry are JointQ's."""

    mse: bool = setting(True)
    damping: float = setting(0.01, least=0)
    block_size: int = setting(128, least=1)


def _tries_lambdas(jointq: "JointQSettings") -> bool:
    return jointq.lambda_mode != "fixed_lambda"


def _is_incremental(jointq: "JointQSettings") -> bool:
    return jointq.lambda_mode == "incremental_lambda"


def _is_diagonal(jointq: "JointQSettings") -> bool:
    return jointq.regularization_mode == "diagonal"


def _iterates(jointq: "JointQSettings") -> bool:
    return jointq.ils_enabled


@dataclass(frozen=True)
class JointQSettings(UniformQuantizer):
    """configs/quantizer/jointq.yaml says what each field does."""

    act_order: bool = setting(False)
    lambda_mode: str = setting("fixed_lambda", choices=("fixed_lambda", "incremental_lambda", "heldout"))
    regularization_lambda: float | None = setting(None, least=0, null="for one that follows from the tokens")
    regularization_mode: str = setting("diagonal", choices=("identity", "diagonal"))
    regularization_gamma: float = setting(1.0, least=0, used=_is_diagonal)
    regularization_floor: float = setting(0.1, least=0, used=_is_diagonal)
    regularization_reference: str = setting("mean_diagonal", choices=("absolute", "mean_diagonal"))
    lambda_list: list[float] = setting([0.001, 0.01, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5], least=0, used=_tries_lambdas)
    incremental_eps_y: float = setting(0.03, least=0, used=_is_incremental)
    incremental_eps_w: float = setting(0.1, least=0, used=_is_incremental)
    incremental_initial_skip_ew_threshold: float | None = setting(0.3, least=0, null="for never", used=_is_incremental)
    heldout_share: float = setting(0.25, above=0, below=1, used=lambda jointq: jointq.lambda_mode == "heldout")
    enable_schur: bool = setting(True)
    enable_clip_optimize: bool = setting(False)
    enable_clip_optimize_ep: bool = setting(False)
    enable_gptq: bool = setting(False)
    gptq: GptqStart = setting(GptqStart(), used=lambda jointq: jointq.enable_gptq)
    max_sweeps: int = setting(3, least=0)
    annealing_sweeps: int = setting(0, least=0)
    annealing_temperature: float = setting(
        0.15, least=0, used=lambda jointq: jointq.annealing_sweeps > 0 or jointq.ils_enabled
    )
    ils_enabled: bool = setting(False)
    ils_num_iterations: int = setting(10, least=1, used=_iterates)
    ils_num_clones: int = setting(8, least=1, used=_iterates)
    ils_num_channels: int | None = setting(None, least=1, null="for all", used=_iterates)
    batch_size: int | None = setting(None, least=1, null="to choose it by device")
    on_failure: str = setting("error", choices=("error", "rtn"))
    _: KW_ONLY
    incoherence: str = setting("auto", choices=INCOHERENCE, used=is_uniform)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self.gptq, "quantizer.gptq")
        for complaint in self._complaints():
            raise ConfigError(f"quantizer.{complaint}")

    def _complaints(self) -> Iterator[str]:
        """What is wrong with settings in combination, by key."""
        if self.lambda_mode != "fixed_lambda" and not self.lambda_list:
            yield f"lambda_list=[]: lambda_mode={self.lambda_mode} needs at least one value"
        if self.lambda_mode != "fixed_lambda" and self.lambda_list != sorted(set(self.lambda_list)):
            yield f"lambda_list={self.lambda_list}: must rise from value to value"
        if self.lambda_mode == "incremental_lambda" and self.regularization_mode == "diagonal":
            yield "regularization_mode=diagonal: lambda_mode=incremental_lambda works with identity only"
        if not any((self.enable_schur, self.enable_clip_optimize, self.enable_clip_optimize_ep, self.enable_gptq)):
            yield (
                "enable_schur=false: one start is needed, of enable_schur, enable_clip_optimize, "
                "enable_clip_optimize_ep and enable_gptq"
            )
        if self.is_turned and self.lambda_mode != "fixed_lambda":
            yield f"lambda_mode={self.lambda_mode}: incoherence=input works with fixed_lambda only"
        if self.ils_enabled and self.max_sweeps == 0:
            yield "max_sweeps=0: ils_enabled=true needs at least 1, for it searches from where a search ended"
        uniform_only = (
            "act_order",
            "enable_clip_optimize",
            "enable_clip_optimize_ep",
            "enable_gptq",
            "annealing_sweeps",
            "ils_enabled",
        )
        for name in uniform_only:
            if self.grid and getattr(self, name):
                yield f"grid={self.grid}: does not go with {name}={shown(getattr(self, name))}"
        if (self.ils_enabled or self.annealing_sweeps) and self.annealing_temperature == 0:
            yield "annealing_temperature=0: must be above 0 where ils_enabled or annealing_sweeps ask for random steps"

    @property
    def turnable(self) -> bool:
        return super().turnable and self.lambda_mode == "fixed_lambda"

    @property
    def strength(self) -> float:
        """Lambda, where it is fixed."""
        return LAMBDA if self.regularization_lambda is None else self.regularization_lambda

    def for_corrected(self, in_features: int, tokens: int) -> Self:
        """Lambda against what the correction fits by chance: the more, the fewer tokens there are for each column.
        docs/jointq.md has the measurements."""
        if self.regularization_lambda is not None:
            return self
        return replace(self, regularization_lambda=NOISE * in_features / max(1, tokens))

    @property
    def heldout(self) -> float:
        return self.heldout_share if self.lambda_mode == "heldout" else 0.0

    def penalty(self, hessian: Tensor, strength: float) -> Tensor:
        return penalty(
            hessian,
            strength,
            self.regularization_mode,
            self.regularization_gamma,
            self.regularization_floor,
            self.regularization_reference,
        )

    def ridge(self, hessian: Tensor) -> Tensor | None:
        return self.penalty(hessian, self.strength) if self.lambda_mode == "fixed_lambda" else None

    @property
    def row_separable(self) -> bool:
        # Otherwise lambda or the worst rows are chosen over all rows of a layer, or random steps depend on the tile.
        return self.lambda_mode == "fixed_lambda" and not self.ils_enabled and not self.annealing_sweeps

    def _describe_options(self) -> list[str]:
        """Lambda or how it is chosen, and all else that differs from the defaults."""
        fixed = "auto" if self.regularization_lambda is None else f"{self.regularization_lambda:g}"
        strength = f"lambda={fixed}" if self.lambda_mode == "fixed_lambda" else self.lambda_mode
        stated = (
            "bits",
            "group_size",
            "symmetric",
            "zero_point",
            "incoherence",
            "incoherence_block",
            "grid",
            "regularization_lambda",
            "lambda_mode",
        )
        return [strength, *(_option(name, value) for name, value in changed(self).items() if name not in stated)]


def _option(name: str, value: Any) -> str:
    """Such as act_order, no-schur, max_sweeps=5."""
    if isinstance(value, bool):
        return f"{'' if value else 'no-'}{name.removeprefix('enable_').removesuffix('_enabled')}"
    if isinstance(value, GptqStart):
        return " ".join(_option(f"{name}.{part}", item) for part, item in changed(value).items())
    return f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
