"""Which models may be rotated: every listed family, part by part, and no other; refused before a weight is read."""

from pathlib import Path

import pytest
import torch
from basis_cases import ADMITS_R1, CPU, HAS_POST_NORMS, original
from safetensors.torch import load_file
from tiny_models import write_checkpoint
from torch import Tensor, nn

from jointq_cli.errors import ModelError
from jointq_cli.models.checkpoint import SINGLE, Checkpoint
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.system.tensor_files import save_tensors
from jointq_cli.transforms.architectures import FAMILIES, layout_of

pytestmark = pytest.mark.usefixtures("no_gradients")

NOT_LISTED = {"gpt_neox": "GPTNeoXForCausalLM", "falcon": "FalconForCausalLM"}


def unread(root: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> StreamedModel:
    """A model of which no weight can be read."""

    def refuse(self: Checkpoint, names: object) -> dict[str, Tensor]:
        raise AssertionError("a weight was read")

    original(root, family)  # writes it
    monkeypatch.setattr(Checkpoint, "read", refuse)
    return original(root, family)


def refusal(model: StreamedModel, *, r1: bool = False, key: str = "rotation") -> str:
    with pytest.raises(ModelError) as error:
        layout_of(model, r1=r1, key=key)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_family_on_the_list_has_a_tiny_model_here(root: Path) -> None:
    kinds = {original(root, family).checkpoint.config["model_type"] for family in ADMITS_R1 + HAS_POST_NORMS}
    assert kinds == set(FAMILIES)


@pytest.mark.parametrize("family", ADMITS_R1)
def test_a_family_whose_norms_stand_before_the_layers_admits_everything(
    family: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = unread(root, family, monkeypatch)
    assert layout_of(model, r1=True) == layout_of(model, r1=False)


@pytest.mark.parametrize("family", HAS_POST_NORMS)
def test_a_family_with_norms_after_the_layers_admits_everything_but_r1(
    family: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = unread(root, family, monkeypatch)
    name = type(model.module).__name__
    message = refusal(model, r1=True)
    assert message.startswith(f"rotation.r1=true: {name} cannot have it: a norm with a gain per channel stands between")
    assert message.endswith("use rotation.r1=false")
    assert "sweep.r1=true" in refusal(model, r1=True, key="sweep")
    assert layout_of(model, r1=False).num_kv_heads == 2


@pytest.mark.parametrize("family", NOT_LISTED)
@pytest.mark.parametrize("r1", [True, False])
def test_a_family_that_is_not_listed_is_refused_by_its_name_before_a_weight_is_read(
    family: str, r1: bool, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refusal(unread(root, family, monkeypatch), r1=r1)
    assert f"{NOT_LISTED[family]} ({family})" in message
    assert all(kind in message for kind in FAMILIES)
    assert message.endswith("Use rotation=none smoothing=none")


@pytest.mark.parametrize("family", ADMITS_R1 + HAS_POST_NORMS)
def test_every_tensor_of_the_model_has_a_place_in_the_list(family: str, root: Path) -> None:
    """Each module is taken away in turn, and unknown ones are added: both must be noticed."""
    model = original(root, family)
    layout_of(model, r1=False)
    block = model.blocks[1]
    for name in sorted({tensor.rpartition(".")[0] for tensor, _ in block.named_parameters()}):
        parent, _, child = name.rpartition(".")
        whole = getattr(block.get_submodule(parent), child)
        setattr(block.get_submodule(parent), child, nn.Identity())
        assert f"lacks a module model.layers.1.{name}," in refusal(model)
        setattr(block.get_submodule(parent), child, whole)
    for parent in ("", "self_attn", "mlp"):
        block.get_submodule(parent).add_module("adapter", nn.Linear(2, 2))
        name = ".".join(filter(None, (parent, "adapter")))
        assert f"has a module model.layers.1.{name}," in refusal(model)
        del block.get_submodule(parent).adapter
    layout_of(model, r1=False)


def test_a_parameter_beside_the_layers_is_unknown_too(root: Path) -> None:
    """As the sinks of gpt-oss: no module of its own."""
    model = original(root)
    model.blocks[2].get_submodule("self_attn").register_parameter("sinks", nn.Parameter(torch.zeros(4)))
    assert "has a module model.layers.2.self_attn," in refusal(model)


@pytest.mark.parametrize("name", ["model.embed_positions", "score"])
def test_a_tensor_outside_the_blocks_that_has_no_place_is_refused(name: str, root: Path) -> None:
    model = original(root)
    parent, _, child = name.rpartition(".")
    model.module.get_submodule(parent).add_module(child, nn.Embedding(4, 64))
    assert f"has a tensor {name}.weight, which no rotation knows" in refusal(model)


@pytest.mark.parametrize(
    ("stored", "with_r1", "without_r1"),
    [
        ("model.layers.3.self_attn.v_proj.weight", True, False),  # of multi-token prediction
        ("score.weight", True, False),
        ("model.layers.1.self_attn.v_proj.lora_A", True, True),
        ("model.layers.1.self_attn.rotary_emb.inv_freq", False, False),
    ],
)
def test_a_stored_tensor_that_the_model_does_not_use_is_refused_where_the_basis_changes(
    stored: str, with_r1: bool, without_r1: bool, tmp_path: Path
) -> None:
    directory = write_checkpoint(tmp_path)
    tensors = load_file(directory / SINGLE)
    save_tensors(directory / SINGLE, {**tensors, stored: torch.ones(2, 64)})
    model = StreamedModel(Checkpoint(directory), CPU, torch.float32)
    for r1, is_refused in ((True, with_r1), (False, without_r1)):
        if is_refused:
            assert f"the checkpoint holds {stored}, which LlamaForCausalLM does not use" in refusal(model, r1=r1)
        else:
            layout_of(model, r1=r1)


def test_sizes_are_those_of_the_config(root: Path) -> None:
    layout = layout_of(original(root, "qwen3"), r1=True)
    sizes = (layout.hidden_size, layout.num_heads, layout.num_kv_heads, layout.head_dim, layout.intermediate_size)
    assert sizes == (64, 4, 2, 16, 128)
    assert (layout.embedding, layout.final_norm, layout.lm_head) == ("model.embed_tokens", "model.norm", "lm_head")


def test_a_head_need_not_be_its_share_of_the_hidden_size(tmp_path: Path) -> None:
    """As in Gemma and Qwen3."""
    model = StreamedModel(Checkpoint(write_checkpoint(tmp_path, "qwen3", head_dim=32)), CPU, torch.float32)
    layout = layout_of(model, r1=True)
    assert layout.head_dim == 32
    assert layout.value_rows == slice(0, 64)
    o_proj = model.blocks[0].get_submodule(layout.family.o_proj)
    assert o_proj.weight.shape == (layout.hidden_size, layout.num_heads * layout.head_dim)


@pytest.mark.parametrize("family", ADMITS_R1 + HAS_POST_NORMS)
def test_only_what_reads_the_residual_stream_has_a_norm_before_it(family: str, root: Path) -> None:
    layout = layout_of(original(root, family), r1=False)
    readers = [layer for layers in layout.family.readers.values() for layer in layers]
    assert layout.value_layer in readers
    assert layout.up_layer in readers
    assert all((layout.norm_before(layer) is None) == (family == "olmo2") for layer in readers)
    assert all(layout.norm_before(layer) is None for layer in (layout.family.o_proj, layout.family.down_proj))


def given_on_one_token(model: StreamedModel, modules: list[str]) -> dict[str, Tensor]:
    """What modules of the first block are given, and under their name and "()" what they make of it."""
    seen: dict[str, Tensor] = {}
    with model.outer():
        hidden = model.embed(torch.tensor([[7]]))

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        name = names[module]
        seen.update({name: args[0][0, 0], f"{name}()": output[0, 0]})

    names = {model.blocks[0].get_submodule(name): name for name in modules}
    for module in names:
        module.register_forward_hook(note)
    with model.block(0, model.block_tensors(0)):
        model.run(0, hidden)
    return seen


@pytest.mark.parametrize("family", ["phi3", "llama", "gemma2"])
def test_the_rows_of_the_values_are_those_that_reach_o_proj(family: str, root: Path) -> None:
    """transformers' own splitting is asked: a single token attends to itself, so o_proj is given its values."""
    model = original(root, family)
    layout = layout_of(model, r1=False)
    seen = given_on_one_token(model, [layout.value_layer, layout.family.o_proj])
    values = seen[f"{layout.value_layer}()"][layout.value_rows].reshape(2, 1, 16).expand(2, 2, 16)
    torch.testing.assert_close(seen[layout.family.o_proj], values.flatten())


def test_the_rows_of_up_are_those_that_the_activated_gate_multiplies(root: Path) -> None:
    model = original(root, "phi3")
    layout = layout_of(model, r1=False)
    seen = given_on_one_token(model, [layout.up_layer, layout.family.down_proj])
    made = seen[f"{layout.up_layer}()"]
    gate = made[: layout.up_rows.start]
    torch.testing.assert_close(seen[layout.family.down_proj], nn.functional.silu(gate) * made[layout.up_rows])
