"""Hadamard matrices, H H^T = n I with entries +1 and -1, and the orthogonal matrices H / sqrt(n).

Built from Sylvester's doubling, Paley's two constructions over finite fields ("On orthogonal matrices", 1933) and
Kronecker products of these; a size that they do not reach gets equal blocks on the diagonal.

A Kronecker product of Hadamard matrices is a Hadamard matrix, so a size is factorised: 576 = 36 x 16, the odd part in a
Paley factor, the rest a power of two. For q a power of an odd prime, chi(a) is 1 where a of GF(q) is a non-zero square,
-1 where it is not a square, 0 for a = 0. As sum_c chi(c) chi(c + b) = -1 for b != 0, the rows of (chi(a + b))_ab are
almost orthogonal, and a border of ones makes them so. (Paley has chi(a - b); the other sign only reorders columns, and
needs no negatives.)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import product

import torch
from torch import Tensor

MAX_POWER_OF_TWO = (
    64  # the largest power of two that is one factor of a product; smaller factors would be limited by memory bandwidth
)


@dataclass(frozen=True)
class Construction:
    """Equal Hadamard matrices on the diagonal, each the Kronecker product of `factors`; str() is for reports."""

    blocks: int  # 1 if the matrix is Hadamard itself
    factors: tuple[int, ...]  # orders of Paley matrices, then a power of two unless that is 1

    @property
    def block_size(self) -> int:
        return math.prod(self.factors)

    def __str__(self) -> str:
        product_of = f" = {' x '.join(map(str, self.factors))}" if len(self.factors) > 1 else ""
        diagonal = "" if self.blocks == 1 else f"{self.blocks} diagonal blocks of "
        return f"{diagonal}Hadamard {self.block_size}{product_of}"


def construction(size: int) -> Construction:
    """How the matrices below are built: as one block if possible, else as the largest blocks that divide `size`.

    Raises ValueError for a size below 1.
    """
    if size < 1:
        raise ValueError(f"a matrix of size {size}: must be at least 1")
    tried = ((blocks, _factors(size // blocks)) for blocks in _divisors(size))  # the last is 1, which has no factors
    return next(Construction(blocks, factors) for blocks, factors in tried if factors is not None)


def hadamard(size: int) -> Tensor:
    """(size, size) int8, exactly Hadamard. Raises ValueError where `construction` has more than one block."""
    found = construction(size)
    if found.blocks != 1:
        raise ValueError(f"no Hadamard matrix of size {size} is known here, only {found}")
    return reduce(torch.kron, map(_factor, found.factors), torch.ones(1, 1, dtype=torch.int8))


def orthogonal_hadamard(size: int) -> Tensor:
    """(size, size) float64 orthogonal, for any size: the matrix of `construction`, over the root of its block size."""
    blocks = construction(size).blocks
    block = hadamard(size // blocks)
    result = torch.zeros(size, size, dtype=torch.float64)
    diagonal = result.view(blocks, len(block), blocks, len(block)).diagonal(dim1=0, dim2=2)
    diagonal.copy_(block[:, :, None]).div_(math.sqrt(len(block)))
    return result


def random_hadamard(size: int, generator: torch.Generator) -> Tensor:
    """(size, size) float64 orthogonal, for row vectors x as x @ R: `orthogonal_hadamard` with a random sign per row.

    The randomised Hadamard transform of QuaRot (arXiv 2404.00456) and QuIP# (arXiv 2402.04396). Signs of the columns
    would only flip outputs: no draw would spread an outlier better than another. `generator` is on the CPU.
    """
    signs = 2.0 * torch.randint(2, (size, 1), generator=generator, dtype=torch.float64) - 1.0
    return orthogonal_hadamard(size).mul_(signs)


def hadamard_transform(x: Tensor, *, transposed: bool = False) -> Tensor:
    """x @ orthogonal_hadamard(n), or its transpose, for x (..., n) of any floating dtype, in that dtype.

    Factor by factor, which takes n x (sum of the factors) multiplications per vector instead of n^2.
    """
    found = construction(x.shape[-1])
    # A Kronecker product acts on each axis of the reshaped vector by one of its factors.
    factors = [part for order in found.factors for part in _small_factors(order)]
    apart = x.reshape(*x.shape[:-1], found.blocks, *factors)
    for axis, order in enumerate(factors, start=-len(factors)):
        factor = _factor(order).to(apart.device, apart.dtype)
        apart = torch.tensordot(apart, factor / math.sqrt(order), dims=([axis], [int(transposed)])).movedim(-1, axis)
    return apart.reshape(x.shape)


def _small_factors(order: int) -> list[int]:
    """Splits a power of two: 8192 = 64 x 64 x 2 takes 130 multiplications per value instead of 8192."""
    if order <= MAX_POWER_OF_TWO or order != _power_of_two(order):
        return [order]
    return [MAX_POWER_OF_TWO, *_small_factors(order // MAX_POWER_OF_TWO)]


def _divisors(number: int, step: int = 1) -> Iterator[int]:
    """Ascending, those that are multiples of `step`."""
    return (divisor for divisor in range(step, number + 1, step) if number % divisor == 0)


def _factors(size: int) -> tuple[int, ...] | None:
    """Orders of the Kronecker factors, None if there are none.

    The first has as much of the odd part of `size` as possible, and is the smallest such order: the rest is doubling.
    """
    if size == _power_of_two(size):
        return (size,) if size > 1 else ()
    orders = [order for order in _divisors(size, step=4) if _field_size(order) is not None]
    for order in sorted(orders, key=lambda order: (-(order // _power_of_two(order)), order)):
        rest = _factors(size // order)
        if rest is not None:
            return (order, *rest)
    return None


def _power_of_two(number: int) -> int:
    """The largest that divides `number`."""
    return number & -number


def _factor(order: int) -> Tensor:
    """(order, order) int8: Sylvester's matrix for a power of two, Paley's for any other order."""
    pair = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    if order == _power_of_two(order):
        return reduce(torch.kron, [pair] * (order.bit_length() - 1))
    field_size = _field_size(order)
    assert field_size is not None  # `_factors` returns no other orders
    conference = _conference(field_size)
    zeros = (conference == 0).to(torch.int8)
    if order == field_size + 1:
        return conference.add_(zeros)
    return torch.kron(conference, pair).add_(torch.kron(zeros, torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)))


def _field_size(order: int) -> int | None:
    """The q of Paley's construction of this order, a multiple of 4: q + 1, or 2 (q + 1) where q = 1 mod 4."""
    half = order // 2 - 1
    candidates = [order - 1, half] if half % 4 == 1 else [order - 1]
    return next((q for q in candidates if _prime_power(q) is not None), None)


