"""Several processes that do one run together: who is who, what they add up, hand on and wait for.

torchrun starts the processes and says in the environment which is which; process 0 leads, and it alone writes. A team
of one does nothing, so callers never ask how many there are. Knows tensors and objects, not what they mean.
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

T = TypeVar("T")

# Others wait while the leader works alone, for hours perhaps. One that has died is noticed without a clock: its
# connections break, and torchrun ends the others.
_PATIENCE = timedelta(days=30)
_FAILURES = "failures"  # counted in the processes' common store


class Team:
    """One process on its own, and what every member of a team can be asked."""

    rank = 0
    size = 1
    local_rank = 0  # among the processes of this machine
    local_size = 1

    def part(self, count: int, unit: int = 1) -> slice:
        """This process's share of `count` things that follow each other, in whole units; the first is the leader's."""
        units = -(-count // unit)
        start, stop = (-(-units * rank // self.size) * unit for rank in (self.rank, self.rank + 1))
        return slice(min(start, count), min(stop, count))

    def lead(self, action: Callable[..., T], *given: Any) -> T | None:
        """`action(*given)` by the leader; None for the others, who do not wait."""
        return action(*given) if self.rank == 0 else None

    def first(self, action: Callable[[], T]) -> T:
        """`action()` by the leader, and by the others when it is done: they find what it made."""
        return action()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes of a contiguous tensor, in its place."""
        return tensor

    def share(self, value: T) -> T:
        """The leader's value; its tensors should lie in main memory."""
        return value

    def gather(self, value: T) -> list[T]:
        """Everybody's values in the order of the processes; their tensors should lie in main memory."""
        return [value]

    def rows(self, tensor: Tensor) -> Tensor:
        """Everybody's rows, one process's behind the other's, for the leader; the others get their own back."""
        return tensor

    def wait(self) -> None:
        """Until all have come here."""
        return None


ALONE = Team()


class _Processes(Team):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.local_rank = int(os.environ.get("LOCAL_RANK", rank))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))

    def first(self, action: Callable[[], T]) -> T:
        if self.rank > 0:
            self.wait()
            return action()
        done = action()
        self.wait()
        return done

    def sum(self, tensor: Tensor) -> Tensor:
        with _broken():
            dist.all_reduce(tensor)
        return tensor

    def share(self, value: T) -> T:
        values = [value]
        with _broken():
            dist.broadcast_object_list(values, device=_CPU)
        return values[0]

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


_CPU = torch.device("cpu")


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
