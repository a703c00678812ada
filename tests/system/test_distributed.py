"""One run by several processes: its collectives, that its results are those of one process, and how it fails."""

import json
import pickle
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed_cases import HERE, ended, free_port, sha256, start, start_all
from loop_cases import CPU, EQUAL, FULL, JOINT, NO_QEP, ROUND, SOLVE, WEIGHED, windows
from tiny_models import write_checkpoint

from jointq_cli.cli.main import main
from jointq_cli.data.token_weights import TokenWeights
from jointq_cli.errors import Interrupted, JointqError, PeerProcessError, ResourceError
from jointq_cli.formats.layer_file import load_layer
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.forward import final_hidden
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.accumulator import Accumulator
from jointq_cli.quantization.curvature import NO_CURVATURE, Curvature, Kfac
from jointq_cli.quantization.gradients import Gradients, collect_gradients
from jointq_cli.quantization.hessian_cache import Hessians, collect_hessians
from jointq_cli.quantization.loop import quantize_blocks
from jointq_cli.quantization.qep import QepSettings
from jointq_cli.quantization.quantizers import Quantizer
from jointq_cli.quantization.quantizers.base import ROWS
from jointq_cli.quantization.settings import LoopSettings
from jointq_cli.quantization.workspace import Workspace
from jointq_cli.system.distributed import SINGLE_PROCESS, Team
from jointq_cli.system.settings import Runtime
from jointq_cli.system.torchrun import _translated_errors, process_group


class Stop(JointqError):
    pass


@dataclass(frozen=True)
class Run:
    quantizer: Quantizer
    qep: QepSettings = NO_QEP
    inputs: str = "quantized"
    weights: TokenWeights = EQUAL
    count: int = 7  # windows, two in a batch: one process has more of them
    ahead: bool = False
    curvature: Curvature = NO_CURVATURE


RUNS = {
    "rtn": Run(ROUND, inputs="original"),
    "qep": Run(SOLVE, FULL, weights=WEIGHED),
    "jointq": Run(JOINT, FULL, weights=WEIGHED),
    "heldout": Run(replace(JOINT, lambda_mode="heldout"), replace(FULL, perccorr_mode="heldout")),
    "ahead": Run(SOLVE, inputs="original", weights=WEIGHED, ahead=True),
    "kfac": Run(SOLVE, FULL, curvature=Kfac(token_mix=0.5)),
    "one batch": Run(SOLVE, FULL, count=2),  # of which the other process has nothing
}


def quantize(folder: Path, team: Team, run: Run, pause: Callable[[], None] = lambda: None) -> Workspace:
    """A tiny model, quantised in `folder` by a process group."""
    team.on_rank0(lambda: folder.mkdir(exist_ok=True))
    team.barrier()
    model = StreamedModel(Checkpoint(folder.parent / "model"), CPU, torch.float32)
    names = frozenset(name for name in model.linear_layers() if model.block_of(name) is not None)
    plan = LoopSettings(
        run.quantizer, run.qep, names, run.inputs, run.weights, run.count, 2, 1e9, curvature=run.curvature
    )
    workspace, hessians, gradients = Workspace(folder), None, None
    with torch.no_grad():
        if isinstance(run.curvature, Kfac):
            gradients = Gradients(_made(folder / "gradients", team))
            collect_gradients(model, windows(run.count), 0, 2, gradients, lambda: None, pause, team)
            team.barrier()
        if run.ahead:
            hessians = Hessians(_made(folder / "hessians", team))
            collect_hessians(model, windows(run.count), plan, hessians, lambda: None, pause, team)
            team.barrier()
        quantize_blocks(
            model, windows(run.count), plan, workspace, lambda record: None, pause, hessians, team, gradients
        )  # fmt: skip
    team.barrier()
    return workspace


