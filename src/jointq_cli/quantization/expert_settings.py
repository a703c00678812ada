"""How the experts of a mixture are calibrated."""

from dataclasses import dataclass

from jointq_cli.setting_rules import check_settings, setting


@dataclass(frozen=True)
class ExpertSettings:
    """The group `experts` of a recipe, which configs/experts/default.yaml explains.

    An expert that receives n of the N calibration tokens of its block has the Hessian H_e of these n tokens; all N
    tokens passed through it would have H_b. With `blend` it is solved for

        (n H_e + m H_b) / (n + m),     m = max(0, in_features - n),

    as if tokens of the block were added until there are as many as columns: the mean of an inverse Wishart posterior
    whose prior has scale H_b and m degrees of freedom. From in_features tokens on that is H_e, without any token H_b.
    """

    calibration: str = setting("blend", choices=("routed", "all", "blend"))
    routing: str = setting("original", choices=("original", "own"))
    warn_below: int = setting(128, least=0, decides=False)
    memory_gb: float = setting(4.0, least=0, infinite=True, decides=False)

    def __post_init__(self) -> None:
        check_settings(self, "experts")

    def tokens_of_block(self, tokens: int, in_features: int) -> int:
        """How many tokens of the block (m) are added to an expert's own for a layer of so many columns."""
        if self.calibration == "blend":
            return max(0, in_features - tokens)
        return 0 if tokens else 1

    def at_once(self, in_features: int, matrices: int) -> int:
        """How many experts' moments are collected at the same time; `matrices` (in, in) float64 for each."""
        return int(min(max(1.0, self.memory_gb * 1e9 / self.bytes_each(in_features, matrices)), 2.0**31))

    def bytes_each(self, in_features: int, matrices: int) -> int:
        """Bytes of an expert's moments while they are collected: with `blend`, of its own tokens and of the block's."""
        return 8 * in_features**2 * matrices * (2 if self.calibration == "blend" else 1)


DEFAULT_EXPERTS = ExpertSettings()
