"""Experts in a ModuleList, of which no batch reaches all and no token the last one."""

from pathlib import Path

import pytest
import torch
from loop_cases import CPU, EQUAL, NO_QEP, SOLVE, file_hashes, quantize, windows
from safetensors.torch import load_file
from tiny_models import write_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from jointq_cli.errors import ModelError
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.forward import final_hidden
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.accumulator import unpacked
from jointq_cli.quantization.block import Block
from jointq_cli.quantization.expert_settings import ExpertSettings
from jointq_cli.quantization.hessian_cache import Hessians, collect_hessians
from jointq_cli.quantization.layer_groups import merged
from jointq_cli.quantization.loop import quantize_blocks
from jointq_cli.quantization.settings import LoopSettings
from jointq_cli.quantization.workspace import Workspace

LAST = ".experts.11."


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), "llama_experts")


def is_kept(name: str) -> bool:
    return not name.endswith("mlp.gate")


def moments(directory: Path) -> dict[str, Tensor]:
    """X^T X / tokens of every layer's input, with the whole model in memory; without those that receive no token."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    inputs: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        layer.register_forward_pre_hook(lambda module, args, name=name: inputs.update({name: args[0]} if args else {}))
    with torch.no_grad():
        model(windows())
    flat = {name: x.flatten(0, -2).double() for name, x in inputs.items() if x.is_floating_point()}
    return {name: x.T @ x / len(x) for name, x in flat.items()}


def test_layers_that_the_first_batch_does_not_reach_are_calibrated_on_later_ones(
    directory: Path, tmp_path: Path
) -> None:
    model = StreamedModel(Checkpoint(directory), CPU, torch.float32)
    names = frozenset(filter(is_kept, model.linear_layers())) - {"lm_head"}
    settings = LoopSettings(
        SOLVE, NO_QEP, names, "original", EQUAL, len(windows()), 1, 1e9, experts=ExpertSettings("routed")
    )
    hessians = Hessians(tmp_path)
    with torch.no_grad():
        collect_hessians(model, windows(), settings, hessians, lambda: None, lambda: None)
        entering = model.embed_all(windows(), 1)
        tensors = model.block_tensors(0)
        with model.block(0, tensors):
            [first] = Block(model, 0, tensors, names).runs_until_all_reached(entering[:1].split(1))
    assert {name for group in first for name in group} < {
        name for name in names if name.startswith("model.layers.0.") and LAST not in name
    }
    expected, found = moments(directory), {}
    for block in range(2):
        for number, group in enumerate(hessians.groups(block)):
            packed = load_file(tmp_path / f"{block:05d}-{number}.safetensors")["hessian"]
            size = model.linear_layers()[group[0]].in_features
            found |= dict.fromkeys(group, unpacked(packed, size))
    assert found.keys() == names
    unreached = {name for name in names if name not in expected}
    assert unreached == {name for name in names if LAST in name}
    for name in names:
        wanted = (
            expected[name.partition(".experts")[0]] if name.endswith((f"{LAST}up_proj", f"{LAST}gate_proj")) else None
        )
        if name not in unreached or wanted is not None:
            torch.testing.assert_close(found[name], expected.get(name, wanted), rtol=1e-4, atol=1e-5)

    bits = []
    for number, cached in enumerate((hessians, None)):
        (tmp_path / str(number)).mkdir()
        workspace = Workspace(tmp_path / str(number))
        with torch.no_grad():
            quantize_blocks(model, windows(), settings, workspace, lambda record: None, lambda: None, cached)
        bits.append([file_hashes(workspace.directory / part) for part in ("layers", "shards")])
    assert bits[0] == bits[1]


@pytest.mark.parametrize("suspended", [0.0, 1e9])
def test_experts_that_no_token_reaches_are_solved_for_all_tokens(
    suspended: float, directory: Path, tmp_path: Path
) -> None:
    _, workspace, records = quantize(directory, tmp_path / "work", SOLVE, keep=is_kept, batch=1, suspended=suspended)
    verdicts = {record.name: record.verdict for record in records}
    assert len(verdicts) == 2 * (4 + 12 * 3)
    without = {name for name, verdict in verdicts.items() if verdict == "no token"}
    assert without == {record.name for record in records if record.tokens == 0}
    assert without >= {
        f"model.layers.{block}.mlp{LAST}{kind}" for block in (0, 1) for kind in ("gate_proj", "up_proj", "down_proj")
    }
    reloaded = StreamedModel(Checkpoint(tmp_path / "work" / "checkpoint"), CPU, torch.float32)
    with torch.no_grad():
        assert torch.equal(final_hidden(reloaded, windows()[:1], batch=1), workspace.hidden.read("quantized"))


def test_runs_are_merged_in_an_order_that_agrees_with_each() -> None:
    names = ["q", "e.0.up", "e.1.up", "e.2.up", "e.0.down", "e.1.down", "e.2.down", "out"]
    first = [["q"], ["e.2.up"], ["e.2.down"], ["out"]]
    second = [["q"], ["e.0.up"], ["e.0.down"], ["e.2.up"], ["e.2.down"], ["out"]]
    third = [["q"], ["e.1.up"], ["e.1.down"], ["out"]]
    in_order = [["q"], *([f"e.{n}.{kind}"] for n in range(3) for kind in ("up", "down")), ["out"]]
    assert merged([first, second, third], names) == in_order
    assert merged([third, second, first], names) == in_order
    assert merged([[["q", "e.0.up"]], [["q"], ["e.0.up", "e.1.up"]]], names) == [["q", "e.0.up"], ["e.1.up"]]
    with pytest.raises(ModelError, match=r"^e\.[02].up: runs before other layers for some tokens, after them for"):
        merged([second, [["e.2.up"], ["e.0.up"]]], names)
