"""Hadamard matrices by their definition, the fields under them by theirs, and which sizes are out of reach."""

import math

import pytest
import torch
from torch import Tensor

from jointq_cli.kernels.hadamard import (
    construction,
    hadamard,
    orthogonal_hadamard,
    primitive_powers,
    quadratic_character,
    random_hadamard,
)

# Paley and Sylvester do not reach these multiples of 4; Williamson and others would.
UNREACHABLE = [92, 116, 156, 172, 184, 188, 232, 236]
REACHABLE = [1, 2, *(size for size in range(4, 257, 4) if size not in UNREACHABLE), 344]
# Mostly hidden and intermediate sizes of language models. 1904 has two factors of Paley's, 3420 is one.
MODEL_SIZES = [576, 768, 896, 960, 1152, 1536, 1904, 2048, 2304, 2432, 2560, 3072, 3420, 3584, 4096]
FIELDS = [(3, 1), (3, 2), (5, 2), (3, 3), (7, 2), (13, 1)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gram(matrix: Tensor) -> Tensor:
    """Exact: float32 holds all integers up to 2^24."""
    wide = matrix.float()
    return wide @ wide.T


@pytest.mark.parametrize(
    "sizes",
    [pytest.param(REACHABLE, id="small"), pytest.param(MODEL_SIZES, id="of models", marks=pytest.mark.slow)],
)
def test_rows_are_signs_and_orthogonal_in_integers(sizes: list[int]) -> None:
    for size in sizes:
        matrix = hadamard(size)
        assert (matrix.shape, matrix.dtype) == ((size, size), torch.int8)
        assert bool((matrix.abs() == 1).all()), size
        assert torch.equal(gram(matrix), size * torch.eye(size)), size


def test_the_sizes_out_of_reach_are_known() -> None:
    blocks = {size: construction(size).blocks for size in range(4, 257, 4)}
    assert [size for size in blocks if blocks[size] > 1] == UNREACHABLE


@pytest.mark.parametrize("size", [5120, 8192, 8960, 9728, 11008, 13824, 14336, 18944, 28672, 29568])
def test_large_models_have_one_block(size: int) -> None:
    found = construction(size)
    assert (found.blocks, found.block_size) == (1, size)
    *paley, doubling = found.factors
    assert len(paley) <= 1
    assert doubling & (doubling - 1) == 0


def test_the_second_of_paleys_constructions_and_a_prime_power_are_used() -> None:
    assert [construction(size).factors for size in (36, 52, 28, 344)] == [
        (36,),
        (52,),
        (28,),
        (344,),
    ]  # 17, 25, 27, 343


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (1, "Hadamard 1"),
        (4096, "Hadamard 4096"),
        (28, "Hadamard 28"),
        (576, "Hadamard 576 = 36 x 16"),
        (11008, "Hadamard 11008 = 344 x 32"),
        (9, "9 diagonal blocks of Hadamard 1"),
        (6, "3 diagonal blocks of Hadamard 2"),
        (92, "23 diagonal blocks of Hadamard 4"),
        (156, "3 diagonal blocks of Hadamard 52"),
        (520, "5 diagonal blocks of Hadamard 104 = 52 x 2"),
    ],
)
def test_a_report_says_what_was_built(size: int, words: str) -> None:
    assert str(construction(size)) == words


def test_two_of_paleys_reach_a_size_that_one_does_not() -> None:
    assert construction(1904).factors == (68, 28)


@pytest.mark.parametrize("size", [1, 2, 3, 6, 9, 12, 92, 100, 156, 576, 1024, 1100])
def test_every_size_has_an_orthogonal_matrix(size: int) -> None:
    for matrix in (orthogonal_hadamard(size), random_hadamard(size, seeded(0))):
        assert (matrix.shape, matrix.dtype) == ((size, size), torch.float64)
        assert (matrix @ matrix.T - torch.eye(size, dtype=torch.float64)).abs().max() < 1e-13


def test_an_exact_size_is_the_hadamard_matrix_over_its_root() -> None:
    torch.testing.assert_close(orthogonal_hadamard(12) * math.sqrt(12), hadamard(12).double(), rtol=0, atol=1e-14)


def test_other_sizes_have_the_largest_blocks_on_the_diagonal() -> None:
    block = orthogonal_hadamard(52)
    assert torch.equal(orthogonal_hadamard(156), torch.block_diag(*[block] * 3))


