"""The order in which the layers of a block run, from several forward passes of which none may reach all experts."""

from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

from jointq_cli.errors import ModelError

Run = list[list[str]]  # names of layers in the order they ran, those that read the same tensor together


def merged(runs: Sequence[Run], layers: Sequence[str]) -> Run:
    """The groups of all passes in one order that agrees with each pass.

    layers: all names, in the order of the model. Layers that no pass has both reached follow the numbers in their names
    (experts.0, experts.1, ...), then the order of the model. Raises ModelError where passes contradict each other.
    """
    groups: Run = []
    number: dict[str, int] = {}
    sorter = TopologicalSorter[int]()
    for run in runs:
        for group in run:
            new = [name for name in group if name not in number]
            if new:
                number |= dict.fromkeys(new, len(groups))
                groups.append(new)
        order = list(dict.fromkeys(number[name] for group in run for name in group))
        for group_number in order:
            sorter.add(group_number)
        for before, after in pairwise(order):
            sorter.add(after, before)

    def rank(group: int) -> tuple[list[int], int]:
        name = groups[group][0]
        return [int(part) for part in name.split(".") if part.isdigit()], layers.index(name)

    try:
        sorter.prepare()
    except CycleError as error:
        name = groups[error.args[1][0]][0]
        raise ModelError(
            f"{name}: runs before other layers for some tokens, after them for others; exclude it"
        ) from error
    ordered, ready = [], list(sorter.get_ready())
    while ready:
        first = min(ready, key=rank)
        ready.remove(first)
        ordered.append(groups[first])
        sorter.done(first)
        ready += sorter.get_ready()
    return ordered
