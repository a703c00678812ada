"""Suspended forward passes: the inputs of an uninterrupted pass, with the weights at the time they are resumed."""

import weakref

import pytest
import torch
from torch import Tensor, nn

from jointq_cli.errors import ModelError
from jointq_cli.quantization.resumable_forward import ResumableForward, group_hooks


class Toy(nn.Module):
    """Two layers that share an input, a third after them, a fourth that only large inputs reach."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.b, self.c, self.d = (nn.Linear(4, 4, bias=False) for _ in range(4))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = x + self.c(torch.tanh(self.a(x)) * self.b(x))
        return h + self.d(h) if x.max() > 10 else h


@pytest.fixture(autouse=True)
def _no_grad() -> None:
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)


def groups(toy: Toy) -> list[list[nn.Module]]:
    return [[toy.a, toy.b], [toy.c], [toy.d]]


@pytest.mark.parametrize("suspendable", [True, False])
def test_a_pass_returns_each_input_and_the_output(suspendable: bool) -> None:
    toy, x = Toy(), torch.randn(2, 4)
    expected = toy(x)
    with group_hooks(groups(toy), {}):
        forward = ResumableForward(lambda: toy(x), suspendable=suspendable)
        assert forward.input_of(0)[0] is x
        torch.testing.assert_close(forward.input_of(1)[0], torch.tanh(toy.a(x)) * toy.b(x))
        assert forward.input_of(2)[0] is None  # not reached
        assert torch.equal(forward.output(), expected)


@pytest.mark.parametrize("suspendable", [True, False])
def test_a_group_that_runs_after_a_later_one_is_an_error(suspendable: bool) -> None:
    toy, x = Toy(), torch.randn(2, 4)
    with group_hooks([[toy.c], [toy.a, toy.b]], {}):
        forward = ResumableForward(lambda: toy(x), suspendable=suspendable)
        assert forward.input_of(0)[0] is None
        assert forward.input_of(1)[0] is x
        with pytest.raises(ModelError, match="order that depends on the tokens"):
            forward.output()


@pytest.mark.parametrize("suspendable", [True, False])
def test_a_resumed_pass_uses_the_weights_of_that_time(suspendable: bool) -> None:
    toy, x = Toy(), torch.randn(2, 4)
    with group_hooks(groups(toy), {}):
        forward = ResumableForward(lambda: toy(x), suspendable=suspendable)
        forward.input_of(0)
        for layer in (toy.a, toy.b):
            layer.weight = nn.Parameter(layer.weight * 2)
        torch.testing.assert_close(forward.input_of(1)[0], torch.tanh(toy.a(x)) * toy.b(x))
        toy.c.weight = nn.Parameter(toy.c.weight * 3)
        output = forward.output()
    assert torch.equal(output, toy(x))


def test_a_suspended_pass_is_one_forward_pass() -> None:
    toy, x = Toy(), torch.full((1, 4), 11.0)
    with group_hooks(groups(toy), {}):
        forward = ResumableForward(lambda: toy(x), suspendable=True)
        assert all(forward.input_of(group)[0] is not None for group in range(3))
        forward.output()
    assert toy.calls == 1


def test_groups_may_be_skipped() -> None:
    toy, x = Toy(), torch.full((1, 4), 11.0)
    with group_hooks(groups(toy), {}):
        forward = ResumableForward(lambda: toy(x), suspendable=True)
        last, _ = forward.input_of(2)
    assert last is not None
    torch.testing.assert_close(last + toy.d(last), forward.output())


def test_many_passes_are_suspended_at_once() -> None:
    toy, inputs = Toy(), torch.randn(50, 2, 4)
    with group_hooks(groups(toy), {}):
        several = [ResumableForward(lambda x=x: toy(x), suspendable=True) for x in inputs]
        for group in (0, 1):
            for forward in several:
                assert forward.input_of(group)[0] is not None
        outputs = torch.stack([forward.output() for forward in several])
    assert torch.equal(outputs, torch.stack([toy(x) for x in inputs]))


@pytest.mark.parametrize("suspendable", [True, False])
def test_an_abandoned_pass_frees_its_activations(suspendable: bool) -> None:
    toy, x = Toy(), torch.randn(2, 4)
    with group_hooks(groups(toy), {}):
        forward = ResumableForward(lambda: toy(x), suspendable=suspendable)
        held = weakref.ref(forward.input_of(1)[0])
        del forward
    assert held() is None


def test_an_error_in_the_model_reaches_the_caller() -> None:
    toy = Toy()
    with group_hooks(groups(toy), {}):
        forward = ResumableForward(lambda: toy(torch.randn(2, 5)), suspendable=True)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            forward.output()


def test_an_ordinary_forward_pass_is_not_stopped() -> None:
    toy, x = Toy(), torch.randn(2, 4)
    expected = toy(x)
    with group_hooks(groups(toy), {}):
        assert torch.equal(toy(x), expected)
    assert not toy.a._forward_pre_hooks


@pytest.mark.parametrize("suspendable", [True, False])
def test_outputs_of_writers_are_added_up(suspendable: bool) -> None:
    toy, x = Toy(), torch.full((1, 4), 11.0)
    with group_hooks(groups(toy), {toy.a: 2.0, toy.c: 1.0}):
        forward = ResumableForward(lambda: toy(x), suspendable=suspendable)
        assert forward.input_of(0)[1] is None
        c, written = forward.input_of(1)
        torch.testing.assert_close(written, 2 * toy.a(x))
        torch.testing.assert_close(forward.input_of(2)[1], 2 * toy.a(x) + toy.c(c))


@pytest.mark.parametrize("suspendable", [True, False])
def test_a_finished_pass_keeps_nothing(suspendable: bool) -> None:
    toy, x = Toy(), torch.randn(2, 4)
    with group_hooks(groups(toy), {toy.c: 1.0}):
        forward = ResumableForward(lambda: toy(x), suspendable=suspendable)
        forward.input_of(1)
        held = weakref.ref(forward.output())
    assert held() is None
