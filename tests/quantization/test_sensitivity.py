"""What a layer's candidates lose: by definition, from Hessians of either origin, resumed, and of experts."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loop_cases import CPU, EQUAL, NO_QEP, ROUND, windows
from safetensors import safe_open
from tiny_models import write_checkpoint
from transformers import AutoModelForCausalLM

from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.accumulator import unpacked
from jointq_cli.quantization.curvature import Kfac, loss_error
from jointq_cli.quantization.gradients import Gradients, collect_gradients
from jointq_cli.quantization.hessian_cache import Hessians, collect_hessians
from jointq_cli.quantization.quantizers import Quantizer
from jointq_cli.quantization.quantizers.base import Prepared
from jointq_cli.quantization.sensitivity import CandidateWalk, Losses, LossFiles, measure_fisher, measure_kfac
from jointq_cli.quantization.settings import LoopSettings

CANDIDATES: list[Quantizer] = [replace(ROUND, bits=bits) for bits in (2, 4)]
UNCOUPLED = Kfac(strength=0.0)


class Stop(Exception):
    pass


def measured(
    model: StreamedModel,
    place: Path,
    candidates: list[Quantizer] = CANDIDATES,
    curvature: Kfac = UNCOUPLED,
    ahead: bool = False,
    pause: Callable[[], None] = lambda: None,
    measure: Callable[..., None] = measure_kfac,
) -> Losses:
    names = [name for name in model.linear_layers() if model.block_of(name) is not None]
    settings = LoopSettings(
        candidates[0], NO_QEP, frozenset(names), "original", EQUAL, len(windows()), 2, 1e9, curvature=curvature
    )
    for folder in ("gradients", "hessians", "losses"):
        (place / folder).mkdir(parents=True, exist_ok=True)
    gradients, hessians = Gradients(place / "gradients"), Hessians(place / "hessians") if ahead else None
    with torch.no_grad():
        collect_gradients(model, windows(), 0, 2, gradients, lambda: None, lambda: None)
        if hessians:
            collect_hessians(model, windows(), settings, hessians, lambda: None, lambda: None)
        files = LossFiles(place / "losses")
        by_name = dict.fromkeys(names, candidates)
        walk = CandidateWalk(model, windows(), settings, by_name, gradients, hessians, files, pause)
        measure(walk, lambda: None)
    return files.read()


def opened(directory: Path, family: str = "llama") -> StreamedModel:
    return StreamedModel(Checkpoint(write_checkpoint(directory, family)), CPU, torch.float32)


def test_half_the_trace_over_gradients_error_and_inputs(tmp_path: Path) -> None:
    model = opened(tmp_path / "model")
    found = measured(model, tmp_path)
    assert list(found) == [name for name in model.linear_layers() if model.block_of(name) is not None]
    name = "model.layers.1.mlp.down_proj"
    inputs: list[torch.Tensor] = []
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    whole.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        whole(windows())
    [x], [g] = inputs, Gradients(tmp_path / "gradients").outputs(1, model.linear_layers()[name], CPU)
    weight = whole.get_parameter(f"{name}.weight").detach()
    for quantizer, loss in zip(CANDIDATES, found[name], strict=True):
        error = weight - quantizer.quantize(weight, Prepared(), torch.float32).quantized.dequantize(torch.float32)
        outputs = (x @ error.T).double()
        assert loss == pytest.approx(0.5 * float(((outputs @ g) * outputs).sum()) / len(x), rel=1e-4)
    assert all(two > four > 0 for two, four in found.values())


def test_rows_that_compensate_each_other_lose_less(tmp_path: Path) -> None:
    """As the layers will be solved, so are the candidates."""
    model = opened(tmp_path / "model")
    alone = measured(model, tmp_path / "alone", [ROUND])
    coupled = measured(model, tmp_path / "coupled", [ROUND], Kfac())
    assert sum(sum(losses) for losses in coupled.values()) < 0.9 * sum(sum(losses) for losses in alone.values())


def test_half_the_mean_square_of_what_an_error_does_to_the_loss_of_sampled_labels(tmp_path: Path) -> None:
    model = opened(tmp_path / "model", "gpt2")
    found = measured(model, tmp_path, measure=measure_fisher)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    draws = torch.rand(windows().shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in found}
    for name, kept in seen.items():
        layer = whole.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].detach().flatten(0, 1)))
        layer.register_forward_hook(
            lambda _, args, output, kept=kept: output.register_hook(lambda g: kept.append(g.flatten(0, 1))) and None
        )
    logits = whole(windows()).logits
    labels = (logits.detach().double().softmax(-1).cumsum(-1) < draws[..., None]).sum(-1)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    for name, losses in found.items():
        x, g = seen[name]
        weight = whole.get_parameter(f"{name}.weight").detach().T  # of a Conv1D
        for quantizer, loss in zip(CANDIDATES, losses, strict=True):
            error = weight - quantizer.quantize(weight, Prepared(), torch.float32).quantized.dequantize(torch.float32)
            assert loss == pytest.approx(0.5 * float((g * (x @ error.T)).sum(-1).square().mean()), rel=1e-3)
    kept = {f"{block:05d}.json" for block in range(len(model))}
    assert {path.name for path in (tmp_path / "losses").iterdir()} == kept | {"hidden.safetensors"}


@pytest.mark.parametrize("measure", [measure_kfac, measure_fisher])
def test_stopped_or_from_the_store_they_are_the_same(tmp_path: Path, measure: Callable[..., None]) -> None:
    model = opened(tmp_path / "model")
    left = [60 if measure is measure_kfac else 75]

    def pause() -> None:
        left[0] -= 1
        if not left[0]:
            raise Stop

    with pytest.raises(Stop):
        measured(model, tmp_path / "stopped", pause=pause, measure=measure)
    assert len(LossFiles(tmp_path / "stopped" / "losses").read()) < 21
    resumed = measured(model, tmp_path / "stopped", measure=measure)
    assert resumed == measured(model, tmp_path / "ahead", ahead=True, measure=measure)


def test_an_expert_counts_by_its_tokens(tmp_path: Path) -> None:
    model = opened(tmp_path / "model", "mixtral")
    found = measured(model, tmp_path, ahead=True)
    name = next(name for name in found if ".experts." in name and name.endswith("down_proj"))
    for file in (tmp_path / "hessians").glob("0*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            if name in (layers := json.loads(stored.metadata()["layers"])):
                hessian = unpacked(stored.get_tensor("hessian"), model.linear_layers()[name].in_features)
                count = int(stored.get_tensor("tokens")[layers.index(name)])
    assert 0 < count < windows().numel()
    outputs = Gradients(tmp_path / "gradients").outputs(model.block_of(name) or 0, model.linear_layers()[name], CPU)
    with model.block(0, tensors := model.block_tensors(0)):
        weight = model.location(f"{name}.weight").read(tensors).float()
    error = weight - CANDIDATES[0].quantize(weight, Prepared(), torch.float32).quantized.dequantize(torch.float32)
    expected = 0.5 * count / windows().numel() * loss_error(outputs, error, hessian)
    assert found[name][0] == pytest.approx(expected, rel=1e-6)


def test_what_the_store_adds_to_a_finished_directory_is_no_layer(tmp_path: Path) -> None:
    files = LossFiles(tmp_path)
    files.write(0, {"first": [0.5, 0.25]})
    (tmp_path / ".contents.json").write_text('{"made": "2026-11-29"}')
    assert files.read() == {"first": [0.5, 0.25]}
    assert files.written() == 1
