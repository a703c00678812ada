"""What experts are solved for: their own tokens, all of the block, or a blend; with QEP the same in both models."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loop_cases import CPU, EQUAL, FULL, NO_QEP, SOLVE, file_hashes, quantize, windows
from tiny_models import write_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.forward import final_hidden
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization import expert_settings
from jointq_cli.quantization.expert_settings import ExpertSettings
from jointq_cli.quantization.expert_unit import ListedUnit, RoutedUnit, model_units
from jointq_cli.quantization.hidden_states import HiddenStateFile, Stream
from jointq_cli.quantization.qep import QepSettings
from jointq_cli.quantization.quantizers.statistics import Statistics
from jointq_cli.quantization.settings import LoopSettings
from jointq_cli.quantization.walk import walk
from jointq_cli.system.distributed import SINGLE_PROCESS

EXPERTS = "model.layers.0.mlp.experts"
LIST, CALLED = "llama_experts", "llama_called_experts"
TOKENS = windows(80)


@pytest.fixture(scope="module", params=[LIST, CALLED])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), request.param, num_experts=5)


def rounded(weight: Tensor) -> Tensor:
    return (weight * 8).round() / 8


def first_block(
    directory: Path,
    scratch: Path,
    experts: ExpertSettings,
    qep: QepSettings = NO_QEP,
    change: Callable[[Tensor], Tensor] = lambda weight: weight,
    inputs: str = "quantized",
    suspended: float = 1e9,
) -> dict[str, Statistics]:
    """The statistics of each layer of block 0, where `change` makes new weights."""
    model = StreamedModel(Checkpoint(directory), CPU, torch.float32)
    names = frozenset(n for n in model.linear_layers() if model.block_of(n) is not None and not n.endswith("mlp.gate"))
    settings = LoopSettings(SOLVE, qep, names, inputs, EQUAL, len(TOKENS), 4, suspended, experts=experts)
    complete: dict[Stream, bool] = {"original": True, "quantized": True}
    if settings.follows_original:
        complete["checkpoint"] = False
    found: dict[str, Statistics] = {}
    with torch.no_grad():
        walked = walk(model, TOKENS, settings, HiddenStateFile(scratch), complete, 4, lambda: None, SINGLE_PROCESS)
        for group in next(walked).groups():
            statistics = group.statistics()
            for layer in group.layers:
                found[layer.name] = statistics
                group.block.replace(layer, change(group.block.weight(layer)))
    return found


def entering(directory: Path, change: Callable[[Tensor], Tensor] = lambda weight: weight) -> Tensor:
    """What enters the MLP of block 0 (tokens, hidden), with `change` made to the attention before it."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for name, parameter in model.model.layers[0].self_attn.named_parameters():
        assert name.endswith("weight")
        parameter.data = change(parameter.data)
    seen: list[Tensor] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(TOKENS)
    return seen[0].flatten(0, 1)


