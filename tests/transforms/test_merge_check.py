"""The check of a merged rotation: every known kind of wrong merge is refused, and so are damaged files."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from basis_cases import ABSORBED, PARTS, PROBE, in_basis, original, random_basis, tiny_layout
from safetensors.torch import load_file
from torch import Tensor

from jointq_cli.errors import ModelError, NumericsError
from jointq_cli.models.checkpoint import SINGLE
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.records import Invariance
from jointq_cli.system.tensor_files import save_tensors
from jointq_cli.transforms.basis import Basis, RotatedTensors
from jointq_cli.transforms.merge_check import MERGE_LIMIT, check_invariance, write_rotated

pytestmark = pytest.mark.usefixtures("no_gradients")

DIFFER = r"rotation: the rotated model's logits differ from the original's by"
Patch = pytest.MonkeyPatch


def gate(
    model: StreamedModel, basis: Basis, directory: Path, damage: Callable[[Path], None] | None = None
) -> Invariance:
    merged = write_rotated(in_basis(model, basis, directory), PROBE, lambda: None)
    if damage is not None:
        damage(directory)
    return check_invariance(model, directory, merged, PROBE)


def forget_to_untie(patch: Patch) -> None:
    patch.setattr(RotatedTensors, "_unties_embeddings", False)


def forget_the_bias_of_the_values(patch: Patch) -> None:
    whole = RotatedTensors._change_values

    def weights_only(self: RotatedTensors, index: int, tensor: Tensor) -> Tensor:
        return whole(self, index, tensor) if tensor.dim() == 2 else tensor

    patch.setattr(RotatedTensors, "_change_values", weights_only)


def forget_other_biases(patch: Patch) -> None:
    whole = RotatedTensors._apply_r1

    def weights_only(self: RotatedTensors, index: int, layer: str, kind: str, tensor: Tensor) -> Tensor:
        return tensor if kind == "bias" else whole(self, index, layer, kind, tensor)

    patch.setattr(RotatedTensors, "_apply_r1", weights_only)


def forget_to_fuse(patch: Patch) -> None:
    patch.setattr(RotatedTensors, "_norm_gain", lambda self, norm: torch.ones(64, dtype=torch.float64))


def leave_the_gain_in_the_norm(patch: Patch) -> None:
    patch.setattr(RotatedTensors, "_unit_gain", lambda self, gain: gain)


def forget_that_gemma_adds_one(patch: Patch) -> None:
    whole = RotatedTensors._norm_gain
    patch.setattr(RotatedTensors, "_norm_gain", lambda self, norm: whole(self, norm) - 1.0)


def take_neighbouring_heads_for_a_group_apart(patch: Patch) -> None:
    """As if query head i read the values of KV head i mod kv_heads."""

    def wrong(self: RotatedTensors, index: int, weight: Tensor) -> Tensor:
        assert self.basis.r2 is not None
        columns = weight.reshape(len(weight), 2, 2, 16)  # group, KV head, dimension
        return (columns.transpose(1, 2) @ self.basis.r2[index]).transpose(1, 2).reshape(weight.shape)

    patch.setattr(RotatedTensors, "_read_changed_values", wrong)


def turn_the_values_by_the_transpose(patch: Patch) -> None:
    whole = RotatedTensors._change_values

    def wrong(self: RotatedTensors, index: int, tensor: Tensor) -> Tensor:
        assert self.basis.r2 is not None
        transposed = replace(self, basis=replace(self.basis, r2=self.basis.r2.mT))
        return whole(transposed, index, tensor)

    patch.setattr(RotatedTensors, "_change_values", wrong)


def forget_down_proj(patch: Patch) -> None:
    patch.setattr(RotatedTensors, "_read_changed_mlp", lambda self, index, weight: weight)


@pytest.mark.parametrize(
    ("fault", "family", "parts"),
    [
        (forget_to_untie, "llama_tied", ["r1"]),
        (forget_to_untie, "gemma", ["r1"]),
        (forget_the_bias_of_the_values, "qwen2", ["r2"]),
        (forget_the_bias_of_the_values, "qwen2", ["value_scales"]),
        (forget_the_bias_of_the_values, "llama_bias", ["r2"]),
        (forget_other_biases, "llama_bias", ["r1"]),
        (forget_to_fuse, "llama", ["r1"]),
        (forget_to_fuse, "gemma", ["r1"]),
        (leave_the_gain_in_the_norm, "llama", ["r1"]),
        (leave_the_gain_in_the_norm, "gemma", ["r1"]),
        (forget_that_gemma_adds_one, "gemma", ["r1"]),
        (take_neighbouring_heads_for_a_group_apart, "llama", ["r2"]),
        (turn_the_values_by_the_transpose, "llama", ["r2"]),
        (forget_down_proj, "llama", ["mlp_scales"]),
        (forget_down_proj, "llama", ["r4"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_a_merge_that_forgets_something_is_refused(
    fault: Callable[[Patch], None], family: str, parts: list[str], root: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    model = original(root, family)
    basis = random_basis(model, parts)
    assert gate(model, basis, tmp_path / "right").merge <= MERGE_LIMIT
    fault(monkeypatch)
    with pytest.raises(NumericsError, match=DIFFER):
        gate(model, basis, tmp_path / "wrong")


@pytest.mark.parametrize("name", ["self_attn.k_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"])
def test_one_tensor_of_one_block_in_the_old_basis_is_refused(
    name: str, root: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    model = original(root)
    whole = RotatedTensors._compute
    wrong = f"model.layers.2.{name}"

    def forgetful(self: RotatedTensors, stored: str) -> Tensor:
        return model.checkpoint.read([stored])[stored] if stored == wrong else whole(self, stored)

    monkeypatch.setattr(RotatedTensors, "_compute", forgetful)
    with pytest.raises(NumericsError, match=DIFFER):
        gate(model, random_basis(model, ["r1"]), tmp_path / "rotated")


def test_a_rotation_that_is_not_orthogonal_is_refused(root: Path, tmp_path: Path) -> None:
    model = original(root)
    for part in ("r1", "r2"):
        basis = random_basis(model, [part])
        stretched = replace(basis, **{part: 1.01 * getattr(basis, part)})
        with pytest.raises(NumericsError, match=DIFFER):
            gate(model, stretched, tmp_path / part)


def test_a_weight_that_is_no_number_is_refused_before_it_is_merged(tmp_path: Path) -> None:
    model = original(tmp_path)
    path = model.checkpoint.directory / SINGLE
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_tensors(path, tensors)
    with pytest.raises(
        NumericsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 1 values that are NaN or Inf"
    ):
        gate(model, random_basis(model, PARTS), tmp_path / "rotated")


@pytest.mark.parametrize("part", ["r1", "r2", "value_scales", "mlp_scales"])
def test_a_basis_that_is_no_number_is_refused(part: str, root: Path, tmp_path: Path) -> None:
    model = original(root)
    basis = random_basis(model, ABSORBED)
    getattr(basis, part)[0, 1] = float("nan")
    with pytest.raises(NumericsError):
        gate(model, basis, tmp_path / "rotated")


def test_logits_that_are_no_numbers_are_not_close_to_anything(root: Path, tmp_path: Path) -> None:
    model = original(root)
    merged = write_rotated(in_basis(model, random_basis(model, ["r1"]), tmp_path / "rotated"), PROBE, lambda: None)
    check_invariance(model, tmp_path / "rotated", merged, PROBE)
    merged[3, 5] = float("nan")
    with pytest.raises(NumericsError, match=f"{DIFFER} nan"):
        check_invariance(model, tmp_path / "rotated", merged, PROBE)


def shard(directory: Path, number: int) -> Path:
    return directory / f"model-{number:05d}-of-00004.safetensors"


def overwrite(directory: Path) -> None:
    """A block's o_proj with finite bytes that are none of its own."""
    tensors = load_file(shard(directory, 3))
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = tensors[name].roll(1, dims=0)
    save_tensors(shard(directory, 3), tensors)


