"""Refinement by gradients: what reaches scales, codes and gains, training, and resuming with the same bits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loop_cases import CPU, ROUND, quantize, windows
from safetensors.torch import load_file
from tiny_models import write_checkpoint
from torch import Tensor, nn

from jointq_cli.errors import ConfigError, NumericsError
from jointq_cli.formats.audit import audit
from jointq_cli.formats.turned import TurnedWeight, turned
from jointq_cli.formats.uniform import UniformWeight
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.layer_ref import LayerRef
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.assembly import assemble
from jointq_cli.quantization.refinement.settings import BlockRefinement, GradientRefinement, ModelRefinement
from jointq_cli.quantization.refinement.training import Objective, split_windows, train
from jointq_cli.quantization.refinement.variables import Refined, RefinedLayer, RefinedNorm
from jointq_cli.quantization.refinement.walk import RefinementWalk, load_courses, load_gains
from jointq_cli.quantization.workspace import Workspace
from jointq_cli.records import LayerRecord

RATES = {"scale_lr": 0.01, "norm_lr": 0.01, "code_lr": 0.1}
MODEL = ModelRefinement(generated=0, steps=6, validate_every=3, heldout_share=0.34, **RATES)
BLOCK = BlockRefinement(steps=4, validate_every=2, heldout_share=0.34, **RATES)


def stored(permutation: Tensor | None = None) -> UniformWeight:
    generator = torch.Generator().manual_seed(0)
    return UniformWeight(
        codes=torch.randint(0, 8, (3, 8), generator=generator, dtype=torch.uint8),
        scale=torch.rand(3, 2, generator=generator) + 0.5,
        zero_point=torch.randint(0, 8, (3, 2), generator=generator, dtype=torch.uint8),
        permutation=permutation,
        bits=3,
        symmetric=False,
    )


def layer_of(
    weight: UniformWeight | TurnedWeight, settings: GradientRefinement = MODEL
) -> tuple[RefinedLayer, nn.Linear]:
    linear = nn.Linear(8, 3, bias=False)
    layer = RefinedLayer(LayerRef("one", linear), weight, torch.float32, settings)
    layer.load(weight)
    return layer, linear


@pytest.mark.parametrize("permutation", [None, torch.tensor([3, 1, 0, 7, 2, 6, 5, 4], dtype=torch.int32)])
def test_gradients_are_those_of_the_dequantised_weight(permutation: Tensor | None) -> None:
    weight = stored(permutation)
    layer, linear = layer_of(weight)
    layer.listen()
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    linear(x).square().sum().backward()

    groups = weight.column_groups()
    factor = torch.ones(3, 2, requires_grad=True)
    codes = weight.codes.float().requires_grad_()
    product = (codes - weight.zero_point.float()[:, groups]) * (factor * weight.scale)[:, groups]
    (x @ product.T).square().sum().backward()
    torch.testing.assert_close(layer.variables["scales"].gradient, factor.grad)
    torch.testing.assert_close(layer.variables["codes"].gradient, codes.grad)
    assert linear.weight.grad is None


@pytest.mark.parametrize("is_turned", [False, True])
def test_gradients_reach_codes_without_zero_points_and_in_another_basis(is_turned: bool) -> None:
    half = replace(stored(), zero_point=None)
    signs = torch.tensor([1, -1, 1, 1, -1, -1, 1, -1], dtype=torch.int8)
    layer, linear = layer_of(TurnedWeight(half, signs) if is_turned else half)
    layer.listen()
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    linear(x).square().sum().backward()

    basis = turned(torch.eye(8), signs).float() if is_turned else torch.eye(8)
    codes = half.codes.float().requires_grad_()
    product = ((codes - 3.5) * half.scale[:, half.column_groups()]) @ basis.T
    torch.testing.assert_close(linear.weight, product)
    (x @ product.T).square().sum().backward()
    torch.testing.assert_close(layer.variables["codes"].gradient, codes.grad)
    assert type(layer.stored()) is type(layer.start)


def test_what_is_stored_is_on_the_grid_and_in_its_dtype() -> None:
    weight = replace(stored(), scale=stored().scale.bfloat16())
    layer, linear = layer_of(weight)
    Refined([layer], [])
    for number in range(1, 30):
        (linear(torch.ones(1, 8)).sum()).backward()
        for variable in layer.variables.values():
            variable.step(number, 1.0)
    found = layer.stored()
    assert found.scale.dtype == torch.bfloat16
    assert found.codes.dtype == torch.uint8
    assert int(found.codes.max()) <= 7
    assert not torch.equal(found.codes, weight.codes)
    assert not torch.equal(found.scale, weight.scale)


def test_only_what_is_asked_for_is_trained() -> None:
    layer, _ = layer_of(stored(), replace(MODEL, train=["norms"]))
    assert not layer.variables
    assert not layer.stored().difference(stored())


def test_windows_held_out_are_generated_ones_where_there_are_any() -> None:
    training, held_out = split_windows(10, replace(MODEL, generated=4, heldout_share=0.5))
    assert held_out == [7, 9]
    assert sorted([*training, *held_out]) == list(range(10))


class Stopped(Exception):
    pass


class Distance(Objective):
    """Of a norm's gain from a target; `held_out` adds to the loss of windows from 4 on."""

    def __init__(self, norm: nn.Module, target: Tensor, later: Callable[[], float] = lambda: 0.0) -> None:
        self.norm, self.target, self.later = norm, target, later

    def loss(self, window: int) -> float:
        return self._loss().item() + self.later()

    def backward(self, window: int, weight: float) -> float:
        with torch.enable_grad():
            loss = self._loss()
            (loss * weight).backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def _loss(self) -> Tensor:
        return (self.norm.get_parameter("weight") - self.target).square().sum()


