"""Text that calibration and evaluation share."""

import torch

from jointq_cli.data.overlap import NGRAM, windows_in


def test_the_share_is_that_of_the_ngrams_that_occur_in_calibration() -> None:
    torch.manual_seed(0)
    calibration = torch.randint(0, 1000, (4, 128))
    windows = torch.randint(0, 1000, (3, 64))
    windows[1] = calibration[2, 40:104]  # at another position, complete
    windows[2, : NGRAM + 4] = calibration[0, 10 : 14 + NGRAM]  # five n-grams
    shares = windows_in(calibration, windows)
    assert shares.tolist() == [0.0, 1.0, torch.tensor(5 / (64 - NGRAM + 1)).item()]


def test_the_same_tokens_in_another_order_are_other_text() -> None:
    tokens = torch.arange(64)[None]
    assert windows_in(tokens, tokens.flip(1)).item() == 0


def test_windows_shorter_than_an_ngram_share_nothing() -> None:
    short = torch.arange(NGRAM - 1)[None]
    assert windows_in(short, short).item() == 0
