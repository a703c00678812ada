"""Rows of a layer solved in turn for the loss, and tokens weighted by it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loop_cases import CPU, EQUAL, JOINT, NO_QEP, QEP, ROUND, SOLVE, file_hashes, windows
from tiny_models import write_checkpoint
from torch import Tensor

from jointq_cli.data.token_weights import weighted_by_energy
from jointq_cli.errors import ConfigError
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.curvature import NO_CURVATURE, Coupling, Curvature, Kfac, loss_error
from jointq_cli.quantization.gradients import Gradients, collect_gradients
from jointq_cli.quantization.hessian_cache import Hessians, collect_hessians
from jointq_cli.quantization.loop import quantize_blocks
from jointq_cli.quantization.qep import QepSettings
from jointq_cli.quantization.quantizers import RTN, Quantizer
from jointq_cli.quantization.quantizers.base import Prepared, Solution
from jointq_cli.quantization.settings import LoopSettings
from jointq_cli.quantization.workspace import Workspace
from jointq_cli.records import LayerRecord

DTYPE = torch.float32
EYE = torch.eye(8, dtype=torch.float64)
GRID = RTN(bits=2, group_size=None, symmetric=False, mse=False)


def moments(size: int, seed: int) -> Tensor:
    """Of features that are far from independent."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(3 * size, size, generator=generator, dtype=torch.float64)
    samples += 2 * torch.randn(3 * size, 1, generator=generator, dtype=torch.float64)
    return samples.T @ samples / len(samples)


def rounded(rows: Tensor) -> Tensor:
    return GRID.quantize(rows.float(), Prepared(), DTYPE).quantized.dequantize(DTYPE)


def solved(coupling: Coupling, weight: Tensor, hessian: Tensor = EYE) -> Tensor:
    parts = coupling.solve(weight, hessian, lambda rows: GRID.quantize(rows, Prepared(), DTYPE), DTYPE)
    return torch.cat([part.quantized.dequantize(DTYPE) for part in parts])


def random_weight(rows: int) -> Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows))


def test_a_row_is_solved_for_the_minimiser_given_the_rows_before_it() -> None:
    """The target of row s minimises tr(G E H E^T) over it and all later rows, as if these were real numbers."""
    weight, outputs = random_weight(5), moments(5, 1)
    found = solved(Coupling([outputs], strength=1.0, damping=0.0, row_blocks=5), weight)
    for row in range(1, 5):
        done, open_ = slice(row), slice(row, None)
        error = (weight[done] - found[done]).double()
        best = weight[open_] + torch.linalg.solve(outputs[open_, open_], outputs[open_, done] @ error)
        torch.testing.assert_close(found[row], rounded(best[:1])[0])


def test_strength_and_blocks_of_rows_limit_what_is_compensated() -> None:
    weight, outputs = random_weight(6), moments(6, 2)
    alone = rounded(weight)
    assert torch.equal(solved(Coupling([outputs], 0.0, 0.0, 3), weight), alone)
    assert torch.equal(solved(Coupling([outputs], 1.0, 0.0, 1), weight), alone)
    blocks = solved(Coupling([outputs], 1.0, 0.0, 2), weight)
    assert torch.equal(blocks[:3], alone[:3])
    assert not torch.equal(blocks[3:], alone[3:])
    parts = solved(Coupling([outputs[:4, :4], outputs[4:, 4:]], 1.0, 0.0, 1), weight)
    assert torch.equal(parts, alone)  # rows of different blocks of G are not coupled


def test_the_loss_falls() -> None:
    weight, outputs, hessian = random_weight(64), moments(64, 3), moments(8, 4)
    coupling = Coupling([outputs], strength=1.0, damping=0.01, row_blocks=64)
    error, alone = (coupling.error(weight - found, hessian) for found in (solved(coupling, weight), rounded(weight)))
    assert error < 0.5 * alone
    error_matrix = (weight - rounded(weight)).double()
    assert alone == pytest.approx(float(torch.trace(outputs @ error_matrix @ hessian @ error_matrix.T)))


def test_a_block_is_solved_again_for_the_minimiser_given_all_other_rows() -> None:
    weight, outputs = random_weight(4), moments(4, 1)
    first = solved(Coupling([outputs], strength=1.0, damping=0.0, row_blocks=2), weight)
    asked: list[Tensor] = []

    def solve(rows: Tensor) -> Solution:
        asked.append(rows)
        return GRID.quantize(rows, Prepared(), DTYPE)

    list(Coupling([outputs], 1.0, 0.0, 2, rounds=1).solve(weight, EYE, solve, DTYPE))
    error = (weight - first)[2:].double()
    best = weight[:2] + torch.linalg.solve(outputs[:2, :2], outputs[:2, 2:] @ error)
    torch.testing.assert_close(asked[2], best.float())