def _made(folder: Path, team: Team) -> Path:
    team.on_rank0(lambda: folder.mkdir(exist_ok=True))
    team.barrier()
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUNS, each in its folder, by two processes; and the results of the collectives on each process."""
    folder = tmp_path_factory.mktemp("together")
    write_checkpoint(folder / "model", dtype=torch.bfloat16)
    found = ended(start_all(2, [HERE / "distributed_cases.py", "together", folder], HERE))
    assert [(code, err) for code, _, err in found] == [(0, ""), (0, "")]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    write_checkpoint(folder / "model", dtype=torch.bfloat16)
    for name, run in RUNS.items():
        quantize(folder / name, SINGLE_PROCESS, run)
    return folder


def answers(folder: Path) -> list[dict[str, Any]]:
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(2)]


def test_collectives_of_two_processes(together: Path) -> None:
    first, second = answers(together)
    assert (first["on rank 0"], second["on rank 0"]) == (2, None)
    assert first["sum"] == second["sum"] == [3.0]
    assert first["gather"] == second["gather"] == [0, 1]
    assert torch.equal(first["broadcast"]["tensor"], second["broadcast"]["tensor"])
    expected = torch.tensor([[0.0] * 3, [1.0] * 3, [1.0] * 3], dtype=torch.bfloat16)
    assert torch.equal(first["rows"], expected)
    assert first["no rows"].shape == (0, 3)
    assert first["broadcast from rank 0"] == second["broadcast from rank 0"] == 0


def test_parts_are_multiples_of_the_unit_that_cover_everything_once_and_rank_0_has_the_first(together: Path) -> None:
    parts = list(zip(*(answer["part"] for answer in answers(together)), strict=True))
    assert parts == [
        (slice(0, 8), slice(8, 10)),
        (slice(0, 4), slice(4, 4)),
        (slice(0, 0), slice(0, 0)),
        (slice(0, 32), slice(32, 33)),
    ]
    assert SINGLE_PROCESS.part(10, 4) == slice(0, 10)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_have_the_codes_of_one(name: str, together: Path, alone: Path) -> None:
    """RTN's to the bit. Summing over batches in another order may change the last of 53 bits of a Hessian and so, very
    rarely, a code halfway between two levels."""
    different = total = 0
    files = sorted((alone / name / "layers").glob("*.safetensors"))
    assert len(files) == 3 * 7
    for file in files:
        expected, found = (load_layer(place / name / "layers" / file.name) for place in (alone, together))
        different += int((expected.codes != found.codes).sum())
        total += expected.codes.numel()
    assert different <= (0 if name == "rtn" else 1e-3 * total)
    shards = [sha256(place / name / "shards" / "00002.safetensors") for place in (alone, together)]
    assert different or shards[0] == shards[1]


@pytest.mark.parametrize("name", RUNS)
def test_records_of_two_processes_are_those_of_one(name: str, together: Path, alone: Path) -> None:
    for file in sorted((alone / name / "layers").glob("*.json")):
        expected, found = (json.loads((place / name / "layers" / file.name).read_text()) for place in (alone, together))
        expected, found = ({**record.pop("notes"), **record, "seconds": 0.0} for record in (expected, found))
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value), key
    blocks = [Workspace(place / name).blocks() for place in (alone, together)]
    assert [b.output_error for b in blocks[1]] == pytest.approx([b.output_error for b in blocks[0]], rel=1e-3)


@pytest.mark.slow
def test_a_run_of_two_processes_that_was_stopped_is_continued_by_one(alone: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    codes = ended(start_all(2, [HERE / "distributed_cases.py", "stopping", tmp_path], HERE))
    assert sorted(err for _, _, err in codes) == ["", "error: stopped\n"]
    assert {code for code, _, _ in codes} == {1}
    assert 0 < len(list((tmp_path / "stopped" / "layers").glob("*.json"))) < 3 * 7
    quantize(tmp_path / "stopped", SINGLE_PROCESS, RUNS["qep"])
    names = [f"shards/0000{block}.safetensors" for block in range(3)]
    assert [sha256(tmp_path / "stopped" / name) for name in names] == [sha256(alone / "qep" / name) for name in names]


@pytest.mark.slow
def test_rank_0_decides_which_layers_are_finished(alone: Path, tmp_path: Path) -> None:
    """The other process sees, on another disk, a layer that rank 0 has still to solve."""
    write_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    stale = tmp_path / "disk 1" / "layers"
    stale.mkdir(parents=True)
    for file in (alone / "qep" / "layers").glob("model.layers.0.*q_proj*"):
        shutil.copy(file, stale)
    found = ended(start_all(2, [HERE / "distributed_cases.py", "disks", tmp_path], HERE))
    assert [(code, err) for code, _, err in found] == [(0, ""), (0, "")]
    for name in (f"shards/0000{block}.safetensors" for block in range(3)):
        assert sha256(tmp_path / "disk 0" / name) == sha256(alone / "qep" / name)


@pytest.mark.slow
def test_processes_that_would_continue_at_different_blocks_are_refused(alone: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    shutil.copytree(alone / "qep", tmp_path / "disk 1")
    found = ended(start_all(2, [HERE / "distributed_cases.py", "disks", tmp_path], HERE))
    assert [code for code, _, _ in found] == [1, 1]
    problem = "process 0 finds 0 finished blocks there, process 1 3; all must see the same disk\n"
    assert "".join(err for _, _, err in found).endswith(problem)
    assert not list(tmp_path.glob("disk 0/layers/*"))


@pytest.mark.slow
def test_three_processes_recompute_an_artifact_that_is_removed_at_once(tmp_path: Path) -> None:
    found = ended(start_all(3, [HERE / "distributed_cases.py", "removing", tmp_path], HERE))
    assert [(code, err) for code, _, err in found] == [(0, "")] * 3


def test_every_collective_notices_a_process_that_has_ended(tmp_path: Path) -> None:
    found = ended(start_all(2, [HERE / "distributed_cases.py", "leaving", tmp_path], HERE))
    assert [code for code, _, _ in found] == [1, 3]
    message = "error: another process of this run has ended; the same command continues at what was finished\n"
    assert [err for _, _, err in found] == [message, ""]


def test_errors_of_collectives_are_told_apart() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"), _translated_errors():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with (
        pytest.raises(ResourceError, match=r"cannot communicate: NCCL error .*\n.*Duplicate GPU"),
        _translated_errors(),
    ):
        raise torch.distributed.DistBackendError("NCCL error in: init.cpp:3\nLast error: Duplicate GPU detected")
    with pytest.raises(PeerProcessError), _translated_errors():
        raise torch.distributed.DistBackendError("ncclRemoteError: a remote process exiting prematurely.")


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_finds_no_other_says_so_and_fails(rank: int) -> None:
    [(code, _, err)] = ended([start(rank, 2, free_port(), [HERE / "distributed_cases.py", "connecting", "1"], HERE)])
    assert code == 1
    first, *_, last = err.splitlines()  # c10d may have words of its own
    assert re.fullmatch(rf"process {rank} is waiting for the others, 2 in all, at localhost:\d+", first)
    assert last.startswith("error: the processes do not find each other: ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_process_that_waits_for_the_others(number: signal.Signals) -> None:
    process = start(0, 2, free_port(), [HERE / "distributed_cases.py", "connecting", "300"], HERE)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("process 0 is waiting")
    process.send_signal(number)
    assert [code for code, _, _ in ended([process])] == [-number]


def test_a_malformed_world_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("abc", "0", ""):
        monkeypatch.setenv("WORLD_SIZE", value)
        with (
            pytest.raises(ResourceError, match=f"^WORLD_SIZE={value}: must be the number of processes"),
            process_group(),
        ):
            pass


@pytest.mark.parametrize("words", [["plan"], ["recipes", "show", "ci_smoke"]])
def test_commands_that_are_not_parallel_run_on_rank_0_only(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen = []
    for rank in ("0", "1"):  # neither process exists as a peer of the other
        monkeypatch.setenv("RANK", rank)
        assert main(words) == 0
        seen.append(capsys.readouterr().out)
    assert seen[0]
    assert seen[1] == ""


@pytest.mark.parametrize("weighted", [False, True])
def test_moments_of_parts_add_up_to_those_of_all_tokens(weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(6, 5, 70, generator=generator) for _ in range(2))
    weights = torch.rand(6, 5, generator=generator) if weighted else None
    whole = Accumulator(70, CPU, cross=True)
    for batch in range(6):
        whole.add(x[batch], other[batch], None if weights is None else weights[batch])
    parts = [Accumulator(70, CPU, cross=True) for _ in range(2)]
    for batch in range(6):
        parts[batch // 3].add(x[batch], other[batch], None if weights is None else weights[batch])
    sent: list[torch.Tensor] = []
    parts[1].sum_over(lambda tensor: (sent.append(tensor.clone()), tensor)[1])
    parts[0].sum_over(lambda tensor: tensor.add_(sent.pop(0)))
    torch.testing.assert_close(parts[0].hessian(), whole.hessian(), rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(parts[0].cross(), whole.cross(), rtol=1e-12, atol=1e-14)
    assert parts[0].tokens == pytest.approx(whole.tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [128, 576, 1024])
def test_products_give_each_row_the_same_bits_among_any_multiple_of_rows(columns: int, dtype: torch.dtype) -> None:
    """No library promises this, but several processes have the codes of one only if it holds."""
    generator = torch.Generator().manual_seed(0)
    weight, square = (
        torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((208, columns), (columns,) * 2)
    )
    for right in (square, square.T):
        whole = weight @ right
        for first, last in ((0, ROWS), (0, 96), (96, 208), (192, 208)):
            assert torch.equal(weight[first:last] @ right, whole[first:last])


def test_windows_in_whole_batches_have_the_hidden_states_they_have_among_all(tmp_path: Path) -> None:
    model = StreamedModel(Checkpoint(write_checkpoint(tmp_path)), CPU, torch.float32)
    with torch.no_grad():
        whole = final_hidden(model, windows(5), batch=2)
        parts = [final_hidden(model, windows(5), 2, own=own) for own in (slice(0, 2), slice(2, 5), slice(5, 5))]
    assert len(parts[-1]) == 0
    assert torch.equal(torch.cat(parts), whole)


RUNTIME = Runtime()


class Third(Team):
    rank = local_rank = 2
    size = local_size = 4

    def gather(self, value: Any) -> list[Any]:
        return [None if value is None else f"{value} of process {rank}" for rank in range(4)]


def test_cores_are_divided_among_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jointq_cli.system.settings.cpu_count", lambda: 10)
    assert RUNTIME.threads() is None
    assert RUNTIME.threads(Third()) == 2
    assert replace(RUNTIME, num_threads=7).threads(Third()) == 7


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many GPUs this process sees."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU {device}"))
    return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_each_process_has_a_gpu_of_its_own(gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    gpus(4)
    assert RUNTIME.torch_device(Third()) == torch.device("cuda:2") == chosen[0]
    gpus(3)
    with pytest.raises(ResourceError, match=r"offers 3 CUDA devices .* for 4 processes; use runtime.device=cpu"):
        RUNTIME.torch_device(Third())


def test_a_process_that_is_shown_one_gpu_takes_it(gpus: Callable[[int], None]) -> None:
    gpus(1)
    assert RUNTIME.torch_device(Third()) == torch.device("cuda:0")


@pytest.mark.parametrize(("seen", "distinct"), [(["GPU 0"] * 4, 1), (["GPU 0", "GPU 1", None, "GPU 2"], 3)])
def test_processes_that_share_a_gpu_or_lack_one_are_refused(
    seen: list[str | None], distinct: int, gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(1)
    monkeypatch.setattr(Third, "gather", lambda self, value: seen)
    with pytest.raises(ResourceError, match=rf"4 processes have {distinct} CUDA devices between them"):
        RUNTIME.torch_device(Third())


# --- the command, by two processes

SMOKE = [
    "-m", "jointq_cli", "quantize", "recipe=ci_smoke", "output_dir=out", "hydra.run.dir=out/run",
    "runtime.batch_tokens=256",
]  # fmt: skip


@pytest.mark.slow
def test_an_error_is_reported_once_and_ends_all(tmp_path: Path) -> None:
    found = ended(start_all(2, [*SMOKE, "quantizer.bits=9"], tmp_path))
    assert [code for code, _, _ in found] == [1, 1]
    assert "".join(err for _, _, err in found) == "error: quantizer.bits=9: must be from 1 to 8\n"


def layer_files(directory: Path) -> int:
    return len(list(directory.glob("out/store/partial/quantize-*/layers/*.json")))


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(directory.iterdir())}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_with_one_line_and_any_number_of_processes_continues(
    number: signal.Signals, tmp_path: Path
) -> None:
    processes = start_all(2, SMOKE, tmp_path)
    while layer_files(tmp_path) < 5 and processes[0].poll() is None:
        time.sleep(0.01)
    for _ in range(2):  # by the terminal to all, and by torchrun once more
        for process in processes:
            process.send_signal(number)
    found = ended(processes)
    assert [code for code, _, _ in found] == [Interrupted.exit_code] * 2
    assert "".join(err for _, _, err in found).count("\n") == 1
    assert 5 <= layer_files(tmp_path) < 28
    assert [(code, err) for code, _, err in ended(start_all(1, SMOKE, tmp_path))] == [(0, "")]
    whole = tmp_path / "whole"
    whole.mkdir()
    found = ended(start_all(2, SMOKE, whole))
    assert [(code, err) for code, _, err in found] == [(0, ""), (0, "")]
    assert found[1][1] == ""  # only rank 0 prints
    for name in ("checkpoint", "codes"):
        assert hashes(whole / "out/run" / name) == hashes(tmp_path / "out/run" / name)
    assert json.loads((whole / "out/run/manifest.json").read_text())["processes"] == 2
    assert {path.name for path in (whole / "out").iterdir()} == {"run", "store"}


@pytest.mark.slow
def test_a_budget_is_distributed_alike(tmp_path: Path) -> None:
    """By one process and by two: the same losses, so the same map, and the same codes."""
    words = [*SMOKE, "allocation=budget", "allocation.bits_per_weight=3.2", "allocation.sensitivity=fisher"]
    for size in (1, 2):
        place = tmp_path / str(size)
        place.mkdir()
        assert [(code, err) for code, _, err in ended(start_all(size, words, place))] == [(0, "")] * size
    runs = [tmp_path / size / "out/run" for size in "12"]
    assert hashes(runs[0] / "codes") == hashes(runs[1] / "codes")
    assert sha256(runs[0] / "allocation.yaml") == sha256(runs[1] / "allocation.yaml")


@pytest.mark.slow
def test_when_one_process_is_killed_the_others_end(tmp_path: Path) -> None:
    for victim in (0, 1):
        processes = start_all(2, SMOKE, tmp_path)
        done = layer_files(tmp_path)
        while layer_files(tmp_path) < done + 3 and processes[0].poll() is None:
            time.sleep(0.01)
        processes[victim].kill()
        found = ended(processes)
        assert found[victim][0] == -signal.SIGKILL
        assert found[1 - victim][0] == 1
        assert found[1 - victim][2].count("\n") <= 1


@pytest.mark.slow
def test_a_sweep_by_two_processes_is_refused_in_one_line(tmp_path: Path) -> None:
    found = ended(start_all(2, [*SMOKE[:3], "-m", *SMOKE[3:5], "quantizer.bits=4,3"], tmp_path))
    assert [code for code, _, _ in found] == [2, 2]
    assert "".join(err for _, _, err in found).count("\n") == 1
    assert not list(tmp_path.glob("**/job.json"))


@pytest.mark.slow
def test_an_evaluation_by_two_processes_scores_every_window(tmp_path: Path) -> None:
    evaluate = [
        "-m", "jointq_cli", "evaluate", "model=pocket", "evaluation.seqlen=128", "evaluation.max_windows=5",
        "runtime.batch_tokens=256", "hydra.run.dir=out",
    ]  # fmt: skip
    for place, size in (("one", 1), ("two", 2)):
        (tmp_path / place).mkdir()
        assert {code for code, _, _ in ended(start_all(size, evaluate, tmp_path / place))} == {0}
    reports = [json.loads((tmp_path / place / "out/evaluation.json").read_text()) for place in ("one", "two")]
    assert reports[0]["perplexity"] == reports[1]["perplexity"]
