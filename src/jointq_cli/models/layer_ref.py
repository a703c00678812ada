"""What a model can have quantised: matrices (out, in), however its modules hold them."""

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class LayerRef:
    """A linear layer: an nn.Linear, or a Conv1D (GPT-2), which holds and stores its weight as (in, out).

    name: full name of the module. Weights are (out, in) everywhere but in the module and in checkpoints.
    """

    name: str
    module: nn.Module

    @property
    def weight_name(self) -> str:
        return f"{self.name}.weight"

    @property
    def is_transposed(self) -> bool:
        return not isinstance(self.module, nn.Linear)

    @property
    def out_features(self) -> int:
        return self.module.nf if self.is_transposed else self.module.out_features  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        return self.module.nx if self.is_transposed else self.module.in_features  # type: ignore[return-value]

    def turned(self, weight: Tensor) -> Tensor:
        """From the module's orientation to (out, in), and back; contiguous."""
        return weight.T.contiguous() if self.is_transposed else weight


def layer_refs(module: nn.Module, prefix: str = "") -> dict[str, LayerRef]:
    """The linear layers inside a module by full name, in its order. prefix: of the names, such as "model.layers.3."."""
    from transformers.pytorch_utils import Conv1D  # transformers takes more than a second to import

    found = ((prefix + name, part) for name, part in module.named_modules())
    return {name: LayerRef(name, part) for name, part in found if isinstance(part, nn.Linear | Conv1D)}
