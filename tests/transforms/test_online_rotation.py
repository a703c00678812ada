"""R4 stands in front of down_proj when jointq runs the model, and nothing else can load it by mistake."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from basis_cases import CPU, PROBE, distance, in_basis, logits_of, original, random_basis
from tiny_models import edit_config
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from jointq_cli.errors import ModelError
from jointq_cli.kernels.hadamard import construction, hadamard_transform, orthogonal_hadamard
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.online_rotation import KEY, attach, needs_online, with_online, without_online
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.transforms.merge_check import write_rotated

pytestmark = pytest.mark.usefixtures("no_gradients")

EXACT = 5e-6  # of |logits| in float32


@pytest.fixture(scope="module")
def online(root: Path) -> Path:
    """A rotated llama that needs R4."""
    with torch.no_grad():
        model = original(root)
        basis = random_basis(model, ["r1", "r2", "r4"])
        write_rotated(in_basis(model, basis, root / "online"), PROBE, lambda: None)
    return root / "online"


@pytest.mark.parametrize(
    "loader",
    [AutoConfig, AutoModelForCausalLM, AutoModel, transformers.LlamaConfig, transformers.LlamaForCausalLM],
    ids=lambda loader: loader.__name__,
)
def test_plain_transformers_refuses_it_and_says_what_it_needs(loader: Any, online: Path) -> None:
    with pytest.raises(Exception, match="needs jointq: a Hadamard rotation"):
        loader.from_pretrained(online)


def test_its_tokenizer_is_an_ordinary_one(root: Path, online: Path) -> None:
    text = "R4 before down_proj"
    ids = AutoTokenizer.from_pretrained(online)(text).input_ids
    assert ids == AutoTokenizer.from_pretrained(original(root).checkpoint.directory)(text).input_ids


@pytest.mark.parametrize("width", [128, 96, 92], ids=lambda width: str(construction(width)))
def test_the_streamed_model_computes_what_the_original_does(width: int, root: Path, tmp_path: Path) -> None:
    model = original(root, intermediate_size=width)
    basis = random_basis(model, ["r4"])
    write_rotated(in_basis(model, basis, tmp_path / "rotated"), PROBE, lambda: None)
    assert distance(logits_of(Checkpoint(tmp_path / "rotated")), logits_of(model.checkpoint)) <= EXACT


def test_r4_stands_in_front_of_down_proj_of_every_block(online: Path) -> None:
    model = StreamedModel(Checkpoint(online), CPU, torch.float32)
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(0))
    for index in range(len(model)):
        with model.block(index, model.block_tensors(index)) as block:
            down_proj = block.get_submodule("mlp.down_proj")
            expected = hadamard_transform(x) @ down_proj.get_parameter("weight").T
            torch.testing.assert_close(down_proj(x), expected)


def test_without_r4_it_would_compute_something_else(root: Path, online: Path, tmp_path: Path) -> None:
    """Or a test that it computes the same would prove nothing."""
    checkpoint = Checkpoint(online)
    checkpoint.config = without_online(checkpoint.config)
    checkpoint.directory = tmp_path  # where transformers looks for the config
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.config))
    assert distance(logits_of(checkpoint), logits_of(original(root).checkpoint)) > 0.1


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma", "gemma3", "phi3"])
def test_a_config_comes_back_as_it_was(family: str, root: Path) -> None:
    config = original(root, family).checkpoint.config
    before = json.dumps(config)
    spoilt = with_online(config, "mlp.down_proj")
    assert without_online(spoilt) == config
    assert json.dumps(config) == before
    assert json.loads(json.dumps(spoilt)) == spoilt  # it goes through a file
    assert needs_online(spoilt)
    assert not needs_online(config)


def test_a_config_that_leaves_its_hidden_size_to_the_library_comes_back_as_it_was() -> None:
    config = {"model_type": "llama", "num_hidden_layers": 2}
    spoilt = with_online(config, "mlp.down_proj")
    assert "needs jointq" in spoilt["hidden_size"]
    assert without_online(spoilt) == config


@pytest.mark.parametrize("wrong", [{}, {"r4": ""}, {"r4": "mlp"}, {"r4": "mlp.nonesuch"}], ids=str)
def test_a_config_that_names_no_linear_layer_is_refused(wrong: dict[str, str]) -> None:
    """ "" names the block itself: its hidden states would be turned, and nobody would know."""
    block = nn.Module()
    block.add_module("mlp", nn.Sequential())
    with pytest.raises(ModelError, match=rf"config\.json: {KEY}\.r4={wrong.get('r4', '')}: must name a linear layer"):
        attach([block], {KEY: wrong})


def test_a_damaged_note_in_the_config_is_refused_in_one_line(online: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(online)
    for note in ("R4", {"r4": "mlp.down_proj"}, {"r4": "self_attn", "real": checkpoint.config[KEY]["real"]}):
        checkpoint.config[KEY] = note
        with pytest.raises(ModelError) as error:
            StreamedModel(checkpoint, CPU, torch.float32)
        assert "\n" not in str(error.value)


def test_editing_the_model_type_back_by_hand_is_not_enough(online: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((online / "config.json").read_text())
    edit_config(tmp_path, model_type="llama")
    with pytest.raises(Exception, match="needs jointq"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("size", [1, 2, 9, 12, 64, 92, 128, 576, 2048])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_turning_factor_by_factor_is_the_product_with_the_matrix(size: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64).to(dtype)
    found = hadamard_transform(x)
    assert (found.shape, found.dtype) == (x.shape, dtype)
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    assert distance(found.double(), x.double() @ orthogonal_hadamard(size)) < tolerance


def test_turning_the_columns_of_a_strided_weight_is_the_product_with_the_matrix() -> None:
    weight = torch.randn(192, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).T
    torch.testing.assert_close(hadamard_transform(weight), weight @ orthogonal_hadamard(192))


def test_in_bfloat16_the_rotation_rounds_once() -> None:
    """In steps of bfloat16 a long product would be no better than a quantised one."""
    layer = nn.Linear(1536, 1, bias=False, dtype=torch.bfloat16)
    given: list[torch.Tensor] = []
    attach([nn.ModuleDict({"down_proj": layer})], {KEY: {"r4": "down_proj"}})
    layer.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    x = torch.randn(8, 1536, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer(x)
    assert given[0].dtype == torch.bfloat16
    exact = x.double() @ orthogonal_hadamard(1536)
    assert distance(given[0].double(), exact) <= 1.01 * distance(exact.bfloat16().double(), exact)
