"""Teams of several processes, over torch.distributed: gloo, and on GPUs NCCL.

torchrun starts the processes and says in the environment which is which. Knows how they meet, talk and end together.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from jointq_cli.errors import Echo, JointqError, ResourceError, TeamError
from jointq_cli.team import ALONE, Team

T = TypeVar("T")

# Others wait while the leader works alone, for hours perhaps. One that has died is noticed without a clock: its
# connections break, and torchrun ends the others.
_PATIENCE = timedelta(days=30)
_FAILURES = "failures"  # counted in the processes' common store
_CPU = torch.device("cpu")


class _Processes(Team):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.local_rank = int(os.environ.get("LOCAL_RANK", rank))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))

    def led(self, action: Callable[..., T], *given: Any) -> T:
        answers: list[Any] = [self.lead(action, *given)]
        with _broken():
            dist.broadcast_object_list(answers, device=_CPU)
        answer: T = answers[0]
        return answer

    def sum(self, tensor: Tensor) -> Tensor:
        with _broken():
            dist.all_reduce(tensor)
        return tensor

    def share(self, value: T) -> T:
        return self.led(lambda: value)

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        with _broken():
            dist.all_gather_object(values, value)
        return values

    def rows(self, tensor: Tensor) -> Tensor:
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

    def wait(self) -> None:
        self.gather(None)  # and not a barrier, which would be the GPUs' where there are some


@contextmanager
def joined() -> Iterator[Team]:
    """The team that torchrun's environment describes, a team of one where there is none.

    What goes wrong ends them all. It is told by the process that fails first; the others raise Echo, which is not told.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    store, team = _met()
    try:
        yield team
    except JointqError as error:
        if _fails_first(store):
            raise
        raise Echo(error) from error
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group()


def _met() -> tuple[Any, Team]:
    try:
        store, rank, size = next(rendezvous("env://", timeout=_PATIENCE))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        common = PrefixStore("jointq", store)
        dist.init_process_group(backend, store=common, rank=rank, world_size=size, timeout=_PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise ResourceError(f"the processes do not find each other: {str(error).splitlines()[0]}") from error
    return store, _Processes(rank, size)


def _fails_first(store: Any) -> bool:
    try:
        return int(store.add(_FAILURES, 1)) == 1
    except RuntimeError:  # it ended with the leader, who has said why
        return False


@contextmanager
def _broken() -> Iterator[None]:
    """Tells a connection that broke as what it means."""
    try:
        yield
    except RuntimeError as error:
        raise TeamError(
            "another process of this run has ended; the same command continues at what was finished"
        ) from error


def _bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor as bytes, which every backend sends, whatever the dtype."""
    return tensor.view(-1).view(torch.uint8)