def gain(settings: GradientRefinement) -> tuple[Refined, nn.Module]:
    norm = nn.LayerNorm(4, bias=False)
    return Refined([], [RefinedNorm("norm.weight", norm, norm.weight.data, settings)]), norm


def test_a_gain_keeps_the_digits_that_the_forward_pass_does_not_have() -> None:
    norm = nn.LayerNorm(4, bias=False, dtype=torch.bfloat16)
    exact = torch.tensor([1.001, 0.3, 2.7, 1.0])
    refined = RefinedNorm("norm.weight", norm, exact, MODEL)
    assert torch.equal(refined.stored(), exact)


def test_training_lowers_the_loss_and_keeps_the_best_state(tmp_path: Path) -> None:
    settings = replace(MODEL, steps=40, validate_every=10)
    refined, norm = gain(settings)
    best, course = train(
        "model", refined, Distance(norm, torch.full((4,), 1.1)), 6, settings, tmp_path / "state", lambda *_: None
    )
    assert course.points[-1].heldout_loss < 0.1 * course.points[0].heldout_loss
    assert course.best_step == min(course.points, key=lambda point: point.heldout_loss).step
    torch.testing.assert_close(norm.get_parameter("weight").detach(), best["norm.weight norms"])


def test_training_ends_where_held_out_windows_do_not_gain(tmp_path: Path) -> None:
    settings = replace(MODEL, steps=40, validate_every=2, patience=2, backoff=1.0)
    refined, norm = gain(settings)
    calls = iter(range(1000))
    objective = Distance(norm, torch.full((4,), 1.1), lambda: float(next(calls)))  # larger each time
    best, course = train("model", refined, objective, 6, settings, tmp_path / "state", lambda *_: None)
    assert (course.best_step, course.steps) == (0, 4)
    assert torch.equal(best["norm.weight norms"], torch.ones(4))


@pytest.mark.parametrize(("factor", "returns"), [(0.3, True), (1.0, False)])
def test_after_a_higher_loss_than_at_the_start_training_begins_again_with_smaller_rates(
    tmp_path: Path, factor: float, returns: bool
) -> None:
    settings = replace(MODEL, steps=24, validate_every=2, patience=24, norm_lr=0.9, backoff=factor)
    refined, norm = gain(settings)
    moved: list[float] = []

    def on_step(*_: float) -> None:
        moved.append(float((norm.get_parameter("weight").detach() - 1).abs().max()))

    objective = Distance(norm, torch.full((4,), 1.1))
    _, course = train("model", refined, objective, 6, settings, tmp_path / "state", on_step)
    assert course.points[1].heldout_loss > course.points[0].heldout_loss  # two steps of .9 lead beyond 1.1
    assert (moved[1] == 0) == returns
    assert (moved[2] < 0.3 * 0.9 * 0.7) == returns  # Adam's third step is less than .7 of the rate


@pytest.mark.parametrize("stop_at", [1, 2, 5])
def test_training_stopped_after_a_higher_loss_continues_with_the_same_bits(tmp_path: Path, stop_at: int) -> None:
    settings = replace(MODEL, steps=8, validate_every=2, patience=8, norm_lr=0.9)

    def trained(file: str, stop: int = -1) -> bytes:
        refined, norm = gain(settings)

        def on_step(step: int, *_: float) -> None:
            if step == stop:
                raise Stopped

        best, _ = train("model", refined, Distance(norm, torch.full((4,), 1.1)), 6, settings, tmp_path / file, on_step)
        return best["norm.weight norms"].numpy().tobytes() + (tmp_path / file).read_bytes()

    with pytest.raises(Stopped):
        trained("stopped", stop_at)
    assert trained("stopped") == trained("whole")