def _conference(q: int) -> Tensor:
    """C (q + 1, q + 1) int8 with C C^T = q I, one zero in each row and column, and all other entries +1 and -1."""
    chi = quadratic_character(q)
    prime, degree = len(chi), chi.ndim
    sums = chi.repeat([2] * degree)  # twice the period along each axis, so that each window of one period is a row
    for axis in range(degree):
        sums = sums.narrow(axis, 0, 2 * prime - 1).unfold(axis, prime, 1)
    result = torch.ones(q + 1, q + 1, dtype=torch.int8)
    result[0, 0] = 0
    result[1:, 0] = 1 if q % 4 == 1 else -1  # chi(-1)
    result[1:, 1:] = sums.reshape(q, q)
    return result


def quadratic_character(q: int) -> Tensor:
    """chi of all elements of GF(q), q = p^k odd: int8 of shape (p, ..., p), indexed by an element's k coefficients."""
    found = _prime_power(q)
    if found is None or found[0] == 2:
        raise ValueError(f"a field of {q} elements: must be a power of an odd prime")
    prime, degree = found
    powers = primitive_powers(prime, degree)
    chi = torch.zeros([prime] * degree, dtype=torch.int8)
    chi[powers[0::2].unbind(1)] = 1
    chi[powers[1::2].unbind(1)] = -1
    return chi


def _prime_power(number: int) -> tuple[int, int] | None:
    """p and k where `number` is p^k of a prime p, else None."""
    prime = next((p for p in range(2, math.isqrt(number) + 1) if number % p == 0), number)
    degree = round(math.log(number, prime)) if prime > 1 else 0
    return (prime, degree) if degree > 0 and prime**degree == number else None


def primitive_powers(prime: int, degree: int) -> Tensor:
    """(p^k - 1, k) int64: the powers 1, x, x^2 ... of a primitive element x of GF(p^k).

    Each is the k coefficients of a polynomial in x; for k = 1, a number modulo p.
    """
    moduli = (low for low in product(range(prime), repeat=degree) if low[0] != 0)
    cycles = (_powers(prime, low) for low in moduli)
    # A ring of p^k elements whose powers of x are all of them but 0 is a field: no test of irreducibility is needed.
    return torch.tensor(next(cycle for cycle in cycles if len(cycle) == prime**degree - 1))


def _powers(prime: int, low: tuple[int, ...]) -> list[tuple[int, ...]]:
    """1, x, x^2 ... until 1 recurs, modulo `prime` and x^k = low[0] + low[1] x + ...; for k = 1, x is low[0].

    As low[0] is not 0, x has an inverse, so 1 does recur.
    """
    one = (1, *[0] * (len(low) - 1))
    powers = [one]
    while True:
        *shifted, top = (0, *powers[-1])
        power = tuple((coefficient + top * back) % prime for coefficient, back in zip(shifted, low, strict=True))
        if power == one:
            return powers
        powers.append(power)
