"""Codes in 32-bit words: the bits at their places, and back."""

import pytest
import torch

from jointq_cli.formats.export.bit_stream import WORD, pack, packed_words, unpack


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 31, 32, 97])
def test_every_bit_is_at_its_place(bits: int, count: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, count), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    codes[0] = (1 << bits) - 1
    words = pack(codes, bits)
    for row, packed in zip(codes.tolist(), words.tolist(), strict=True):
        stream = sum(code << (place * bits) for place, code in enumerate(row))  # one large integer
        expected = [(stream >> (WORD * index)) & 0xFFFFFFFF for index in range(packed_words(count, bits))]
        assert [word & 0xFFFFFFFF for word in packed] == expected
    assert torch.equal(unpack(words, bits, count).long(), codes.long())
    transposed = words.T.clone(memory_format=torch.contiguous_format).T  # of one word a row: a stride of 3
    assert torch.equal(unpack(transposed, bits, count).long(), codes.long())


def test_no_rows_or_columns_are_packed_into_nothing() -> None:
    assert pack(torch.zeros(0, 8, dtype=torch.uint8), 4).shape == (0, 1)
    assert pack(torch.zeros(2, 0, dtype=torch.uint8), 4).shape == (2, 0)
