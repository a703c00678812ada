"""Activations quantised per token: the config group `activations`, and the arithmetic on tensors.

`activation_quantization` reaches the activations of a model.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from jointq_cli.errors import ConfigError
from jointq_cli.formats.uniform import Grid
from jointq_cli.setting_rules import check_settings, setting

UNQUANTIZED = 16  # bits from which on a tensor is not quantised
CLIP_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)  # candidates of a search
SEARCH_TOKENS = 512  # enough for one ratio per layer


@dataclass(frozen=True)
class Activations:
    """Which activations are quantised, and how: see configs/activations/a4.yaml for what each field does."""

    bits: int = setting(UNQUANTIZED, least=4, most=UNQUANTIZED)
    symmetric: bool = setting(False)
    clip_ratio: float | None = setting(1.0, above=0, most=1, null="for a search")
    layer_bits: dict[str, int] = setting({}, least=4, most=UNQUANTIZED)
    kv_bits: int = setting(UNQUANTIZED, least=2, most=UNQUANTIZED)
    r3: bool = setting(False)

    def __post_init__(self) -> None:
        check_settings(self, "activations")

    @property
    def simulates(self) -> bool:
        """Whether anything is quantised."""
        return self._quantizes_inputs or self.kv_bits < UNQUANTIZED

    @property
    def _quantizes_inputs(self) -> bool:
        return min([self.bits, *self.layer_bits.values()]) < UNQUANTIZED

    def bits_of(self, layer_name: str) -> int:
        """The bits of a layer's input: the longest key of `layer_bits` that its full name ends with decides."""
        keys = [key for key in self.layer_bits if _ends_with(layer_name, key)]
        return self.layer_bits[max(keys, key=len)] if keys else self.bits

    def describe(self) -> str:
        """A few words for reports, "" where nothing is quantised."""
        words = []
        if self._quantizes_inputs:
            clip = "searched" if self.clip_ratio is None else f"{self.clip_ratio:g}"
            words += [f"A{self.bits}", "symmetric" if self.symmetric else "asymmetric", "per token", f"clip={clip}"]
            words += [f"{key}=A{bits}" for key, bits in self.layer_bits.items()]
        if self.kv_bits < UNQUANTIZED:
            words += [f"KV{self.kv_bits}", *(["R3"] if self.r3 else [])]
        return " ".join(words)

    def check_layers(self, names: Iterable[str]) -> None:
        """Raises ConfigError for a key of `layer_bits` that names none of these layers; names: all linear layers of the
        blocks."""
        names = list(names)
        for key, bits in self.layer_bits.items():
            if not any(_ends_with(name, key) for name in names):
                raise ConfigError(
                    f"activations.layer_bits.{key}={bits}: must name one of the {len(names)} linear layers of the "
                    "model's blocks, by its last parts"
                )


def quantize_tokens(x: Tensor, bits: int, symmetric: bool, clip_ratio: float) -> Tensor:
    """`x` (..., features), each token (...) quantised to 2^bits levels and dequantised; same shape and dtype.

    A token's grid spans `clip_ratio` of its range extended to zero (asymmetric, as in QuaRot and DartQuant), or of its
    largest absolute value in both directions (symmetric). From UNQUANTIZED bits on the result is `x` itself.
    """
    if bits >= UNQUANTIZED:
        return x
    grid = Grid(bits, symmetric)
    values = x.float()  # bfloat16 cannot represent the codes of 9 bits
    low, high = torch.aminmax(values, dim=-1, keepdim=True)
    low, high = clip_ratio * low.clamp(max=0), clip_ratio * high.clamp(min=0)
    scale = _symmetric_scale(low, high, grid) if symmetric else grid.covering_scale(low, high)
    zero_point = grid.zero_point(low, scale)
    codes = torch.round(values / scale).add_(zero_point).clamp_(grid.lowest, grid.highest)
    return codes.sub_(zero_point).mul_(scale).to(x.dtype)


def _symmetric_scale(low: Tensor, high: Tensor, grid: Grid) -> Tensor:
    # Unlike the grid of weights, which may cut off half a step: published results for activations use this scale.
    scale = torch.maximum(high, -low) / grid.highest
    return torch.where(scale == 0, 1.0, scale)


def best_clip(x: Tensor, bits: int, symmetric: bool) -> float:
    """The ratio of CLIP_RATIOS with the least squared error over the tokens of `x` (..., features).

    Measured on about SEARCH_TOKENS tokens at equal distances, where there are more.
    """
    flat = x.reshape(-1, x.shape[-1])
    tokens = flat[:: max(1, len(flat) // SEARCH_TOKENS)].float()

    def error(ratio: float) -> float:
        difference = quantize_tokens(tokens, bits, symmetric, ratio) - tokens
        return difference.square().sum(dtype=torch.float64).item()

    return min(CLIP_RATIOS, key=error)


def kv_clip_ratio(bits: int) -> float:
    """QuaRot's 0.95 (arXiv 2404.00456) for up to 4 bits; with finer steps clipping costs more than it gains."""
    return 0.95 if bits <= 4 else 1.0


def _ends_with(layer_name: str, key: str) -> bool:
    return layer_name == key or layer_name.endswith(f".{key}")
