"""Several processes that do one run together: what each of them can ask.

Process 0 leads, and it alone writes. A team of one does nothing, so callers never ask how many there are. Knows tensors
and objects, not what they mean; `processes` has teams of several. Imports no torch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jointq_cli.errors import ResourceError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


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

    def on_rank0(self, action: Callable[..., T], *given: Any) -> T | None:
        """`action(*given)` by the leader; None for the others, who do not wait."""
        return action(*given) if self.rank == 0 else None

    def broadcast_from_rank0(self, action: Callable[..., T], *given: Any) -> T:
        """What the leader's `action(*given)` answers, for all; its tensors should lie in main memory."""
        return action(*given)

    def require_equal(self, place: Path, what: str, found: T) -> T:
        """What all have found at `place`. Raises ResourceError where one has found something else than the leader."""
        everybodys = self.gather(found)
        for rank, other in enumerate(everybodys):
            if other != everybodys[0]:
                raise ResourceError(
                    f"{place}: process 0 finds {everybodys[0]} {what} there, process {rank} {other}; "
                    f"all must see the same disk"
                )
        return found

    def all_reduce_sum(self, tensor: "Tensor") -> "Tensor":
        """The sum over all processes of a contiguous tensor, in its place."""
        return tensor

    def broadcast(self, value: T) -> T:
        """The leader's value; its tensors should lie in main memory."""
        return value

    def gather(self, value: T) -> list[T]:
        """Everybody's values in the order of the processes; their tensors should lie in main memory."""
        return [value]

    def gather_rows(self, tensor: "Tensor") -> "Tensor":
        """Everybody's rows, one process's behind the other's, for the leader; the others get their own back."""
        return tensor

    def barrier(self) -> None:
        """Until all have come here."""
        return None


SINGLE_PROCESS = Team()
