"""Whether the evaluation text occurs in the calibration text: a perplexity on text that was used is too good."""

import torch
from torch import Tensor

NGRAM = 32  # tokens: longer than what two texts share by chance
_BASE = 6364136223846793005  # odd, of a linear congruential generator (Knuth, MMIX)


def windows_in(calibration: Tensor, windows: Tensor) -> Tensor:
    """The share of each window's n-grams of `NGRAM` tokens that occur in the calibration windows: (windows,) float32.

    calibration: (windows, tokens), windows: (windows, tokens), int64. Shorter windows have none. N-grams are compared
    by 64-bit polynomial hashes, computed modulo 2^64.
    """
    if min(calibration.shape[1], windows.shape[1]) < NGRAM:
        return torch.zeros(len(windows))
    return torch.isin(_hashes(windows), _hashes(calibration).unique()).float().mean(dim=1)


def _hashes(windows: Tensor) -> Tensor:
    """(windows, tokens) -> (windows, tokens - NGRAM + 1) int64, one hash per n-gram."""
    length = windows.shape[1] - NGRAM + 1
    hashes = torch.zeros(len(windows), length, dtype=torch.int64)
    for offset in range(NGRAM):
        hashes = hashes * _BASE + windows[:, offset : offset + length]
    return hashes
