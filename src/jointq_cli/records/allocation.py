"""How a budget of bits was distributed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AllocationPoint:
    """A size, in bits per weight of the layers to quantise, and the loss that is predicted for it: KL divergence, nats
    per token."""

    bits_per_weight: float
    loss: float


@dataclass(frozen=True)
class AllocationRecord:
    """How a budget of bits was distributed over layers. Losses are predictions: what each layer alone does, added up,
    on the calibration tokens and the inputs of the original model."""

    allocation: str  # a line such as "bits_per_weight=3.15 of {bits: 2}, {bits: 3} by kfac"
    chosen: AllocationPoint
    candidates: list[str]  # in words, such as "{bits: 2}"
    uniform: list[AllocationPoint]  # each candidate in all layers
    curve: list[AllocationPoint]  # the least loss over the size
    other_tie: AllocationPoint | None  # chosen with the other setting of tie; None where nothing is tied by it
    layers: dict[str, int]  # the number of the candidate of each layer, but those that layers.overrides decides
