"""Objectives that rotations are learned by: losses of rotated activations that are small where few bits suffice.

Rows are (tokens, channels) of RMS 1; every loss is a scalar, the mean over tokens.
"""

from collections.abc import Callable

from torch import Tensor


def whip(rows: Tensor) -> Tensor:
    """Sum over channels of exp(-|x|) (DartQuant, arXiv 2511.04063, eq. 5).

    It pushes values away from zero, and at a fixed RMS therefore shrinks the largest. At RMS 1 its minimum is a
    two-point distribution, not the uniform one.
    """
    return rows.abs().neg().exp().sum(dim=-1).mean()


def l8(rows: Tensor) -> Tensor:
    """|x|_8^2: a smooth approximation of the largest magnitude, squared as a quantisation error is."""
    return rows.square().square().square().sum(dim=-1).pow(0.25).mean()


def range2(rows: Tensor) -> Tensor:
    """(max - min)^2: the squared error of an asymmetric grid per token is proportional to it."""
    return (rows.amax(dim=-1) - rows.amin(dim=-1)).square().mean()


OBJECTIVES: dict[str, Callable[[Tensor], Tensor]] = {"whip": whip, "l8": l8, "range2": range2}
