"""What is done to every block, as one value."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jointq_cli.data.token_weights import TokenWeights
from jointq_cli.errors import ConfigError
from jointq_cli.quantization.curvature import NO_CURVATURE, Curvature, Kfac
from jointq_cli.quantization.expert_settings import DEFAULT_EXPERTS, ExpertSettings
from jointq_cli.quantization.hidden_states import WeightSet
from jointq_cli.quantization.qep import QepSettings
from jointq_cli.quantization.quantizers.base import Quantizer


@dataclass(frozen=True)
class LoopSettings:
    """What is done to every block. Raises ConfigError where quantizer, qep and number of windows do not go together."""

    quantizer: Quantizer  # of most layers
    qep: QepSettings
    layers: frozenset[str]  # full names of the linear layers to quantise
    inputs: str  # "original" or "quantized": the model whose activations a layer is solved for
    weights: TokenWeights  # of the calibration tokens in the statistics
    windows: int  # of calibration tokens
    batch: int  # windows per forward pass
    suspended_bytes: float  # of activations that suspended forward passes may hold
    own: Mapping[str, Quantizer] = field(default_factory=dict)  # of layers with other settings, by full name
    experts: ExpertSettings = DEFAULT_EXPERTS
    curvature: Curvature = NO_CURVATURE
    precision: str | None = None  # of the products in the statistics, see Accumulator

    def __post_init__(self) -> None:
        self.qep.check_inputs(self.inputs)
        if self.heldout and self.windows <= self.batch:
            raise ConfigError(
                f"calibration.num_samples={self.windows}: must be more than the {self.batch} windows of one forward "
                "pass, because complete passes are held out; lower runtime.batch_tokens"
            )
        if isinstance(self.curvature, Kfac):
            self.curvature.check_quantizers([self.quantizer, *self.own.values()])
        shares = self._heldout_shares
        if self.qep.heldout and len(shares) > 1:
            other = max(shares - {self.qep.heldout})
            raise ConfigError(
                f"qep.heldout_share={self.qep.heldout:g}: must be the quantizer's {other:g}, since both hold out the "
                "same tokens"
            )
        if len(shares) > 1:
            listed = " and ".join(f"{share:g}" for share in sorted(shares))
            raise ConfigError(f"layers.overrides: heldout_share={listed}; all layers hold out the same tokens")

    def quantizer_for(self, layer: str) -> Quantizer:
        """The quantizer of the layer of this full name."""
        return self.own.get(layer, self.quantizer)

    @property
    def heldout(self) -> float:
        """The share of the windows whose statistics are also collected separately; 0: none."""
        return max(self._heldout_shares, default=0.0)

    @property
    def _heldout_shares(self) -> set[float]:
        """All that are asked for; valid settings ask for one at most."""
        quantizers = (self.quantizer, *self.own.values())
        return {share for share in (self.qep.heldout, *(each.heldout for each in quantizers)) if share}

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
    def precision_spec(self) -> dict[str, str]:
        """For keys of the store: nothing with float32."""
        return {"precision": self.precision} if self.precision else {}

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
