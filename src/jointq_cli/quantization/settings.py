"""What is done to every block, as one value."""

from dataclasses import dataclass

from jointq_cli.data.token_weights import TokenWeights
from jointq_cli.errors import ConfigError
from jointq_cli.quantization.expert_settings import DEFAULT_EXPERTS, ExpertSettings
from jointq_cli.quantization.hidden_states import WeightSet
from jointq_cli.quantization.qep import QepSettings
from jointq_cli.quantization.quantizers.base import Quantizer


@dataclass(frozen=True)
class LoopSettings:
    """What is done to every block. Raises ConfigError where quantizer, qep and number of windows do not go together."""

    quantizer: Quantizer
    qep: QepSettings
    layers: frozenset[str]  # full names of the linear layers to quantise
    inputs: str  # "original" or "quantized": the model whose activations a layer is solved for
    weights: TokenWeights  # of the calibration tokens in the statistics
    windows: int  # of calibration tokens
    batch: int  # windows per forward pass
    suspended_bytes: float  # of activations that suspended forward passes may hold
    experts: ExpertSettings = DEFAULT_EXPERTS

    def __post_init__(self) -> None:
        self.qep.check_inputs(self.inputs)
        if self.heldout and self.windows <= self.batch:
            raise ConfigError(
                f"calibration.num_samples={self.windows}: must be more than the {self.batch} windows of one forward "
                "pass, because complete passes are held out; lower runtime.batch_tokens"
            )
        if self.quantizer.heldout and self.qep.heldout and self.quantizer.heldout != self.qep.heldout:
            raise ConfigError(
                f"qep.heldout_share={self.qep.heldout:g}: must be the quantizer's {self.quantizer.heldout:g}, "
                "since both hold out the same tokens"
            )

    def quantizer_for(self, layer: str) -> Quantizer:
        """The quantizer of the layer of this full name."""
        return self.quantizer

    @property
    def heldout(self) -> float:
        """The share of the windows whose statistics are also collected separately; 0: none."""
        return max(self.quantizer.heldout, self.qep.heldout)

    @property
    def corrects(self) -> bool:
        """Whether QEP corrects any layer."""
        return any(map(self.qep.corrects, self.layers))

    @property
    def follows_original(self) -> bool:
        """Whether experts receive the tokens that the original model's router sends them, in both models."""
        return self.corrects and self.experts.routing == "original"

    @property
    def needs_residual(self) -> bool:
        """Whether the statistics depend on the residual stream inside a block."""
        return self.qep.needs_drift or self.weights.of_residual

    @property
    def hessians_cacheable(self) -> bool:
        """Whether every Hessian is that of the original model, which no quantizer changes."""
        return self.inputs == "original" and not self.corrects

    @property
    def solved_for(self) -> WeightSet:
        """The weights that compute the inputs that a layer is solved for."""
        return "original" if self.inputs == "original" else "quantized"

    @property
    def batches(self) -> int:
        """Forward passes over all windows."""
        return -(-self.windows // self.batch)

    @property
    def heldout_from(self) -> int:
        """The first held-out batch, `batches` if none is. At least one is held out, and at least one is not."""
        if not self.heldout:
            return self.batches
        return self.batches - min(max(1, round(self.heldout * self.batches)), self.batches - 1)
