"""What a basis does to the activations, site by site: how much of them a grid of few bits keeps, before and after."""

from collections.abc import Callable, Iterator

from torch import Tensor

from jointq_cli.kernels.hadamard import turned
from jointq_cli.records import Site
from jointq_cli.transforms.activation_samples import Reservoir
from jointq_cli.transforms.basis import Basis
from jointq_cli.transforms.learning import HELD_OUT, decibels, relative_error, turn_heads

BITS = 4  # of the grid; see `Site`


def measure_sites(basis: Basis, reservoir: Reservoir, gains: Callable[[int], list[Tensor]]) -> list[Site]:
    """gains(block): those of the norms before attention and MLP, (hidden,) each."""
    return [site for block in range(reservoir.blocks) for site in _sites_of(block, basis, reservoir, gains(block))]


def _sites_of(block: int, basis: Basis, reservoir: Reservoir, gains: list[Tensor]) -> Iterator[Site]:
    samples = {name: rows[HELD_OUT - 1 :: HELD_OUT].float() for name, rows in reservoir.read(block).items()}
    for name, gain in zip(("attention", "mlp"), gains, strict=False):
        before = samples[name] * gain.to(samples[name])  # gains lie where the model does, in float64
        yield _site(block, name, before, before if basis.r1 is None else samples[name] @ basis.r1.float())
    values = basis.smoothed_values(samples["o_proj"], block)
    turned_values = values if basis.r2 is None else turn_heads(values, basis.r2[block].float())
    yield _site(block, "o_proj", samples["o_proj"], turned_values)
    inner = samples["down_proj"]
    scaled = inner if basis.mlp_scales is None else inner / basis.mlp_scales[block].float()
    yield _site(block, "down_proj", inner, turned(scaled) if basis.r4 else scaled)


def _site(block: int, name: str, before: Tensor, after: Tensor) -> Site:
    return Site(
        block,
        name,
        *(_sqnr(rows) for rows in (before, after)),
        *(_peak(rows) for rows in (before, after)),
        *(_kurtosis(rows) for rows in (before, after)),
    )


def _sqnr(rows: Tensor) -> float:
    return decibels(relative_error(rows, BITS))


def _peak(rows: Tensor) -> float:
    return float((rows.abs().amax(dim=-1) / _rms(rows)).mean())


def _kurtosis(rows: Tensor) -> float:
    centred = rows - rows.mean(dim=-1, keepdim=True)
    return float(((centred / _rms(centred)[:, None]) ** 4).mean(dim=-1).mean())


def _rms(rows: Tensor) -> Tensor:
    return rows.square().mean(dim=-1).sqrt().clamp_min(1e-12)
