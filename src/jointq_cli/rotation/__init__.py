"""Changes of basis that leave the model's function alone and make its tensors easier to quantise."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NoRotation:
    """The model keeps its basis."""
