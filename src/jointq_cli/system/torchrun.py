"""Process groups of several processes over torch.distributed: gloo for CPU tensors, NCCL for CUDA tensors.

torchrun (or srun) starts the processes and sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Here are the rendezvous,
the collectives, and how an error in one process ends all of them.
"""

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from jointq_cli.errors import AlreadyReported, JointqError, PeerProcessError, ResourceError
from jointq_cli.system.distributed import SINGLE_PROCESS, Team
from jointq_cli.system.interrupts import handled_by

T = TypeVar("T")

_RENDEZVOUS_TIMEOUT = timedelta(minutes=10)
_NOTICE_AFTER = 10.0  # seconds of waiting for the other processes before a line says so
# The others may wait for hours while rank 0 computes alone. A process that has died is detected without a timeout: its
# connections break, and torchrun ends the others.
_COLLECTIVE_TIMEOUT = timedelta(days=30)
_FAILURES = "failures"  # the number of processes that have failed, counted in the rendezvous store
_CPU = torch.device("cpu")
_CONNECTION_LOST = re.compile(
    "closed by (remote )?peer|reset by peer|broken pipe|timed out|no route to host|remote process exiting", re.I
)


class _ProcessGroup(Team):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.local_rank = int(os.environ.get("LOCAL_RANK", rank))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))

    def broadcast_from_rank0(self, action: Callable[..., T], *args: Any) -> T:
        results: list[Any] = [self.on_rank0(action, *args)]
        with _translated_errors():
            dist.broadcast_object_list(results, device=_CPU)
        result: T = results[0]
        return result

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        with _translated_errors():
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, value: T) -> T:
        return self.broadcast_from_rank0(lambda: value)

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        with _translated_errors():
            dist.all_gather_object(values, value)
        return values

    def gather_rows(self, tensor: Tensor) -> Tensor:
        counts = self.gather(len(tensor))
        own = tensor.cpu().contiguous()
        if self.rank > 0:
            if len(own):
                with _translated_errors():
                    dist.send(_bytes(own), 0)
            return tensor
        gathered = own.new_empty((sum(counts), *own.shape[1:]))
        parts = gathered.split(counts)
        parts[0].copy_(own)
        for rank, part in enumerate(parts):
            if rank > 0 and len(part):
                with _translated_errors():
                    dist.recv(_bytes(part), rank)
        return gathered

    def barrier(self) -> None:
        self.gather(None)  # not dist.barrier, which would use NCCL and synchronise the GPUs


@contextmanager
def process_group() -> Iterator[Team]:
    """The process group that torchrun's environment describes, or that of one process without such an environment.

    An error in one process ends them all. The process that fails first raises its own error and so reports it; the
    others raise AlreadyReported. Raises ResourceError where the processes cannot connect to each other.
    """
    if _world_size() == 1:
        yield SINGLE_PROCESS
        return
    store, team = _rendezvous()
    try:
        yield team
    except JointqError as error:
        if _fails_first(store):
            raise
        raise AlreadyReported(error) from error
    # Not after an error: NCCL would wait for the others, and the end of this process closes their connections.
    with suppress(RuntimeError):
        dist.destroy_process_group()


def is_rank0() -> bool:
    """Whether this is rank 0 according to torchrun's environment. Connects to no other process."""
    return _world_size() == 1 or os.environ.get("RANK", "0") == "0"


def _world_size() -> int:
    value = os.environ.get("WORLD_SIZE", "1")
    if not value.isdecimal() or int(value) < 1:
        raise ResourceError(f"WORLD_SIZE={value}: must be the number of processes, as torchrun sets it")
    return int(value)


def _rendezvous() -> tuple[Any, Team]:
    """The key-value store that all processes share, and the initialised process group."""
    try:
        with _waiting_notice():
            store, rank, size = next(rendezvous("env://", timeout=_RENDEZVOUS_TIMEOUT))
            store.set_timeout(_COLLECTIVE_TIMEOUT)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
            common = PrefixStore("jointq", store)
            dist.init_process_group(backend, store=common, rank=rank, world_size=size, timeout=_COLLECTIVE_TIMEOUT)
        return store, _ProcessGroup(rank, size)
    except (ValueError, RuntimeError) as error:
        raise ResourceError(f"the processes do not find each other: {str(error).splitlines()[0]}") from error


@contextmanager
def _waiting_notice() -> Iterator[None]:
    """Prints a line if the rendezvous takes long. Inside, Ctrl-C and the like end the process at once: c10d blocks in
    C++, where no Python handler runs."""
    rank, host, port = (os.environ.get(name, "") for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    notice = f"process {rank} is waiting for the others, {_world_size()} in all, at {host}:{port}"
    timer = threading.Timer(_NOTICE_AFTER, print, [notice], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    with handled_by(signal.SIG_DFL):
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def _fails_first(store: Any) -> bool:
    try:
        return int(store.add(_FAILURES, 1)) == 1
    except RuntimeError:  # the store ended with rank 0, which has reported its error
        return False


@contextmanager
def _translated_errors() -> Iterator[None]:
    """Turns a lost connection into PeerProcessError and other errors of torch.distributed into ResourceError; any other
    error passes, such as a GPU out of memory."""
    try:
        yield
    except RuntimeError as error:
        if _CONNECTION_LOST.search(str(error)):
            raise PeerProcessError(
                "another process of this run has ended; the same command continues at what was finished"
            ) from error
        if isinstance(error, dist.DistError):
            raise ResourceError(f"the processes cannot communicate: {error}") from error
        raise


def _bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor viewed as (nbytes,) uint8, since no backend sends every dtype."""
    return tensor.view(-1).view(torch.uint8)
