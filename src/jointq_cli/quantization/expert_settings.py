"""How the experts of a mixture are calibrated."""

from dataclasses import dataclass

from jointq_cli.setting_rules import check_settings, setting

BLOCK_TOKENS_PER_COLUMN = 4  # of the block, that are added to an expert's own
LESS_PER_TOKENS = 16  # own tokens for which one less is added


@dataclass(frozen=True)
class ExpertSettings:
    """The group `experts` of a recipe, which configs/experts/default.yaml explains.

    An expert that receives n calibration tokens has their Hessian H_e; the tokens of its block, whether they are routed
    to it or not, would have H_b when passed through it. With `blend` it is solved for

        (n H_e + m H_b) / (n + m),     m = max(0, 4 in_features - n / 16),

    as if m tokens of the block were added: the mean of an inverse Wishart posterior whose prior has scale H_b and m
    degrees of freedom. That is H_b without any token, and H_e from 64 tokens per column on. H_b is of 4 tokens per
    column at least, or of all. docs/experts.md has what was measured.
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
            return max(0, int(BLOCK_TOKENS_PER_COLUMN * in_features) - tokens // LESS_PER_TOKENS)
        return 0 if tokens else 1

    def at_once(self, in_features: int, matrices: int) -> int:
        """How many experts' moments are collected at the same time; `matrices` (in, in) float64 for each."""
        return int(min(max(1.0, self.memory_gb * 1e9 / self.bytes_each(in_features, matrices)), 2.0**31))

    def bytes_each(self, in_features: int, matrices: int) -> int:
        """Bytes of an expert's moments while they are collected: with `blend`, of its own tokens and of the block's."""
        return 8 * in_features**2 * matrices * (2 if self.calibration == "blend" else 1)


DEFAULT_EXPERTS = ExpertSettings()