@pytest.mark.parametrize("dead", [False, True])
def test_no_round_raises_the_loss(dead: bool) -> None:
    weight, outputs, hessian = random_weight(64), moments(64, 3), moments(8, 4)
    if dead:
        outputs[5], outputs[:, 5] = 0.0, 0.0
    damped = outputs + 0.1 * outputs.diagonal()[outputs.diagonal() > 0].mean() * torch.eye(64)
    losses = []
    for rounds in range(4):
        coupling = Coupling([outputs], strength=1.0, damping=0.1, row_blocks=16, rounds=rounds)
        losses.append(loss_error([damped], weight - solved(coupling, weight, hessian), hessian))
    assert losses[1] < 0.99 * losses[0]
    assert losses == sorted(losses, reverse=True)


def test_plans_count_every_solve() -> None:
    assert (NO_CURVATURE.solves, Kfac(rounds=2).solves, Kfac(strength=0.0, rounds=2).solves) == (1, 3, 1)


def test_tokens_are_weighted_by_a_geometric_mean() -> None:
    weights, energies = torch.tensor([[1.0, 4.0]]), torch.tensor([[16.0, 0.0]])
    assert torch.equal(weighted_by_energy(weights, energies, 0.5), torch.tensor([[4.0, 0.0]]))
    assert torch.equal(weighted_by_energy(None, energies, 0.5), torch.tensor([[4.0, 0.0]]))


def quantized(
    directory: Path,
    place: Path,
    curvature: Curvature,
    quantizer: Quantizer = ROUND,
    qep: QepSettings = NO_QEP,
    inputs: str = "quantized",
) -> list[LayerRecord]:
    place.mkdir()
    model = StreamedModel(Checkpoint(directory), CPU, torch.float32)
    names = frozenset(name for name in model.linear_layers() if model.block_of(name) is not None)
    settings = LoopSettings(quantizer, qep, names, inputs, EQUAL, len(windows()), 2, 1e9, curvature=curvature)
    gradients, records = None, list[LayerRecord]()

    def pause() -> None:
        return None

    with torch.no_grad():
        if isinstance(curvature, Kfac):
            (place / "gradients").mkdir()
            gradients = Gradients(place / "gradients")
            collect_gradients(model, windows(), 0, 2, gradients, pause, pause)
        hessians = None
        if settings.hessians_cacheable:
            (place / "hessians").mkdir()
            hessians = Hessians(place / "hessians")
            collect_hessians(model, windows(), settings, hessians, pause, pause, gradients=gradients)
        workspace = Workspace(place)
        quantize_blocks(model, windows(), settings, workspace, records.append, pause, hessians, gradients=gradients)
    return records


@pytest.mark.parametrize("family", ["llama", "granitemoe"])
def test_a_run_says_what_it_has_done(tmp_path: Path, family: str) -> None:
    directory = write_checkpoint(tmp_path / "model", family)
    plain = quantized(directory, tmp_path / "plain", NO_CURVATURE)
    found = quantized(directory, tmp_path / "kfac", Kfac(token_mix=0.5), SOLVE, QEP)
    assert not any("loss_error" in record.notes for record in plain)
    assert all(0 < record.notes["loss_error"] < 1 for record in found if record.tokens is None)


def test_neither_weights_nor_strength_are_no_curvature(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", "llama")
    cases = {"none": NO_CURVATURE, "zero": Kfac(strength=0.0), "mix": Kfac(strength=0.0, token_mix=0.5)}
    for name, curvature in cases.items():
        quantized(directory, tmp_path / name, curvature, SOLVE)
    none, zero, mix = (file_hashes(tmp_path / name / "layers") for name in ("none", "zero", "mix"))
    assert none == zero
    assert none != mix


def test_cached_hessians_are_weighted_alike(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", "llama")
    quantized(directory, tmp_path / "cached", Kfac(token_mix=0.5), ROUND, inputs="original")
    quantized(directory, tmp_path / "plain", NO_CURVATURE, ROUND, inputs="original")
    cached, plain = (file_hashes(tmp_path / name / "hessians") for name in ("cached", "plain"))
    assert cached != plain


def test_a_seed_that_torch_cannot_take_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"curvature.seed=9223372036854775808: "):
        Kfac(seed=2**63)


def test_a_quantizer_that_needs_all_rows_is_refused() -> None:
    whole = replace(JOINT, lambda_mode="incremental_lambda", regularization_mode="identity")
    with pytest.raises(ConfigError, match=r"curvature.strength=1: must be 0 with JointQ W3 .*incremental_lambda"):
        LoopSettings(whole, NO_QEP, frozenset(), "quantized", EQUAL, 6, 4, 1e9, curvature=Kfac())
    LoopSettings(whole, NO_QEP, frozenset(), "quantized", EQUAL, 6, 4, 1e9, curvature=Kfac(strength=0.0))
