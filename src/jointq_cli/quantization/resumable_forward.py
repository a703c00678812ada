"""Forward passes of one block that can be suspended at the input of each group of layers.

A layer is solved for inputs that the quantised layers before it compute, those of its own block included, so its
calibration activations are known only when these have been replaced. A forward pass is therefore suspended at a group's
input, and resumed with the new weights when the group has been solved: the model's own forward, run as a coroutine (a
greenlet) that forward hooks suspend. That takes one forward pass per batch and block, however many groups there are,
and memory for the activations inside suspended passes. A pass that may not hold them is restarted for every group, and
has the same bits.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from jointq_cli.errors import ModelError


@dataclass(frozen=True)
class ModuleCall:
    """The arguments of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def group_hooks(
    groups: Sequence[Sequence[nn.Module]],
    writers: Mapping[nn.Module, float],
    called: Mapping[int, nn.Module] | None = None,
) -> Iterator[None]:
    """Inside, a ResumableForward stops at the input of each group of layers; groups are in the order they run.

    writers: modules whose outputs, times a factor, a ResumableForward adds up. called: the modules of groups (without
    layers of their own here) at whose call it stops as a whole.
    """
    handles = [
        layer.register_forward_pre_hook(lambda _, args, number=number: _suspend_at(number, args[0]))
        for number, group in enumerate(groups)
        for layer in group
    ]
    handles += [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, number=number: _suspend_at_call(number, ModuleCall(args, kwargs)), with_kwargs=True
        )
        for number, module in (called or {}).items()
    ]
    handles += [
        layer.register_forward_hook(
            lambda _, args, output, factor=factor: _add_output(getcurrent(), factor * first_tensor(output))
        )
        for layer, factor in writers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class ResumableForward:
    """The forward pass of one batch. Between two groups it is suspended, or if it is not `suspendable` restarted."""

    def __init__(self, forward: Callable[[], Tensor], *, suspendable: bool) -> None:
        self._forward = forward
        self._suspendable = suspendable
        self._changes: dict[int, Callable[[ModuleCall], ModuleCall]] = {}
        self._coroutine = _ForwardCoroutine(forward, self._changes)

    def input_of(self, group: int) -> tuple[Tensor | None, Tensor | None]:
        """The input of a group's layers, None if the pass does not run them; and the sum of the writers' outputs until
        then, None if none has run. Groups can only be requested in order."""
        inputs = self._coroutine.run_to(group)
        written = self._coroutine.written
        if not self._suspendable:
            self._restart()
        assert inputs is None or isinstance(inputs, Tensor)
        return inputs, written

    def call_of(self, group: int) -> ModuleCall | None:
        """How the module of a group is called, None if the pass does not call it. May be asked for several times."""
        call = self._coroutine.run_to(group)
        if not self._suspendable:
            self._restart()
        assert call is None or isinstance(call, ModuleCall)
        return call

    def change_call(self, group: int, change: Callable[[ModuleCall], ModuleCall]) -> None:
        """From here on the pass calls the module of a group with what `change` returns for the call."""
        self._changes[group] = change

    def output(self) -> Tensor:
        """Runs the rest of the pass."""
        output = self._coroutine.run_to_end()
        self._restart()
        return output

    def _restart(self) -> None:
        self._coroutine = _ForwardCoroutine(self._forward, self._changes)  # which frees the activations of the old one


class _ForwardCoroutine(greenlet):
    """A forward pass that returns control to its caller at each group."""

    def __init__(
        self, forward: Callable[[], Tensor], changes: Mapping[int, Callable[[ModuleCall], ModuleCall]]
    ) -> None:
        super().__init__(forward)
        self.changes = changes
        self._group = -1
        self._passed: set[int] = set()
        self._inputs: Tensor | ModuleCall | None = None
        self._output: Tensor | None = None
        self.written: Tensor | None = None

    def run_to(self, group: int) -> Tensor | ModuleCall | None:
        while self._group < group and self._output is None:
            self._resume()
        return self._inputs if self._group == group else None

    def run_to_end(self) -> Tensor:
        while self._output is None:
            self._resume()
        return self._output

    def reaches(self, group: int, inputs: Tensor | ModuleCall) -> bool:
        """Whether to stop here: at the first layer of a group, not at the others. Raises ModelError where another pass
        has run the groups in another order."""
        if group in self._passed:
            return False
        if group < self._group:
            raise ModelError("the layers of a block run in an order that depends on the tokens; exclude some of them")
        self._passed.add(group)
        self._group, self._inputs = group, inputs
        return True

    def _resume(self) -> None:
        self._inputs = None
        returned = self.switch()
        if self.dead:
            self._output = returned


def _suspend_at(group: int, inputs: Tensor) -> None:
    if _reaches(getcurrent(), group, inputs):
        # No name in this frame may refer to the coroutine: one that its own frames keep alive is never freed.
        getcurrent().parent.switch()  # type: ignore[union-attr]  # a _ForwardCoroutine has one


def _suspend_at_call(group: int, call: ModuleCall) -> tuple[Any, dict[str, Any]] | None:
    if not isinstance(getcurrent(), _ForwardCoroutine):
        return None
    if _reaches(getcurrent(), group, call):
        getcurrent().parent.switch()  # type: ignore[union-attr]  # as above
    change = getcurrent().changes.get(group)  # type: ignore[attr-defined]
    changed = call if change is None else change(call)
    return changed.args, changed.kwargs


def _reaches(current: greenlet, group: int, inputs: Tensor | ModuleCall) -> bool:
    return isinstance(current, _ForwardCoroutine) and current.reaches(group, inputs)


def first_tensor(output: Any) -> Tensor:
    """What a module returns, or the first of several."""
    tensor: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return tensor


def _add_output(current: greenlet, output: Tensor) -> None:
    if isinstance(current, _ForwardCoroutine):
        current.written = output if current.written is None else current.written + output
