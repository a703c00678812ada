"""Quantization Error Propagation: what a layer is told of the errors before it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NoQep:
    """Every layer is quantised as it is."""
