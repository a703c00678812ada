"""Changes of basis that leave the model's function alone and make its tensors easier to quantise."""

from jointq_cli.transforms.settings import (
    HadamardRotation,
    LearnedRotation,
    NoRotation,
    NoSmoothing,
    Rotation,
    Smoothing,
    SmoothQuant,
    changes_basis,
)

__all__ = [
    "HadamardRotation",
    "LearnedRotation",
    "NoRotation",
    "NoSmoothing",
    "Rotation",
    "SmoothQuant",
    "Smoothing",
    "changes_basis",
]