@pytest.mark.parametrize("size", [92, 6, 9])
def test_no_matrix_passes_for_hadamard_that_is_none(size: int) -> None:
    with pytest.raises(ValueError, match=f"no Hadamard matrix of size {size} is known here, only .* diagonal blocks"):
        hadamard(size)


@pytest.mark.parametrize("size", [0, -4])
def test_a_size_is_positive(size: int) -> None:
    for build in (construction, hadamard, orthogonal_hadamard):
        with pytest.raises(ValueError, match=f"size {size}: must be at least 1"):
            build(size)


def test_the_generator_decides() -> None:
    assert torch.equal(random_hadamard(576, seeded(3)), random_hadamard(576, seeded(3)))
    assert not torch.equal(random_hadamard(576, seeded(3)), random_hadamard(576, seeded(4)))
    generator = seeded(3)
    assert not torch.equal(random_hadamard(576, generator), random_hadamard(576, generator))


@pytest.mark.parametrize("size", [576, 92])
def test_signs_are_on_the_rows_about_half_of_each(size: int) -> None:
    plain, found = orthogonal_hadamard(size), random_hadamard(size, seeded(0))
    signs = (found * plain).sum(dim=1).round()  # rows have length 1
    assert torch.equal(found, signs[:, None] * plain)
    assert abs(float(signs.mean())) < 4 / math.sqrt(size)


def test_another_seed_spreads_a_vector_otherwise() -> None:
    x = torch.randn(1, 64, generator=seeded(0), dtype=torch.float64)
    spread = [(x @ random_hadamard(64, seeded(seed))).abs() for seed in (1, 2)]
    assert (spread[0] - spread[1]).abs().max() > 0.1  # column signs would leave both the same


@pytest.mark.parametrize(("prime", "degree"), FIELDS)
def test_powers_are_the_multiplicative_group_of_a_field(prime: int, degree: int) -> None:
    """All elements but 0, once each; a product is a sum of exponents; and it distributes over the addition."""
    powers = primitive_powers(prime, degree)
    q = prime**degree
    places = prime ** torch.arange(degree)
    element = powers @ places  # exponent -> element as a number
    assert element[0] == 1
    assert element.sort().values.tolist() == list(range(1, q))
    exponent = torch.zeros(q, dtype=torch.int64)
    exponent[element] = torch.arange(q - 1)

    def times(a: Tensor, b: Tensor) -> Tensor:
        return torch.where((a == 0) | (b == 0), 0, element[(exponent[a] + exponent[b]) % (q - 1)])

    def plus(a: Tensor, b: Tensor) -> Tensor:
        return ((a[..., None] // places + b[..., None] // places) % prime) @ places

    a, b, c = torch.meshgrid(*[torch.arange(q)] * 3, indexing="ij")
    assert torch.equal(times(plus(a, b), c), plus(times(a, c), times(b, c)))

    chi = quadratic_character(q).permute(*reversed(range(degree))).flatten().long()  # of elements as numbers
    a, b = torch.meshgrid(*[torch.arange(q)] * 2, indexing="ij")
    assert torch.equal(chi[times(a, b)], chi[a] * chi[b])
    squares = set(times(torch.arange(1, q), torch.arange(1, q)).tolist())
    assert len(squares) == (q - 1) // 2
    assert {number for number in range(q) if chi[number] == 1} == squares
    assert (chi == 0).nonzero().tolist() == [[0]]
    correlation = torch.stack([(chi * chi[plus(torch.arange(q), shift)]).sum() for shift in torch.arange(q)])
    assert correlation.tolist() == [q - 1] + [-1] * (q - 1)


@pytest.mark.parametrize("prime", [3, 7, 17, 101])
def test_squares_modulo_a_prime_are_eulers(prime: int) -> None:
    euler = [pow(number, (prime - 1) // 2, prime) for number in range(prime)]
    assert quadratic_character(prime).tolist() == [-1 if power == prime - 1 else power for power in euler]


@pytest.mark.parametrize("q", [1, 2, 8, 15, 21])
def test_other_numbers_have_no_quadratic_character(q: int) -> None:
    with pytest.raises(ValueError, match=f"a field of {q} elements: must be a power of an odd prime"):
        quadratic_character(q)