def explode(directory: Path) -> None:
    """Each weight is finite, the logits are not."""
    tensors = load_file(shard(directory, 2))
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = torch.full_like(tensors[name], 1e38)
    save_tensors(shard(directory, 2), tensors)


def truncate(directory: Path) -> None:
    path = shard(directory, 2)
    path.write_bytes(path.read_bytes()[:-100])


def fill(directory: Path) -> None:
    path = shard(directory, 2)
    path.write_bytes(path.read_bytes()[:-100] + b"\xff" * 100)


def lose(directory: Path) -> None:
    shard(directory, 4).unlink()


def exchange(directory: Path) -> None:
    """Two blocks of the same shapes."""
    one, other = (load_file(shard(directory, number)) for number in (2, 3))
    for path, tensors, index in ((shard(directory, 2), other, 0), (shard(directory, 3), one, 1)):
        renamed = {f"model.layers.{index}.{name.split('.', 3)[3]}": tensor for name, tensor in tensors.items()}
        save_tensors(path, renamed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (overwrite, NumericsError, r"rotation: .*as stored"),
        (exchange, NumericsError, r"rotation: .*as stored"),
        (explode, NumericsError, "NaN or Inf"),
        (fill, NumericsError, "NaN or Inf"),
        (truncate, ModelError, "half-downloaded"),
        (lose, ModelError, "shards that are missing"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_was_damaged_on_the_disk_is_noticed(
    damage: Callable[[Path], None], error: type[Exception], words: str, dtype: torch.dtype, root: Path, tmp_path: Path
) -> None:
    model = original(root, dtype=dtype)
    run = partial(gate, model, random_basis(model, PARTS))
    run(tmp_path / "whole")
    with pytest.raises(error, match=words):
        run(tmp_path / "damaged", damage)


def test_a_head_that_is_tied_again_on_the_disk_is_noticed(root: Path, tmp_path: Path) -> None:
    """The merge on its way to the disk was right; only what plain transformers would load is not."""
    model = original(root, "llama_tied")

    def tie(directory: Path) -> None:
        tensors = load_file(shard(directory, 1))
        save_tensors(shard(directory, 1), tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})

    with pytest.raises(NumericsError, match=r"rotation: .*as stored"):
        gate(model, random_basis(model, ["r1"]), tmp_path / "rotated", tie)


def test_the_layout_of_these_tests_is_grouped(root: Path) -> None:
    """Or a wrong grouping could not show."""
    layout = tiny_layout(original(root))
    assert (layout.num_heads, layout.num_kv_heads, layout.head_dim) == (4, 2, 16)


def test_every_tensor_is_merged_once(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings take longest, and the walk beside the merge needs them twice more."""
    merged: list[str] = []
    rotated = RotatedTensors._compute

    def count(self: RotatedTensors, name: str) -> Tensor:
        merged.append(name)
        return rotated(self, name)

    monkeypatch.setattr(RotatedTensors, "_compute", count)
    model = original(root, "llama_tied")
    tensors = in_basis(model, random_basis(model, ABSORBED), tmp_path / "rotated")
    write_rotated(tensors, PROBE, lambda: None)
    assert sorted(merged) == sorted(tensors.shapes)
