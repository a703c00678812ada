"""Cached Hessians: the bits of those that the loop collects itself, packed, resumed and shared."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loop_cases import (
    CPU,
    EQUAL,
    JOINT,
    NO_QEP,
    QEP,
    ROUND,
    SOLVE,
    WEIGHED,
    file_hashes,
    granite,
    windows,
)  # fmt: skip
from tiny_models import write_checkpoint
from torch import Tensor

from jointq_cli.cli.main import main
from jointq_cli.data.token_weights import TokenWeights
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.accumulator import PANEL, packed, packed_size, unpacked
from jointq_cli.quantization.hessian_cache import Hessians, bytes_needed, collect_hessians
from jointq_cli.quantization.loop import quantize_blocks
from jointq_cli.quantization.quantizers import Quantizer
from jointq_cli.quantization.settings import LoopSettings
from jointq_cli.quantization.workspace import Workspace


class Stop(Exception):
    pass


class Countdown:
    """A pause that raises when it is called for the `left`-th time."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self) -> None:
        self.left -= 1
        if not self.left:
            raise Stop


def prepared(
    directory: Path, quantizer: Quantizer, weights: TokenWeights = EQUAL, batch: int = 4
) -> tuple[StreamedModel, LoopSettings]:
    model = StreamedModel(Checkpoint(directory), CPU, torch.float32)
    names = frozenset(name for name in model.linear_layers() if model.block_of(name) is not None)
    return model, LoopSettings(quantizer, NO_QEP, names, "original", weights, len(windows()), batch, 1e9)


def collected(directory: Path, scratch: Path, quantizer: Quantizer, pause: object = None, **how: object) -> Hessians:
    scratch.mkdir(exist_ok=True)
    model, settings = prepared(directory, quantizer, **how)  # type: ignore[arg-type]
    hessians = Hessians(scratch)
    with torch.no_grad():
        collect_hessians(model, windows(), settings, hessians, lambda: None, pause or (lambda: None))  # type: ignore[arg-type]
    return hessians


def solved(
    directory: Path,
    scratch: Path,
    quantizer: Quantizer,
    hessians: Hessians | None,
    pause: object = None,
    **how: object,
) -> Workspace:
    scratch.mkdir(exist_ok=True)
    model, settings = prepared(directory, quantizer, **how)  # type: ignore[arg-type]
    workspace = Workspace(scratch)
    with torch.no_grad():
        quantize_blocks(
            model, windows(), settings, workspace, lambda record: None, pause or (lambda: None), hessians  # type: ignore[arg-type]
        )  # fmt: skip
    return workspace


def everything(workspace: Workspace) -> list[object]:
    hidden = [workspace.hidden.read(weights).tolist() for weights in ("original", "quantized")]
    folders = [file_hashes(workspace.directory / name) for name in ("layers", "shards")]
    return [*folders, *hidden, workspace.blocks()]


@pytest.mark.parametrize("size", [1, 5, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 7])
def test_a_symmetric_matrix_is_packed_and_unpacked_without_loss(size: int) -> None:
    square = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    square = square + square.T
    assert len(packed(square)) == packed_size(size) <= size * (size + PANEL) / 2
    assert torch.equal(unpacked(packed(square), size), square)


MODELS = {
    "llama": lambda place: write_checkpoint(place, dtype=torch.bfloat16),
    "gpt_neox": lambda place: write_checkpoint(place, "gpt_neox"),
    "granite": granite,  # the factor of its writers is fitted, to a value of many digits
}


@pytest.mark.parametrize("family", ["llama", "granite", pytest.param("gpt_neox", marks=pytest.mark.slow)])
@pytest.mark.parametrize("weights", [EQUAL, WEIGHED])
@pytest.mark.parametrize("quantizer", [SOLVE, JOINT, replace(JOINT, lambda_mode="heldout")])
def test_cached_hessians_give_the_bits_of_the_loop_that_collects(
    quantizer: Quantizer, weights: TokenWeights, family: str, tmp_path: Path
) -> None:
    directory = MODELS[family](tmp_path / "model")
    how = {"weights": weights, "batch": 2}
    hessians = collected(directory, tmp_path / "hessians", quantizer, **how)
    shared = solved(directory, tmp_path / "shared", quantizer, hessians, **how)
    alone = solved(directory, tmp_path / "alone", quantizer, None, **how)
    assert everything(shared) == everything(alone)


def test_with_hessians_only_the_first_batch_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_checkpoint(tmp_path / "model")
    hessians = collected(directory, tmp_path / "hessians", SOLVE, batch=1)
    runs: list[Tensor] = []
    run = StreamedModel.run
    monkeypatch.setattr(
        StreamedModel, "run", lambda self, index, hidden: (runs.append(hidden), run(self, index, hidden))[1]
    )
    solved(directory, tmp_path / "work", SOLVE, hessians, batch=1)
    assert len(runs) == 3 * 2  # the first batch with each set of weights
    assert {len(hidden) for hidden in runs} == {1}