def test_where_nothing_is_trained_no_step_is_taken(tmp_path: Path) -> None:
    _, norm = gain(MODEL)
    norm.requires_grad_(False)  # as in a block of layers that are left alone
    objective = Distance(norm, torch.full((4,), 1.1))
    best, course = train("block 0", Refined([], []), objective, 6, BLOCK, tmp_path / "state", lambda *_: None)
    assert not best
    assert (course.name, course.steps, len(course.points)) == ("block 0", 0, 1)


def test_a_loss_that_is_not_finite_is_said(tmp_path: Path) -> None:
    refined, norm = gain(MODEL)
    objective = Distance(norm, torch.full((4,), torch.nan))
    with pytest.raises(NumericsError, match="model has diverged by step 1; lower refinement"):
        train("model", refined, objective, 6, MODEL, tmp_path / "state", lambda *_: None)


def test_windows_are_held_out_over_all_the_text() -> None:
    training, held_out = split_windows(16, MODEL)
    assert sorted([*training, *held_out]) == list(range(16))
    assert held_out == [1, 4, 8, 11, 14]
    with pytest.raises(ConfigError, match=r"calibration.num_samples=1: refinement.heldout_share=0.34 holds out 1"):
        split_windows(1, MODEL)


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> tuple[StreamedModel, Path, list[LayerRecord]]:
    path = tmp_path_factory.mktemp("solved")
    write_checkpoint(path / "model", "qwen3", dtype=torch.float32)
    model, workspace, records = quantize(path / "model", path / "work", replace(ROUND, bits=2))
    return model, workspace.directory, records


def refine(
    solved: tuple[StreamedModel, Path, list[LayerRecord]],
    target: Path,
    settings: GradientRefinement,
    stop_at: int = -1,
) -> RefinementWalk:
    """stop_at: the number of the step after which it is stopped."""
    model, directory, records = solved
    target.mkdir(exist_ok=True)
    steps = iter(range(10**6))

    def on_step(*_: object) -> None:
        if next(steps) == stop_at:
            raise Stopped

    start = StreamedModel(Checkpoint(directory / "checkpoint"), CPU, torch.float32)
    walk = RefinementWalk(
        model, start, directory / "layers", records, windows(), 4, 4, settings, Workspace(target), on_step, lambda: None
    )
    with torch.no_grad():
        walk.run()
        assemble(start, walk.workspace, target / "checkpoint", code=False, outer=walk.outer_tensors())
    walk.clear()
    return walk


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@pytest.mark.parametrize("settings", [MODEL, BLOCK], ids=["model", "block"])
def test_a_stopped_refinement_continues_with_the_same_bits(
    solved: tuple[StreamedModel, Path, list[LayerRecord]], tmp_path: Path, settings: GradientRefinement
) -> None:
    model, _, records = solved
    refine(solved, tmp_path / "once", settings)
    with pytest.raises(Stopped):
        refine(solved, tmp_path / "again", settings, stop_at=4)
    refine(solved, tmp_path / "again", settings)
    assert contents(tmp_path / "once") == contents(tmp_path / "again")

    courses = load_courses(tmp_path / "once")
    assert len(courses) == (1 if settings is MODEL else len(model))
    assert all(min(each.points, key=lambda p: p.heldout_loss).step == each.best_step for each in courses)
    assert sum(each.points[-1].heldout_loss < each.points[0].heldout_loss for each in courses) > len(courses) / 2
    gains = load_gains(tmp_path / "once")
    assert ("model.norm.weight" in gains) == (settings is MODEL)
    assert "model.layers.0.self_attn.q_norm.weight" in gains

    result = Checkpoint(tmp_path / "once" / "checkpoint")
    found = audit(model, result, records, tmp_path / "once" / "layers", gains)
    assert found.passed
    assert 0 < found.refined <= len(gains)
    changed = next(name for name in gains if not model.checkpoint.same_bytes(result, name))
    assert audit(model, result, records, tmp_path / "once" / "layers").changed  # nobody said that gains may differ
    assert audit(model, result, records, tmp_path / "once" / "layers", gains | {changed: gains[changed] + 1}).changed
    probe = load_file(tmp_path / "once" / "hidden.safetensors")["quantized"]
    assert probe.shape == (4, 16, 64)
    notes = [Workspace(tmp_path / "once").record(record.name).notes for record in records]
    assert all(note["refined_scales"] > 0 for note in notes)
