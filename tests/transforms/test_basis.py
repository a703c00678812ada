"""A model in another basis computes the same, holds what the basis says, and is an ordinary checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from basis_cases import (
    ABSORBED,
    ADMITS_R1,
    CPU,
    HAS_POST_NORMS,
    PARTS,
    PROBE,
    TIED,
    distance,
    in_basis,
    logits_of,
    original,
    parts_of,
    random_basis,
    tiny_layout,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from jointq_cli.kernels.hadamard import hadamard_transform, random_hadamard
from jointq_cli.models.checkpoint import SINGLE, Checkpoint
from jointq_cli.models.streamed import BlockwiseModel, StreamedModel
from jointq_cli.models.tensor_source import TensorSource
from jointq_cli.records import Invariance
from jointq_cli.system.tensor_files import save_tensors
from jointq_cli.transforms import basis as basis_module
from jointq_cli.transforms.basis import Basis
from jointq_cli.transforms.learning import rotate_heads
from jointq_cli.transforms.merge_check import check_invariance, write_rotated

pytestmark = pytest.mark.usefixtures("no_gradients")

EXACT = 5e-6  # of |logits| in float32, which itself makes some 1e-6


def written(model: StreamedModel, basis: Basis, directory: Path) -> Invariance:
    """What `check` says of the model in `basis`, which lies in `directory` then."""
    merged = write_rotated(in_basis(model, basis, directory), PROBE, lambda: None)
    return check_invariance(model, directory, merged, PROBE)


def changed_tensors(model: StreamedModel, rotated: Path) -> set[str]:
    """Those with other bytes than the original's, as "self_attn.v_proj.weight" where they are a block's."""
    after = Checkpoint(rotated)
    changed = [name for name in model.checkpoint.tensors if not model.checkpoint.same_bytes(after, name)]
    return {name.split(".", 3)[3] if model.block_of(name) is not None else name for name in changed}


@pytest.mark.parametrize("family", ADMITS_R1 + HAS_POST_NORMS)
def test_each_change_of_basis_alone_keeps_the_logits(family: str, root: Path, tmp_path: Path) -> None:
    model = original(root, family)
    truth = logits_of(model.checkpoint)
    for part in parts_of(family):
        rotated = in_basis(model, random_basis(model, [part]), tmp_path / part)
        assert distance(logits_of(rotated), truth) <= EXACT, part


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (8, 2), (8, 4), (4, 4)])
def test_heads_in_groups_of_any_size_keep_the_logits(heads: int, kv_heads: int, root: Path, tmp_path: Path) -> None:
    """With as many groups as heads in a group, the one would pass for the other."""
    model = original(root, num_attention_heads=heads, num_key_value_heads=kv_heads)
    rotated = in_basis(model, random_basis(model, ["r2", "value_scales"]), tmp_path / "rotated")
    assert distance(logits_of(rotated), logits_of(model.checkpoint)) <= EXACT


@pytest.mark.parametrize("family", ADMITS_R1 + HAS_POST_NORMS)
def test_all_of_them_together_keep_the_logits_on_their_way_to_the_disk_and_from_it(
    family: str, root: Path, tmp_path: Path
) -> None:
    model = original(root, family)
    found = written(model, random_basis(model, parts_of(family)), tmp_path / "rotated")
    assert found.merge <= EXACT
    assert found.stored <= EXACT
    assert (found.rounding, found.dtype, found.tokens) == (0.0, "float32", PROBE.numel())


@pytest.mark.parametrize("family", ADMITS_R1 + HAS_POST_NORMS)
def test_plain_transformers_computes_the_same_before_and_after_it_saves_the_model_again(
    family: str, root: Path, tmp_path: Path
) -> None:
    model = original(root, family)
    truth = AutoModelForCausalLM.from_pretrained(model.checkpoint.directory)(PROBE).logits
    absorbed = [part for part in parts_of(family) if part in ABSORBED]
    write_rotated(in_basis(model, random_basis(model, absorbed), tmp_path / "rotated"), PROBE, lambda: None)
    for saved, following in (("rotated", "again"), ("again", "and again")):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / saved)
        assert distance(loaded(PROBE).logits, truth) <= EXACT, saved
        loaded.save_pretrained(tmp_path / following)


@pytest.mark.parametrize("family", TIED)
def test_with_r1_tied_embeddings_are_two_tensors_for_good(family: str, root: Path, tmp_path: Path) -> None:
    model = original(root, family)
    assert "lm_head.weight" not in model.checkpoint.tensors
    write_rotated(in_basis(model, random_basis(model, ["r1"]), tmp_path / "rotated"), PROBE, lambda: None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "rotated")
    loaded.save_pretrained(tmp_path / "again")
    assert set(Checkpoint(tmp_path / "again").tensors) == {*model.checkpoint.tensors, "lm_head.weight"}
    assert loaded.config.tie_word_embeddings is False
    assert json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"] is False
    head, embedding = loaded.lm_head.weight, loaded.model.embed_tokens.weight
    assert distance(head, embedding) > 0.1


@pytest.mark.parametrize("family", ADMITS_R1)
def test_tensors_keep_their_names_shapes_and_dtypes(family: str, root: Path, tmp_path: Path) -> None:
    model = original(root, family, torch.bfloat16)
    written(model, random_basis(model, ABSORBED), tmp_path / "rotated")
    before, after = model.checkpoint.tensors, Checkpoint(tmp_path / "rotated").tensors
    assert set(after) - set(before) == ({"lm_head.weight"} if family in TIED else set())
    assert all((after[name].dtype, after[name].shape) == (before[name].dtype, before[name].shape) for name in before)


@pytest.mark.parametrize("family", ["llama_tied", "llama_bias", "gemma", "phi3", "olmo2"])
@pytest.mark.parametrize("part", ["r2", "value_scales", "mlp_scales", "r4"])
def test_all_but_r1_touch_only_the_layers_around_their_place(
    family: str, part: str, root: Path, tmp_path: Path
) -> None:
    model = original(root, family, torch.bfloat16)
    rotated = in_basis(model, random_basis(model, [part]), tmp_path / "rotated")
    write_rotated(rotated, PROBE, lambda: None)
    layout = tiny_layout(model)
    values = {f"{layout.value_layer}.weight", "self_attn.o_proj.weight"}
    inner = {f"{layout.up_layer}.weight", "mlp.down_proj.weight"}
    expected = {"r2": values, "value_scales": values, "mlp_scales": inner, "r4": {"mlp.down_proj.weight"}}[part]
    if family == "llama_bias" and part != "r4":
        expected |= {name.replace(".weight", ".bias") for name in expected if "o_proj" not in name}
        expected -= {"mlp.down_proj.bias"}
    assert changed_tensors(model, tmp_path / "rotated") == expected
    assert set(Checkpoint(tmp_path / "rotated").tensors) == set(model.checkpoint.tensors)  # tied ones stay tied
    if part != "r4":
        assert rotated.config == model.checkpoint.config


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_the_norms_before_the_layers_become_exactly_neutral_and_those_of_heads_stay(
    family: str, root: Path, tmp_path: Path
) -> None:
    model = original(root, family)
    rotated = in_basis(model, random_basis(model, PARTS), tmp_path / "rotated")
    norms = [name for name in rotated.shapes if name.endswith("norm.weight")]
    before, after = model.checkpoint.read(norms), rotated.read(norms)
    for name in norms:
        assert before[name].std() > 0.1, name  # or fusing it would prove nothing
        of_heads = name.endswith(("q_norm.weight", "k_norm.weight"))
        neutral = torch.full_like(before[name], 0.0 if family == "gemma" else 1.0)
        assert torch.equal(after[name], before[name] if of_heads else neutral), name


def test_the_rows_of_a_fused_layer_that_are_no_values_and_no_up_stay(root: Path, tmp_path: Path) -> None:
    model = original(root, "phi3")
    rotated = in_basis(model, random_basis(model, ["r2", "value_scales", "mlp_scales"]), tmp_path / "rotated")
    for layer, stay in (("self_attn.qkv_proj", 64 + 32), ("mlp.gate_up_proj", 128)):
        name = f"model.layers.1.{layer}.weight"
        before, after = (source.read([name])[name] for source in (model.checkpoint, rotated))
        assert torch.equal(after[:stay], before[:stay])
        assert bool((after[stay:] != before[stay:]).any(dim=1).all())


def seen(source: TensorSource, block: int) -> dict[str, Tensor]:
    """What the block, its o_proj and its down_proj are given on the probe."""
    model = BlockwiseModel(source, CPU, torch.float32)
    found: dict[str, Tensor] = {}
    hidden = model.embed_all(PROBE, batch=1)
    for index in range(block):
        with model.block(index, model.block_tensors(index)):
            model.run_all(index, hidden, batch=1)
    found["residual"] = hidden[0].clone()

    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.blocks[block].get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: found.update({name: given[0][0]})
        )
    with model.block(block, model.block_tensors(block)):
        model.run_all(block, hidden, batch=1)
    return found


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_activations_are_turned_by_what_was_learned_and_not_by_its_transpose(
    family: str, root: Path, tmp_path: Path
) -> None:
    """A merge with all transposes taken the wrong way would keep the logits too."""
    model = original(root, family)
    basis = random_basis(model, PARTS)
    assert basis.r1 is not None
    assert basis.r2 is not None
    assert basis.mlp_scales is not None
    before = seen(model.checkpoint, 1)
    after = seen(in_basis(model, basis, tmp_path / "rotated"), 1)
    values = rotate_heads(basis.smooth_values(before["self_attn.o_proj"], 1), basis.r2[1].float())
    inner = hadamard_transform(before["mlp.down_proj"] / basis.mlp_scales[1].float())
    assert distance(after["residual"], before["residual"] @ basis.r1.float()) < EXACT
    assert distance(after["self_attn.o_proj"], values) < EXACT
    assert distance(after["mlp.down_proj"], inner) < EXACT


def test_heads_of_a_group_share_scales_and_rotation(root: Path) -> None:
    model = original(root)
    basis = random_basis(model, ["r2", "value_scales"])
    assert basis.r2 is not None
    assert basis.value_scales is not None
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    found = rotate_heads(basis.smooth_values(rows, 2), basis.r2[2].float())
    for head in range(4):
        mine = slice(16 * head, 16 * head + 16)
        expected = rows[:, mine] / basis.value_scales[2, head // 2] @ basis.r2[2, head // 2]
        torch.testing.assert_close(found[:, mine], expected.float())


def test_the_gate_passes_what_bfloat16_must_lose_and_no_more(root: Path, tmp_path: Path) -> None:
    model = original(root, "llama", torch.bfloat16)
    for part in (["r1"], ["r1", "r2"], ABSORBED):
        found = written(model, random_basis(model, part), tmp_path / " ".join(part))
        assert found.merge <= EXACT
        assert 0 < found.stored <= 1.5 * found.rounding
        assert found.dtype == "bfloat16"


def test_a_merge_rounds_once(root: Path, tmp_path: Path) -> None:
    model = original(root, "llama", torch.bfloat16)
    basis = random_basis(model, ["r1"])
    assert basis.r1 is not None
    written(model, basis, tmp_path / "rotated")
    name = "model.layers.0.mlp.down_proj.weight"
    exact = basis.r1.T @ model.checkpoint.read([name])[name].double()
    assert torch.equal(Checkpoint(tmp_path / "rotated").read([name])[name], exact.float().bfloat16())


@pytest.mark.parametrize("rows", [1, 100])
def test_an_embedding_is_turned_a_few_rows_at_a_time(
    rows: int, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = original(root, "llama_tied")
    rotated = in_basis(model, random_basis(model, ["r1"]), tmp_path / "rotated")
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    whole = rotated.read(names)
    monkeypatch.setattr(basis_module, "EMBEDDING_ROWS", rows)
    torch.testing.assert_close(rotated.read(names), whole, rtol=1e-6, atol=1e-7)


def test_tensors_that_the_model_does_not_use_are_carried_over(tmp_path: Path) -> None:
    model = original(tmp_path)
    path = model.checkpoint.directory / SINGLE
    stranger = "model.layers.0.self_attn.rotary_emb.inv_freq"  # in checkpoints of old
    save_tensors(path, {**load_file(path), stranger: torch.arange(8.0), "counter": torch.arange(3)})
    model = StreamedModel(Checkpoint(path.parent), CPU, torch.float32)
    write_rotated(in_basis(model, random_basis(model, ABSORBED), tmp_path / "rotated"), PROBE, lambda: None)
    after = Checkpoint(tmp_path / "rotated")
    assert all(model.checkpoint.same_bytes(after, name) for name in (stranger, "counter"))


@pytest.mark.parametrize("size", [64, 576])
def test_hadamard_bases_are_orthogonal_to_the_last_digits(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    r2 = torch.stack([random_hadamard(64, generator) for _ in range(4)]).reshape(2, 2, 64, 64)
    assert Basis(r1=random_hadamard(size, generator), r2=r2).orthogonality_error < 1e-13
    assert Basis().orthogonality_error == 0.0


def test_the_orthogonality_error_is_the_worst_of_all_rotations() -> None:
    eyes = torch.eye(4, dtype=torch.float64).repeat(2, 2, 1, 1)
    eyes[1, 0] *= 1.5
    assert Basis(r1=torch.eye(8).double(), r2=eyes).orthogonality_error == pytest.approx(1.25)
    assert Basis(r1=2 * torch.eye(8).double(), r2=eyes).orthogonality_error == pytest.approx(3.0)


def test_a_rotation_that_is_no_number_has_no_orthogonality_error() -> None:
    broken = torch.full((1, 1, 2, 2), float("nan"), dtype=torch.float64)
    for basis in (Basis(r2=broken), Basis(r1=torch.eye(2).double(), r2=broken)):
        assert not basis.orthogonality_error < 1.0


def test_a_basis_comes_back_from_its_tensors(root: Path, tmp_path: Path) -> None:
    for parts in (["r4"], ["r1"], PARTS):
        basis = random_basis(original(root), parts)
        save_tensors(tmp_path / "basis.safetensors", basis.tensors())
        again = Basis(**load_file(tmp_path / "basis.safetensors"), r4=basis.r4)
        assert again.tensors().keys() == basis.tensors().keys()
        assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in basis.tensors().items())