def test_a_walk_stopped_anywhere_ends_with_the_same_hessians(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    whole = file_hashes(collected(directory, tmp_path / "whole", SOLVE).directory)
    assert len(whole) == 3 * 4 + 1
    for stop in (1, 5, 9, 14, 20, 29, 30):  # 30 pauses: 3 blocks of 4 groups and the end of a pass, 2 batches each
        with pytest.raises(Stop):
            collected(directory, tmp_path / str(stop), SOLVE, Countdown(stop))
        assert file_hashes(collected(directory, tmp_path / str(stop), SOLVE).directory) == whole


@pytest.mark.parametrize("first", [True, False])
def test_a_run_begun_with_hessians_goes_on_without_them_and_the_other_way_round(first: bool, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    hessians = collected(directory, tmp_path / "hessians", SOLVE)
    expected = everything(solved(directory, tmp_path / "whole", SOLVE, None))
    for stop in (3, 12, 20):
        scratch = tmp_path / str(stop)
        with pytest.raises(Stop):
            solved(directory, scratch, SOLVE, hessians if first else None, Countdown(stop))
        assert everything(solved(directory, scratch, SOLVE, None if first else hessians)) == expected


def test_the_estimate_is_enough_and_not_much_more(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", intermediate_size=512)
    for quantizer in (SOLVE, replace(JOINT, lambda_mode="heldout")):
        model, settings = prepared(directory, quantizer, batch=2)
        hessians = collected(directory, tmp_path / str(settings.heldout), quantizer, batch=2)
        files = list(hessians.directory.glob("0*.safetensors"))
        taken = sum(file.stat().st_size for file in files) - 400 * len(files)  # their heads
        assert taken < bytes_needed(model, settings) < 2 * taken


def test_only_statistics_that_no_quantizer_changes_are_cached() -> None:
    names = frozenset({"mlp.up_proj"})
    assert LoopSettings(ROUND, NO_QEP, names, "original", EQUAL, 6, 4, 1e9).hessians_cacheable
    assert not LoopSettings(ROUND, NO_QEP, names, "quantized", EQUAL, 6, 4, 1e9).hessians_cacheable
    assert not LoopSettings(ROUND, QEP, names, "quantized", EQUAL, 6, 4, 1e9).hessians_cacheable


# through the command

SWEEP = [
    "quantize", "-m", "recipe=ci_smoke", "qep=none", "calibration.inputs=original", "evaluation.max_windows=1",
    "layers.include_layer_keywords=[layers.0,layers.1]", "calibration.num_samples=2", "runtime.num_threads=1",
]  # fmt: skip


def stages(directory: Path) -> dict[str, bool]:
    """The stages of a run and which of them were reused."""
    return {stage["name"]: stage["reused"] for stage in json.loads((directory / "report.json").read_text())["stages"]}


@pytest.mark.slow
def test_a_sweep_collects_its_hessians_once_and_shares_their_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shared = [*SWEEP, "output_dir=one"]
    assert main([*shared, "quantizer.regularization_lambda=0.1,0.3", "hydra.sweep.dir=shared"]) == 0
    assert [stages(Path(f"shared/{job}"))["hessians"] for job in "01"] == [False, True]
    alone = ["output_dir=other", "runtime.hessians_gb=0", "hydra.sweep.dir=alone"]
    assert main([*SWEEP, "quantizer.regularization_lambda=0.3", *alone]) == 0
    assert "hessians" not in stages(Path("alone/0"))
    for folder in ("checkpoint", "codes"):
        assert file_hashes(Path(f"shared/1/{folder}")) == file_hashes(Path(f"alone/0/{folder}"))
    assert main([*shared, "quantizer.regularization_lambda=0.3", "hydra.sweep.dir=again"]) == 0
    assert "hessians" not in stages(Path("again/0"))  # what is quantised already needs none


def test_the_power_of_uniform_weights_does_not_decide_what_is_shared() -> None:
    one, other = (TokenWeights("uniform", power, first_token=0.5) for power in (1.0, 2.0))
    assert one.canonical == other.canonical
    assert replace(one, weighting="input").canonical != replace(other, weighting="input").canonical


def test_hessians_beyond_the_budget_are_not_kept_and_that_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*SWEEP, "runtime.hessians_gb=0.001", "hydra.sweep.dir=run", "quantizer=rtn"]) == 0
    log = Path("run/0/log.txt").read_text()
    assert "Hessians are not kept for other runs: they take up to" in log
    assert "runtime.hessians_gb=0.001" in log
    assert not list(Path("runs/store").glob("hessians-*"))
