"""Changes of basis, rotation and smoothing: they keep the function of a model and make its tensors easier to quantise.

Quantisation itself has no place here; `stages` decides when a transform runs and where its result is stored.
"""

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
