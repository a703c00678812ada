"""The process group of a run: the collectives that the rest of the package uses, here for a single process.

Only rank 0 writes files. With one process every collective is the identity, so callers need not distinguish the two
cases. `torchrun` implements groups of several processes. Imports no torch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jointq_cli.errors import ResourceError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class Team:
    """A process group, as seen by one of its processes; this base class is the group of one.

    All processes must call the collectives (every method except `part` and `on_rank0`) in the same order. Objects are
    pickled, and tensors inside them should be on the CPU.
    """

    rank = 0
    size = 1  # the world size
    local_rank = 0  # among the processes of this machine
    local_size = 1

    def part(self, count: int, unit: int = 1) -> slice:
        """This process's slice of range(count), in multiples of `unit`; rank 0 has the first slice."""
        units = -(-count // unit)
        start, stop = (-(-units * rank // self.size) * unit for rank in (self.rank, self.rank + 1))
        return slice(min(start, count), min(stop, count))

    def on_rank0(self, action: Callable[..., T], *args: Any) -> T | None:
        """`action(*args)` on rank 0; None on the others, which do not wait for it."""
        return action(*args) if self.rank == 0 else None

    def broadcast_from_rank0(self, action: Callable[..., T], *args: Any) -> T:
        """Calls `action(*args)` on rank 0 only and returns the result on every process."""
        return action(*args)

    def require_equal(self, place: Path, what: str, found: T) -> T:
        """`found`, once it is the same on every process. Raises ResourceError if a process has found something else at
        `place` than rank 0, as happens when the processes do not share a disk."""
        values = self.gather(found)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise ResourceError(
                    f"{place}: process 0 finds {values[0]} {what} there, process {rank} {other}; "
                    f"all must see the same disk"
                )
        return found

    def all_reduce_sum(self, tensor: "Tensor") -> "Tensor":
        """The sum of a contiguous tensor over all processes, in place."""
        return tensor

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every process."""
        return value

    def gather(self, value: T) -> list[T]:
        """The values of all processes in the order of their ranks, on every process (all_gather)."""
        return [value]

    def gather_rows(self, tensor: "Tensor") -> "Tensor":
        """On rank 0 the rows of all processes concatenated in the order of ranks, (sum of rows, ...) on the CPU where
        there are several; the other processes get their own tensor back. Trailing dimensions and dtype must agree."""
        return tensor

    def barrier(self) -> None:
        """Returns once every process has called it."""
        return None


SINGLE_PROCESS = Team()
