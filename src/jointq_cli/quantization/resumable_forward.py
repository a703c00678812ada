"""Forward passes of one block that stop where the input of a group of layers is there to be seen.

A layer is solved for what the quantised layers before it produce, those of its own block included, so its input is not
known before they have been replaced. A pass therefore stops at a group's input, waits while the group is solved, and
goes on through the new weights: the model's own forward, run as a coroutine (a greenlet). That takes one forward pass
per batch and block, however many groups there are. The price is the activations that lie in a waiting pass; where
these would be too many, a pass starts anew for every group, and gives the same bits.

Knows modules and a way to call them. Knows neither models, statistics nor quantizers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from greenlet import getcurrent, greenlet
from torch import Tensor, nn


@contextmanager
def stops(groups: Sequence[Sequence[nn.Module]], writers: Mapping[nn.Linear, float]) -> Iterator[None]:
    """Inside, a Pass can be stopped at the input of each group of layers; groups are in the order they are run.

    writers: layers of which a Pass keeps the outputs, so many times each, added up.
    """
    handles = [
        layer.register_forward_pre_hook(lambda _, given, number=number: _reached(number, given[0]))
        for number, group in enumerate(groups)
        for layer in group
    ]
    handles += [
        layer.register_forward_hook(lambda _, given, output, factor=factor: _wrote(getcurrent(), factor * output))
        for layer, factor in writers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Pass:
    """One batch on its way through a block. `waits`: it keeps its place between two groups, and starts anew if not."""

    def __init__(self, forward: Callable[[], Tensor], *, suspendable: bool) -> None:
        self._forward = forward
        self._waits = suspendable
        self._flow = _Flow(forward)

    def input_of(self, group: int) -> tuple[Tensor | None, Tensor | None]:
        """What the layers of a group are given, None if the pass does not come by; and what the writers that were
        passed by then have put out, None if there was none. Groups are asked for in order."""
        given = self._flow.run_to(group)
        written = self._flow.written
        if not self._waits:
            self._start_anew()
        return given, written

    def output(self) -> Tensor:
        """What the block returns: the end of the pass."""
        output = self._flow.run_out()
        self._start_anew()
        return output

    def _start_anew(self) -> None:
        self._flow = _Flow(self._forward)  # which frees what the old one held


class _Flow(greenlet):
    """A forward pass that hands control back where it is wanted."""

    def __init__(self, forward: Callable[[], Tensor]) -> None:
        super().__init__(forward)
        self._group = -1
        self._given: Tensor | None = None
        self._output: Tensor | None = None
        self.written: Tensor | None = None

    def run_to(self, group: int) -> Tensor | None:
        while self._group < group and self._output is None:
            self._go_on()
        return self._given if self._group == group else None

    def run_out(self) -> Tensor:
        while self._output is None:
            self._go_on()
        return self._output

    def arrives(self, group: int, given: Tensor) -> bool:
        """Whether to stop here: at the first layer of a group, not at those that run with it."""
        if group <= self._group:
            return False
        self._group, self._given = group, given
        return True

    def _go_on(self) -> None:
        self._given = None
        handed_over = self.switch()
        if self.dead:
            self._output = handed_over


def _reached(group: int, given: Tensor) -> None:
    if _arrives(getcurrent(), group, given):
        # No name in this frame may hold the flow: a coroutine that is kept alive by its own frames is never freed.
        getcurrent().parent.switch()  # type: ignore[union-attr]  # a _Flow has one


def _arrives(flow: greenlet, group: int, given: Tensor) -> bool:
    return isinstance(flow, _Flow) and flow.arrives(group, given)


def _wrote(flow: greenlet, output: Tensor) -> None:
    if isinstance(flow, _Flow):
        flow.written = output if flow.written is None else flow.written + output
