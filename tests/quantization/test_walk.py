"""The walk through the blocks: its order, which weights compute what, and when a block is finished."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_cases import CPU, EQUAL, NO_QEP, QEP, ROUND, quantize, windows
from tiny_models import write_checkpoint
from torch import Tensor

from jointq_cli.formats.uniform import UniformWeight
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.forward import final_hidden
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.hidden_states import HiddenStateFile, WeightSet
from jointq_cli.quantization.settings import LoopSettings
from jointq_cli.quantization.walk import BlockVisit, walk
from jointq_cli.system.distributed import SINGLE_PROCESS

BOTH: dict[WeightSet, bool] = {"original": True, "quantized": True}


@pytest.fixture
def model(tmp_path: Path) -> StreamedModel:
    torch.set_grad_enabled(False)
    yield StreamedModel(Checkpoint(write_checkpoint(tmp_path / "model")), CPU, torch.float32)
    torch.set_grad_enabled(True)


def walked(
    model: StreamedModel, directory: Path, visit: Callable[[BlockVisit], None], complete: dict[WeightSet, bool] = BOTH
) -> None:
    directory.mkdir(exist_ok=True)
    names = frozenset(name for name in model.linear_layers() if model.block_of(name) is not None)
    settings = LoopSettings(ROUND, NO_QEP, names, "quantized", EQUAL, len(windows()), 4, 1e9)
    for block in walk(
        model, windows(), settings, HiddenStateFile(directory), complete, 4, lambda: None, SINGLE_PROCESS
    ):
        visit(block)


def use_all(block: BlockVisit) -> None:
    for _ in block.groups():
        pass


def test_groups_come_in_the_order_they_run(model: StreamedModel, tmp_path: Path) -> None:
    found: list[tuple[int, int, list[str]]] = []

    def note(block: BlockVisit) -> None:
        for group in block.groups():
            found.append((block.index, group.number, [layer.name.rsplit(".", 1)[-1] for layer in group.layers]))

    walked(model, tmp_path / "work", note)
    groups = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert found == [(block, number, group) for block in range(3) for number, group in enumerate(groups)]


def test_replaced_weights_compute_the_quantised_hidden_states_alone(model: StreamedModel, tmp_path: Path) -> None:
    def silence(block: BlockVisit) -> None:
        entered = block.hidden["quantized"].clone()
        for group in block.groups():
            for layer in group.layers:
                group.block.replace(layer, torch.zeros_like(group.block.weight(layer)))
        assert torch.equal(block.hidden["quantized"], entered)  # a block of zeros adds nothing
        expected = final_hidden(model, windows(), 4, blocks=block.index + 1)
        assert torch.equal(block.hidden["original"], expected)
        assert not any(block.tensors[name].any() for name in block.tensors if "proj" in name)

    walked(model, tmp_path / "work", silence)


def test_a_block_is_finished_only_when_the_next_one_is_requested(model: StreamedModel, tmp_path: Path) -> None:
    file = HiddenStateFile(tmp_path / "work")

    class Stop(Exception):
        pass

    def stop_in_second(block: BlockVisit) -> None:
        use_all(block)
        assert file.finished_blocks() == block.index
        if block.index == 1:
            raise Stop

    with pytest.raises(Stop):
        walked(model, tmp_path / "work", stop_in_second)
    assert file.finished_blocks() == 1
    assert torch.equal(file.read("original"), final_hidden(model, windows(), 4, blocks=1))
    visited: list[int] = []
    walked(model, tmp_path / "work", lambda block: (visited.append(block.index), use_all(block))[1])
    assert visited == [1, 2]
    assert file.finished_blocks() == 3
    assert torch.equal(file.read("original"), final_hidden(model, windows()[:4], 4))  # of the first batch


def test_no_block_is_loaded_while_hidden_states_are_written(
    model: StreamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, loaded = HiddenStateFile.write, []

    def noting(self: HiddenStateFile, *arguments: Any) -> None:
        loaded.extend(parameter for block in model.blocks for parameter in block.parameters() if not parameter.is_meta)
        write(self, *arguments)

    monkeypatch.setattr(HiddenStateFile, "write", noting)
    walked(model, tmp_path / "work", use_all)
    assert loaded == []


@pytest.mark.parametrize("complete", [{"original": True}, {"original": True, "quantized": False}, BOTH])
def test_hidden_states_of_incomplete_weights_are_those_of_the_first_batch(
    complete: dict[WeightSet, bool], model: StreamedModel, tmp_path: Path
) -> None:
    def compare(block: BlockVisit) -> None:
        assert {weights: len(states) for weights, states in block.hidden.items()} == sizes
        stores = {states.untyped_storage().data_ptr() for states in block.hidden.values()}
        assert len(stores) == len(sizes)  # none overwrites another
        list(block.groups())

    sizes = {weights: 6 if every else 4 for weights, every in complete.items()}
    names = frozenset[str]()
    settings = LoopSettings(ROUND, NO_QEP, names, "original", EQUAL, 6, 4, 1e9)
    (tmp_path / "work").mkdir()
    file = HiddenStateFile(tmp_path / "work")
    for block in walk(model, windows(), settings, file, complete, 0, lambda: None, SINGLE_PROCESS):
        compare(block)
    assert {weights: len(file.read(weights)) for weights in complete} == dict.fromkeys(complete, 0)


def test_a_finished_walk_runs_nothing(model: StreamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walked(model, tmp_path / "work", use_all)

    def fail(*arguments: Any) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(StreamedModel, "embed", fail)
    monkeypatch.setattr(StreamedModel, "run", fail)
    walked(model, tmp_path / "work", use_all)


def test_each_layer_is_dequantised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dequantize, calls = UniformWeight.dequantize, []
    monkeypatch.setattr(
        UniformWeight, "dequantize", lambda self, dtype: (calls.append(dtype), dequantize(self, dtype))[1]
    )
    _, _, records = quantize(write_checkpoint(tmp_path / "model"), tmp_path / "work", ROUND, qep=QEP)
    assert len(calls) == len(records) == 3 * 7
