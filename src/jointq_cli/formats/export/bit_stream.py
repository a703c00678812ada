"""Codes packed without gaps into 32-bit words, the layout that compressed-tensors, GPTQ and MLX share."""

import torch
from torch import Tensor

WORD = 32


def packed_words(count: int, bits: int) -> int:
    """Words that `count` codes take."""
    return -(-count * bits // WORD)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs each row of `codes` (rows, count), integers in [0, 2^bits): code i has the bits i * bits to (i + 1) * bits
    of the row, counted from the lowest bit of the first word. Returns int32 (rows, packed_words(count, bits)); unused
    bits at the end are 0."""
    rows, count = codes.shape
    if 8 % bits == 0:
        words_of_row = packed_words(count, bits)
        whole = torch.nn.functional.pad(codes.to(torch.uint8), (0, words_of_row * WORD // bits - count))
        parts = whole.reshape(rows, words_of_row * WORD // 8, 8 // bits) << _places(bits)
        packed = parts.sum(dim=2, dtype=torch.uint8)
        return packed.flatten().view(torch.int32).reshape(rows, words_of_row)
    codes = codes.to(torch.int64)
    words = torch.zeros(rows, packed_words(count, bits) + 1, dtype=torch.int64)
    first = torch.arange(count) * bits
    word, shift = first // WORD, first % WORD
    # A code may have its upper bits in the next word. Bits do not overlap, so sums are unions.
    words.index_add_(1, word, (codes << shift) & 0xFFFFFFFF)
    words.index_add_(1, word + 1, (codes << shift) >> WORD)
    return words[:, :-1].to(torch.int32)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: integers (rows, count), each cut out of the byte or the two words that it may lie in."""
    if 8 % bits == 0:
        rows, words_of_row = words.shape  # a transposed row has another stride than 1, which one view does not take
        octets = words.reshape(-1).view(torch.uint8).reshape(rows, words_of_row * WORD // 8)
        parts = octets[:, :, None] >> _places(bits)
        return (parts & ((1 << bits) - 1)).flatten(1)[:, :count]
    first = torch.arange(count) * bits
    word, shift = first // WORD, first % WORD
    low = words.to(torch.int64) & 0xFFFFFFFF
    high = torch.nn.functional.pad(low[:, 1:], (0, 1))
    return ((low | (high << WORD))[:, word] >> shift) & ((1 << bits) - 1)


def _places(bits: int) -> Tensor:
    """How far each of the codes in one byte is shifted."""
    return torch.arange(0, 8, bits, dtype=torch.uint8)
