"""What the processes of a group do in tests: `python distributed_cases.py CASE FOLDER`, started as by torchrun."""

import hashlib
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # loop_cases and tiny_models, in a process of its own


def start(rank: int, size: int, port: int, command: Sequence[object], directory: Path) -> subprocess.Popen[str]:
    """One process with the environment that torchrun gives it."""
    members = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=directory,
        env={**os.environ, **{name: str(value) for name, value in {**members, **meeting}.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return int(listening.getsockname()[1])


def start_all(size: int, command: Sequence[object], directory: Path) -> list[subprocess.Popen[str]]:
    port = free_port()
    return [start(rank, size, port, command, directory) for rank in range(size)]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each; processes that hang are killed, and the test fails."""
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


# --- the cases


def together(folder: Path) -> None:
    """The results of all collectives, by rank; then the tiny models of test_distributed.RUNS, quantised."""
    import torch
    from test_distributed import RUNS, quantize

    from jointq_cli.system.torchrun import process_group

    torch.set_num_threads(1)
    with process_group() as team:
        mine = torch.full((team.rank + 1, 3), float(team.rank), dtype=torch.bfloat16)
        answers = {
            "part": [team.part(count, unit) for count, unit in ((10, 4), (4, 4), (0, 4), (33, 16))],
            "on rank 0": team.on_rank0(lambda value: value + 1, 1),
            "sum": team.all_reduce_sum(torch.tensor([1.0 + team.rank], dtype=torch.float64)).tolist(),
            "broadcast": team.broadcast({"tensor": mine}),
            "gather": team.gather(team.rank),
            "rows": team.gather_rows(mine),
            "no rows": team.gather_rows(mine[:0]),
            "broadcast from rank 0": team.broadcast_from_rank0(lambda: team.rank),
        }
        team.barrier()
        (folder / f"{team.rank}.pickle").write_bytes(pickle.dumps(answers))
        for name, run in RUNS.items():
            quantize(folder / name, team, run)


def stopping(folder: Path) -> None:
    """A run that rank 0, and therefore every process, stops somewhere."""
    from test_distributed import RUNS, Stop, quantize

    from jointq_cli.system.torchrun import process_group

    with process_group() as team:
        left = 25

        def pause() -> None:
            nonlocal left
            left -= team.rank == 0
            if not left:
                raise Stop("stopped")

        quantize(folder / "stopped", team, RUNS["qep"], pause)


def disks(folder: Path) -> None:
    """A run whose processes do not share a disk."""
    import torch
    from test_distributed import RUNS, quantize

    from jointq_cli.system.torchrun import process_group

    torch.set_num_threads(1)
    with process_group() as team:
        quantize(folder / f"disk {team.rank}", team, RUNS["qep"])


def removing(folder: Path) -> None:
    """An artifact that all processes compute together is removed once, as soon as it exists."""
    from jointq_cli.system.inventory import entries, remove
    from jointq_cli.system.store import Store
    from jointq_cli.system.torchrun import process_group

    class Emptied(Store):
        made = 0

        def _compute(self, *given: Any) -> bool:
            done = super()._compute(*given)
            self.made += 1
            if self.made == 1:
                assert remove(self.root, entries(self.root)[0])
            return done

    with process_group() as team, Emptied(folder / "store", team=team) as store:

        def make(scratch: Path) -> None:
            ranks = team.gather(team.rank)
            team.on_rank0(lambda: (scratch / "ranks").write_text(str(ranks)))

        artifact = store.reuse("stage", "0" * 64, make, together=True)
        assert (artifact.path / "ranks").read_text() == "[0, 1, 2]"
        assert team.gather(store.made) == [2, 0, 0]  # only rank 0 writes


def connecting(folder: Path) -> None:
    """A rendezvous with a short timeout."""
    from datetime import timedelta

    from jointq_cli.system import torchrun

    torchrun._NOTICE_AFTER, torchrun._RENDEZVOUS_TIMEOUT = 0.1, timedelta(seconds=float(folder.name))
    with torchrun.process_group():
        pass


def leaving(folder: Path) -> None:
    """One process exits without a message while the other is in a collective operation."""
    import torch

    from jointq_cli.errors import PeerProcessError
    from jointq_cli.system.torchrun import process_group

    with process_group() as team:
        if team.rank == 1:
            os._exit(3)
        one = torch.ones(1)
        for collective in (team.gather, team.all_reduce_sum, team.broadcast, team.gather_rows):
            try:
                collective(one)
            except PeerProcessError as error:
                last = error
            else:
                raise AssertionError(collective)
        raise last


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    from jointq_cli.errors import AlreadyReported, JointqError

    try:
        globals()[sys.argv[1]](Path(sys.argv[2]))
    except JointqError as error:
        if not isinstance(error, AlreadyReported):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