def chosen(directory: Path, tokens: Tensor) -> Tensor:
    """The experts (tokens, 1 or 2) that the router sends these to."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    scores = model.model.layers[0].mlp.gate(tokens)[:, :-1]
    return scores.topk(2 if "called" in model.config.model_type else 1, dim=1)[1]


def hidden_inside(directory: Path, expert: int, tokens: Tensor) -> Tensor:
    """What the down_proj of an expert of block 0 receives."""
    mlp = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).model.layers[0].mlp.experts[expert]
    with torch.no_grad():
        return mlp.act_fn(mlp.gate_proj(tokens)) * mlp.up_proj(tokens)


def moment(left: Tensor, right: Tensor) -> Tensor:
    return left.double().T @ right.double() / len(right)


def assert_close(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_experts_are_recognised(directory: Path) -> None:
    model = StreamedModel(Checkpoint(directory), CPU, torch.float32)
    kinds = {type(unit) for unit in model_units(model, frozenset(model.linear_layers()))}
    assert kinds == {RoutedUnit if "called" in model.module.config.model_type else ListedUnit}
    assert not list(model_units(model, frozenset(n for n in model.linear_layers() if "experts" not in n)))


def test_every_token_passes_through_every_expert_where_all_are_wanted(directory: Path, tmp_path: Path) -> None:
    found, tokens = first_block(directory, tmp_path, ExpertSettings("all")), entering(directory)
    for expert in (0, 4):
        assert_close(found[f"{EXPERTS}.{expert}.up_proj"].hessian, moment(tokens, tokens))
        inside = hidden_inside(directory, expert, tokens)
        assert_close(found[f"{EXPERTS}.{expert}.down_proj"].hessian, moment(inside, inside))
    assert found[f"{EXPERTS}.0.up_proj"] is found[f"{EXPERTS}.3.gate_proj"]  # one Hessian for all


def test_a_blend_has_the_more_of_the_block_the_fewer_tokens_are_routed(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing of it where enough are."""
    monkeypatch.setattr(expert_settings, "BLOCK_TOKENS_PER_COLUMN", 0.5)
    routed, blend = (first_block(directory, tmp_path, ExpertSettings(kind)) for kind in ("routed", "blend"))
    tokens = entering(directory)
    index, full, mixed = chosen(directory, tokens), 0, 0
    for expert in range(5):
        own = tokens[(index == expert).any(dim=1)]
        for name, every in (("up_proj", tokens), ("down_proj", hidden_inside(directory, expert, tokens))):
            layer = f"{EXPERTS}.{expert}.{name}"
            part = own if name == "up_proj" else hidden_inside(directory, expert, own)
            columns = part.shape[1]
            assert blend[layer].tokens is not None
            assert blend[layer].tokens.counts[layer] == len(own)
            if len(own) >= 8 * columns:
                assert torch.equal(blend[layer].hessian, routed[layer].hessian)
                assert_close(routed[layer].hessian, moment(part, part))
                full += 1
            else:
                added = columns // 2 - len(own) // 16
                some = every if name == "up_proj" else every.view(len(TOKENS) // 4, -1, columns)[::10].flatten(0, 1)
                summed = part.double().T @ part.double() + added * moment(some, some)
                assert_close(blend[layer].hessian, summed / (len(own) + added))
                assert blend[layer].tokens.block_share == pytest.approx(added / (len(own) + added))
                mixed += 1
    assert full
    assert mixed
    assert routed[f"{EXPERTS}.4.up_proj"].tokens.block_share == 1.0  # receives none


@pytest.mark.parametrize("calibration", ["routed", "all"])
def test_cross_terms_compare_the_same_tokens(calibration: str, directory: Path, tmp_path: Path) -> None:
    before, after = entering(directory), entering(directory, rounded)
    for routing, router in (("original", before), ("own", after)):
        found = first_block(directory, tmp_path, ExpertSettings(calibration, routing), FULL, rounded)
        counts = chosen(directory, router).flatten().bincount(minlength=5)
        expert = int(counts.argmax())
        rows = (chosen(directory, router) == expert).any(dim=1) if calibration == "routed" else slice(None)
        statistics = found[f"{EXPERTS}.{expert}.up_proj"]
        assert_close(statistics.hessian, moment(after[rows], after[rows]))
        assert_close(statistics.cross, moment(before[rows] - after[rows], after[rows]))
        assert statistics.tokens is not None
        assert statistics.tokens.counts[f"{EXPERTS}.{expert}.up_proj"] == counts[expert]
    assert not torch.equal(chosen(directory, before), chosen(directory, after))


def test_replayed_choices_are_the_own_ones_where_nothing_is_quantised(directory: Path, tmp_path: Path) -> None:
    original, own = (
        first_block(directory, tmp_path, ExpertSettings(routing=routing), FULL) for routing in ("original", "own")
    )
    for name, statistics in original.items():
        assert torch.equal(statistics.hessian, own[name].hessian)
        assert statistics.cross is not None
        assert not statistics.cross.any()


def test_held_out_tokens_are_a_part_of_those_of_every_expert(directory: Path, tmp_path: Path) -> None:
    heldout = replace(FULL, perccorr_mode="heldout")
    found = first_block(directory, tmp_path, ExpertSettings("routed"), heldout, rounded)
    shares = [statistics.heldout.share for statistics in found.values() if statistics.heldout is not None]
    assert len(shares) == len(found)
    assert all(0 < share < 1 for share in shares)


def test_passes_do_not_grow_with_the_number_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where each has to start anew for every set of experts."""
    counts, run = [], StreamedModel.run

    def counted(self: StreamedModel, index: int, hidden: Tensor) -> Tensor:
        counts[-1] += 1
        return run(self, index, hidden)

    monkeypatch.setattr(StreamedModel, "run", counted)
    for experts in (3, 9):
        counts.append(0)
        directory = write_checkpoint(tmp_path / str(experts), CALLED, num_experts=experts)
        first_block(directory, tmp_path, ExpertSettings("routed"), FULL, suspended=0.0)
    assert counts[0] == counts[1] > 0


def test_what_experts_add_to_the_residual_stream_is_known(directory: Path, tmp_path: Path) -> None:
    """So that QEP corrects the layers before them for the stream's drift, as in models without experts."""
    found = first_block(directory, tmp_path, ExpertSettings(), FULL, rounded)
    assert found["model.layers.0.self_attn.o_proj"].drift is not None


def is_kept(name: str) -> bool:
    return not name.endswith("mlp.gate")


def test_the_bits_do_not_depend_on_memory_and_interruptions(directory: Path, tmp_path: Path) -> None:
    """Nor does the checkpoint compute anything else than was in memory, although its router chooses other experts."""

    def bits(name: str, memory: float, suspended: float, stop: int = -1) -> dict[str, str]:
        countdown = [stop]

        def pause() -> None:
            countdown[0] -= 1
            if countdown[0] == 0:
                raise KeyboardInterrupt

        experts = ExpertSettings(memory_gb=memory)
        for _ in range(2 if stop > 0 else 1):
            try:
                quantize(
                    directory,
                    tmp_path / name,
                    SOLVE,
                    keep=is_kept,
                    pause=pause,
                    batch=2,
                    qep=FULL,
                    suspended=suspended,
                    experts=experts,
                )
            except KeyboardInterrupt:
                assert stop > 0
        return file_hashes(tmp_path / name / "layers")

    expected = bits("plenty", 4.0, 1e9)
    assert bits("little", 0.0, 0.0, stop=60) == expected
    reloaded = StreamedModel(Checkpoint(tmp_path / "plenty" / "checkpoint"), CPU, torch.float32)
    with torch.no_grad():
        computed = final_hidden(reloaded, windows()[:2], batch=2)
    assert torch.equal(computed, HiddenStateFile(tmp_path / "plenty").read_as_checkpoint())


def test_tokens_of_the_block_are_the_fewer_the_more_an_expert_has() -> None:
    blend = ExpertSettings("blend")
    assert [blend.tokens_of_block(tokens, 256) for tokens in (0, 256, 4096, 16384, 10**6)] == [1024, 1008, 768, 0, 0]
    assert [ExpertSettings("routed").tokens_of_block(tokens, 256) for tokens in (0, 1)] == [1, 0]


def test_experts_at_once_fit_into_their_memory() -> None:
    assert ExpertSettings("routed", memory_gb=2.0).at_once(4096, 2) == 7
    assert ExpertSettings("blend", memory_gb=2.0).at_once(4096, 2) == 3
    assert ExpertSettings("blend", memory_gb=0.0).at_once(14336, 2) == 1
    assert ExpertSettings("routed", memory_gb=float("inf")).at_once(64, 1) > 1000
