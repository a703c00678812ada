"""Measures, site by site, how well activations survive a grid of few bits before and after a change of basis."""

from collections.abc import Callable, Iterator

from torch import Tensor

from jointq_cli.kernels.hadamard import hadamard_transform
from jointq_cli.records import Site
from jointq_cli.transforms.activation_samples import NORM_SITES, ActivationSamples
from jointq_cli.transforms.basis import Basis
from jointq_cli.transforms.learning import VALIDATION_STRIDE, relative_error, rotate_heads, sqnr_db

BITS = 4  # of the grid; see `Site`


def measure_sites(basis: Basis, samples: ActivationSamples, gains: Callable[[int], list[Tensor]]) -> list[Site]:
    """The metrics of every site of every block, on the tokens that learning holds out.

    gains(block): those of the norms before attention and MLP, (hidden,) each.
    """
    return [site for block in range(samples.blocks) for site in _sites_of(block, basis, samples, gains(block))]


def _sites_of(block: int, basis: Basis, samples: ActivationSamples, gains: list[Tensor]) -> Iterator[Site]:
    held_out = slice(VALIDATION_STRIDE - 1, None, VALIDATION_STRIDE)
    rows = {name: kept[held_out].float() for name, kept in samples.read(block).items()}
    for name, gain in zip(NORM_SITES, gains, strict=False):
        before = rows[name] * gain.to(rows[name])  # gains are float64, on the device of the model
        yield _site(block, name, before, before if basis.r1 is None else rows[name] @ basis.r1.float())
    values = basis.smooth_values(rows["o_proj"], block)
    rotated = values if basis.r2 is None else rotate_heads(values, basis.r2[block].float())
    yield _site(block, "o_proj", rows["o_proj"], rotated)
    inner = rows["down_proj"]
    scaled = inner if basis.mlp_scales is None else inner / basis.mlp_scales[block].float()
    yield _site(block, "down_proj", inner, hadamard_transform(scaled) if basis.r4 else scaled)


def _site(block: int, name: str, before: Tensor, after: Tensor) -> Site:
    return Site(
        block,
        name,
        *(sqnr_db(relative_error(rows, BITS)) for rows in (before, after)),
        *(_peak(rows) for rows in (before, after)),
        *(_kurtosis(rows) for rows in (before, after)),
    )


def _peak(rows: Tensor) -> float:
    return float((rows.abs().amax(dim=-1) / _rms(rows)).mean())


def _kurtosis(rows: Tensor) -> float:
    centred = rows - rows.mean(dim=-1, keepdim=True)
    return float(((centred / _rms(centred)[:, None]) ** 4).mean(dim=-1).mean())


def _rms(rows: Tensor) -> Tensor:
    return rows.square().mean(dim=-1).sqrt().clamp_min(1e-12)
