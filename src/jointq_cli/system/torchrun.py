"""Teams of several processes, over torch.distributed: gloo, and on GPUs NCCL.

torchrun starts the processes and says in the environment which is which. Knows how they meet, talk and end together.
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

T = TypeVar("T")

_MEETING = timedelta(minutes=10)  # for the last to come after the first
_SILENCE = 10.0  # seconds of it, before a line says what is waited for
# Others wait while the leader works alone, for hours perhaps. One that has died is noticed without a clock: its
# connections break, and torchrun ends the others.
_PATIENCE = timedelta(days=30)
_FAILURES = "failures"  # counted in the processes' common store
_CPU = torch.device("cpu")
_LOST = re.compile(
    "closed by (remote )?peer|reset by peer|broken pipe|timed out|no route to host|remote process exiting", re.I
)


class _Processes(Team):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.local_rank = int(os.environ.get("LOCAL_RANK", rank))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))

    def broadcast_from_rank0(self, action: Callable[..., T], *given: Any) -> T:
        answers: list[Any] = [self.on_rank0(action, *given)]
        with _broken():
            dist.broadcast_object_list(answers, device=_CPU)
        answer: T = answers[0]
        return answer

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        with _broken():
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, value: T) -> T:
        return self.broadcast_from_rank0(lambda: value)

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        with _broken():
            dist.all_gather_object(values, value)
        return values

    def gather_rows(self, tensor: Tensor) -> Tensor:
        counts = self.gather(len(tensor))
        own = tensor.cpu().contiguous()
        if self.rank > 0:
            if len(own):
                with _broken():
                    dist.send(_bytes(own), 0)
            return tensor
        everything = own.new_empty((sum(counts), *own.shape[1:]))
        parts = everything.split(counts)
        parts[0].copy_(own)
        for rank, part in enumerate(parts):
            if rank > 0 and len(part):
                with _broken():
                    dist.recv(_bytes(part), rank)
        return everything

    def barrier(self) -> None:
        self.gather(None)  # and not a barrier, which would be the GPUs' where there are some


@contextmanager
def process_group() -> Iterator[Team]:
    """The team that torchrun's environment describes, a team of one where there is none.

    What goes wrong ends them all. It is told by the process that fails first; the others raise Echo, which is not told.
    """
    if _size() == 1:
        yield SINGLE_PROCESS
        return
    store, team = _met()
    try:
        yield team
    except JointqError as error:
        if _fails_first(store):
            raise
        raise AlreadyReported(error) from error
    # Not behind an error: NCCL would wait for the others, and the end of this process closes what they wait for.
    with suppress(RuntimeError):
        dist.destroy_process_group()


def is_rank0() -> bool:
    """Whether this process would lead the team that torchrun's environment describes. Meets nobody."""
    return _size() == 1 or os.environ.get("RANK", "0") == "0"


def _size() -> int:
    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isdecimal() or int(given) < 1:
        raise ResourceError(f"WORLD_SIZE={given}: must be the number of processes, as torchrun gives it")
    return int(given)


def _met() -> tuple[Any, Team]:
    try:
        with _waiting():
            store, rank, size = next(rendezvous("env://", timeout=_MEETING))
            store.set_timeout(_PATIENCE)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
            common = PrefixStore("jointq", store)
            dist.init_process_group(backend, store=common, rank=rank, world_size=size, timeout=_PATIENCE)
        return store, _Processes(rank, size)
    except (ValueError, RuntimeError) as error:
        raise ResourceError(f"the processes do not find each other: {str(error).splitlines()[0]}") from error


@contextmanager
def _waiting() -> Iterator[None]:
    """Says what is waited for if that takes long. Ctrl-C ends the process at once: c10d lets no Python handler run."""
    rank, place = (os.environ.get(name, "") for name in ("RANK", "MASTER_ADDR"))
    told = f"process {rank} is waiting for the others, {_size()} in all, at {place}:{os.environ.get('MASTER_PORT', '')}"
    clock = threading.Timer(_SILENCE, print, [told], {"file": sys.stderr, "flush": True})
    clock.daemon = True
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    clock.start()
    try:
        yield
    finally:
        clock.cancel()
        signal.signal(signal.SIGINT, handler)


def _fails_first(store: Any) -> bool:
    try:
        return int(store.add(_FAILURES, 1)) == 1
    except RuntimeError:  # it ended with the leader, who has said why
        return False


@contextmanager
def _broken() -> Iterator[None]:
    """Tells a connection that broke as what it means, and what else goes wrong in talking as what it is. All other
    errors pass: a GPU without memory, say."""
    try:
        yield
    except RuntimeError as error:
        if _LOST.search(str(error)):
            raise PeerProcessError(
                "another process of this run has ended; the same command continues at what was finished"
            ) from error
        if isinstance(error, dist.DistError):
            raise ResourceError(f"the processes cannot talk to each other: {error}") from error
        raise


def _bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor as bytes, which every backend sends, whatever the dtype."""
    return tensor.view(-1).view(torch.uint8)
