"""What is said of the activations before and after is what the original and the rotated model show."""

from pathlib import Path

import pytest
import torch
from basis_cases import ADMITS_R1, CPU, in_basis, original, parts_of, random_basis, tiny_layout
from torch import Tensor

from jointq_cli.models.streamed import BlockwiseModel
from jointq_cli.records import Site
from jointq_cli.transforms.activation_metrics import measure_sites
from jointq_cli.transforms.activation_samples import ActivationSamples, collect_samples
from jointq_cli.transforms.basis import Basis

pytestmark = pytest.mark.usefixtures("no_gradients")

WINDOWS = torch.randint(3, 256, (4, 24), generator=torch.Generator().manual_seed(1))
EVERY = 8  # the held-out token


def sampled(model: BlockwiseModel, directory: Path) -> ActivationSamples:
    directory.mkdir()
    samples = ActivationSamples(directory, len(model))
    collect_samples(model, tiny_layout(model), WINDOWS, 4, 64, samples, lambda: None, lambda: None)
    return samples


@pytest.mark.parametrize("family", ["llama", "gemma", "phi3", "gemma2", "olmo2"])
def test_what_it_says_of_afterwards_is_what_the_rotated_model_shows(family: str, root: Path, tmp_path: Path) -> None:
    model = original(root, family)
    basis = random_basis(model, parts_of(family))
    rotated = in_basis(model, basis, tmp_path / "rotated")
    measured = measure_sites(basis, sampled(model, tmp_path / "before"), rotated.gains)
    neutral = [torch.ones(64)] * 2 if family in ADMITS_R1 else None
    samples = sampled(BlockwiseModel(rotated, CPU, torch.float32), tmp_path / "after")
    shown = measure_sites(Basis(), samples, lambda block: neutral or rotated.gains(block))
    assert [(site.block, site.name) for site in measured] == [(site.block, site.name) for site in shown]
    for before, after in zip(measured, shown, strict=True):
        assert before.sqnr_after == pytest.approx(after.sqnr_before, abs=0.05)
        assert before.peak_after == pytest.approx(after.peak_before, rel=1e-3)
        assert before.kurtosis_after == pytest.approx(after.kurtosis_before, rel=1e-3)
        changed = family in ADMITS_R1 or before.name in ("o_proj", "down_proj")
        assert (before.peak_before != pytest.approx(before.peak_after, rel=1e-3)) == changed


def by_hand(rows: Tensor) -> tuple[float, float, float]:
    """SQNR in dB on 16 levels between 0.9 of the least and of the largest value of a token, peak, kurtosis."""
    error = signal = 0.0
    peaks, kurtoses = [], []
    for row in rows.double():
        low, high = 0.9 * min(float(row.min()), 0.0), 0.9 * max(float(row.max()), 0.0)
        scale = (high - low) / 15
        zero = round(-low / scale)
        for value in row.tolist():
            level = min(max(round(value / scale) + zero, 0), 15)
            error += (value - scale * (level - zero)) ** 2
            signal += value**2
        peaks.append(float(row.abs().max() / row.square().mean().sqrt()))
        centred = row - row.mean()
        kurtoses.append(float((centred**4).mean() / (centred**2).mean() ** 2))
    sqnr = 10 * float(torch.tensor(signal / error).log10())
    return sqnr, sum(peaks) / len(peaks), sum(kurtoses) / len(kurtoses)


def test_each_number_is_that_of_a_loop_over_the_held_out_tokens(root: Path, tmp_path: Path) -> None:
    model = original(root)
    samples = sampled(model, tmp_path / "before")
    gains = in_basis(model, Basis(), tmp_path / "rotated").gains
    measured: dict[str, Site] = {site.name: site for site in measure_sites(Basis(), samples, gains) if site.block == 1}
    kept = {name: rows[EVERY - 1 :: EVERY] for name, rows in samples.read(1).items()}
    kept["attention"], kept["mlp"] = (kept[n] * gain for n, gain in zip(("attention", "mlp"), gains(1), strict=True))
    for name, site in measured.items():
        sqnr, peak, kurtosis = by_hand(kept[name])
        assert site.sqnr_before == pytest.approx(sqnr, abs=0.05)
        assert site.peak_before == pytest.approx(peak, rel=1e-4)
        assert site.kurtosis_before == pytest.approx(kurtosis, rel=1e-4)
