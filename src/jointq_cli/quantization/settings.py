"""What is done to every block, as one value. Knows neither how nor in which order."""

from dataclasses import dataclass

from jointq_cli.data.token_weights import TokenWeights
from jointq_cli.errors import ConfigError
from jointq_cli.quantization.qep import QepSettings
from jointq_cli.quantization.quantizers.base import Quantizer


@dataclass(frozen=True)
class LoopSettings:
    """What the loop does to every block."""

    quantizer: Quantizer
    qep: QepSettings
    layers: frozenset[str]  # full names of the linear layers to quantise
    inputs: str  # "original" | "quantized": whose activations a layer is solved for
    weights: TokenWeights  # of the calibration tokens in the statistics
    batch: int  # windows per forward pass
    waiting: float  # bytes of activations that may wait in stopped forward passes

    @property
    def heldout(self) -> float:
        """The share of the windows that somebody wants to see apart."""
        return max(self.quantizer.heldout, self.qep.heldout)

    @property
    def follows_residual(self) -> bool:
        """Whether anybody asks what is in the residual stream."""
        return self.qep.follows_residual or self.weights.of_residual

    @property
    def ahead(self) -> bool:
        """Whether the moments of every input are those of the original model, so that no quantizer changes them."""
        return self.inputs == "original" and not any(map(self.qep.corrects, self.layers))

    def held_from(self, batches: int) -> int:
        """The first of the batches that are held out, and some must be left to solve with; their number if none is."""
        share = self.heldout
        return batches - min(max(1, round(share * batches)), batches - 1) if share else batches

    def check(self, windows: int) -> None:
        """Raises ConfigError where quantizer, qep and so many windows do not go together."""
        self.qep.check_inputs(self.inputs)
        if self.heldout and windows <= self.batch:
            raise ConfigError(
                f"calibration.num_samples={windows}: must be more than the {self.batch} windows of one forward pass, "
                "for whole passes are held out; lower runtime.batch_tokens"
            )
        if self.quantizer.heldout and self.qep.heldout and self.quantizer.heldout != self.qep.heldout:
            raise ConfigError(
                f"qep.heldout_share={self.qep.heldout:g}: must be the quantizer's {self.quantizer.heldout:g}, "
                "since both hold out the same tokens"
            )
