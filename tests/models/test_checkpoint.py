"""Checkpoint directories: tensors are read as stored, and damage is reported in one line."""

import errno
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_models import edit_config, write_checkpoint
from transformers import AutoModelForCausalLM

from jointq_cli.errors import ModelError, NumericsError
from jointq_cli.models.checkpoint import INDEX, SINGLE, Checkpoint, copy_companions, write_index
from jointq_cli.models.skeleton import check_finite
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.system.tensor_files import save_tensors


def refusal(directory: Path) -> str:
    with pytest.raises(ModelError) as error:
        Checkpoint(directory)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_tensors_are_read_as_they_are_stored(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, dtype=torch.bfloat16)
    stored = load_file(directory / SINGLE)
    checkpoint = Checkpoint(directory)
    read = checkpoint.read(checkpoint.tensors)
    assert read.keys() == stored.keys()
    assert all(torch.equal(read[name], stored[name]) and read[name].dtype == torch.bfloat16 for name in stored)
    assert checkpoint.dtype == torch.bfloat16
    assert checkpoint.parameters == sum(tensor.numel() for tensor in stored.values())


def test_shards_and_a_single_file_hold_the_same(tmp_path: Path) -> None:
    one = Checkpoint(write_checkpoint(tmp_path / "one"))
    many = Checkpoint(write_checkpoint(tmp_path / "many", shard="100KB"))
    assert len({info.file for info in many.tensors.values()}) > 2
    names = sorted(one.tensors)
    assert names == sorted(many.tensors)
    assert all(torch.equal(one.read([name])[name], many.read([name])[name]) for name in names)


def test_a_single_file_is_read_before_an_index_as_transformers_does(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, shard="100KB")
    assert Checkpoint(directory).warnings == []
    tensors = load_file(write_checkpoint(tmp_path / "newer") / SINGLE)
    tensors["model.norm.weight"] += 1
    save_tensors(directory / SINGLE, tensors)
    expected = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).get_parameter("model.norm.weight")
    checkpoint = Checkpoint(directory)
    assert torch.equal(checkpoint.read(["model.norm.weight"])["model.norm.weight"], expected)
    assert checkpoint.hashed_files == [directory / "config.json", directory / SINGLE]
    assert [warning.removeprefix(str(directory)) for warning in checkpoint.warnings] == [
        ": has both model.safetensors and model.safetensors.index.json; model.safetensors is read, as transformers does"
    ]


def test_the_content_hash_follows_the_bytes_and_not_the_place(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "one")
    before = Checkpoint(directory).content_hash
    assert Checkpoint(shutil.copytree(directory, tmp_path / "two")).content_hash == before
    tensors = load_file(directory / SINGLE)
    tensors["model.norm.weight"][0] += 1
    save_tensors(directory / SINGLE, tensors)
    assert Checkpoint(directory).content_hash != before


def test_written_shards_and_index_read_back(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16)}
    shards = [tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model-00002-of-00002.safetensors"]
    for shard, name in zip(shards, tensors, strict=True):
        save_tensors(shard, {name: tensors[name]})
    write_index(tmp_path, shards)
    (tmp_path / "config.json").write_text("{}")
    read = Checkpoint(tmp_path).read(["a", "b"])
    assert torch.equal(read["a"], tensors["a"])
    assert json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"] == 28


def test_companions_exclude_the_old_index_and_readme(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", shard="100KB")
    (source / "README.md").write_text("the original's card")
    (source / "modeling_x.py").write_text("")
    target = tmp_path / "target"
    target.mkdir()
    copy_companions(Checkpoint(source), target, code=False)
    copied = {path.name for path in target.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= copied
    assert not copied & {INDEX, "README.md", "modeling_x.py"}
    copy_companions(Checkpoint(source), target, code=True)
    assert (target / "modeling_x.py").exists()


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere").endswith("nowhere: no such directory")


def test_a_directory_without_config_is_named(tmp_path: Path) -> None:
    assert "config.json: missing" in refusal(tmp_path)


def test_a_config_that_is_no_json_is_named(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    (directory / "config.json").write_text("{")
    assert "config.json: not valid JSON" in refusal(directory)


def test_a_half_downloaded_shard_is_named(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    whole = (directory / SINGLE).read_bytes()
    (directory / SINGLE).write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors: damaged or half-downloaded" in refusal(directory)


def test_an_empty_shard_is_named(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    (directory / SINGLE).write_bytes(b"")
    assert "model.safetensors: damaged or half-downloaded" in refusal(directory)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, shard="100KB")
    gone = sorted(directory.glob("model-*.safetensors"))[1]
    gone.unlink()
    assert gone.name in refusal(directory)


def test_a_broken_index_is_named(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, shard="100KB")
    (directory / INDEX).write_text('{"weight_map": []}')
    assert "not a safetensors index" in refusal(directory)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    (directory / SINGLE).rename(directory / "pytorch_model.bin")
    assert "pickle only, which is never loaded" in refusal(directory)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "text_config.quantization_config"),
    ],
)
def test_a_model_that_is_quantised_already_is_refused_with_the_key(
    values: dict[str, Any], key: str, tmp_path: Path
) -> None:
    directory = write_checkpoint(tmp_path)
    edit_config(directory, **values)
    assert refusal(directory) == f"{directory}: is quantised already (its config.json has a {key})"


def test_a_weight_with_a_scale_beside_it_is_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    tensors = load_file(directory / SINGLE)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
    save_tensors(directory / SINGLE, tensors)
    assert refusal(directory) == f"{directory}: is quantised already (it holds a {name}_scale_inv beside a weight)"


def test_a_packed_checkpoint_without_a_quantization_config_is_refused(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    gptq, mlx, config = (write_checkpoint(tmp_path / kind) for kind in ("gptq", "mlx", "config"))
    tensors = load_file(gptq / SINGLE)
    save_tensors(mlx / SINGLE, {**tensors, f"{name}.scales": torch.ones(1, 1)})
    del tensors[f"{name}.weight"]
    save_tensors(gptq / SINGLE, {**tensors, f"{name}.qweight": torch.ones(1, 1, dtype=torch.int32)})
    edit_config(config, quantization={"bits": 4})
    assert refusal(gptq) == f"{gptq}: is quantised already (by GPTQ or AWQ: it holds {name}.qweight)"
    assert refusal(mlx) == f"{mlx}: is quantised already (by MLX: it holds {name}.scales)"
    assert refusal(config) == f"{config}: is quantised already (by MLX: its config.json has a quantization)"


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "base_model.model.", "base_model.model._orig_mod."])
def test_the_names_of_a_wrapped_model_are_read_without_the_wrapper(wrapper: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    plain = Checkpoint(directory)
    assert plain.warnings == []
    tensors = load_file(directory / SINGLE)
    save_tensors(directory / SINGLE, {wrapper + name: tensor for name, tensor in tensors.items()})
    checkpoint = Checkpoint(directory)
    assert checkpoint.shapes == plain.shapes
    assert all(torch.equal(checkpoint.read([name])[name], tensor) for name, tensor in tensors.items())
    assert checkpoint.warnings == [f"{directory}: all names of tensors begin with {wrapper}; read without it"]


def test_tensors_of_other_dtypes_are_named_before_any_work(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    tensors = load_file(directory / SINGLE)
    name = "model.layers.0.mlp.up_proj.weight"
    save_tensors(directory / SINGLE, {**tensors, name: tensors[name].double()})
    [warning] = Checkpoint(directory).warnings
    assert warning.startswith(f"{directory}: 1 of {len(tensors)} tensors are float64, {name} first;")
    save_tensors(directory / SINGLE, {**tensors, name: tensors[name].to(torch.float8_e4m3fn)})
    message = f"{directory / SINGLE}: tensor {name} has dtype F8_E4M3, which cannot be quantised"
    with pytest.raises(ModelError, match=re.escape(message)):
        StreamedModel(Checkpoint(directory), torch.device("cpu"), torch.float32)
    with pytest.raises(ModelError, match=re.escape(message)):
        check_finite(Checkpoint(directory), False)


def test_a_directory_that_is_something_else_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    assert "a LoRA adapter: merge it into its model first" in refusal(tmp_path / "lora")
    write_checkpoint(tmp_path / "run" / "checkpoint")
    assert refusal(tmp_path / "run").endswith(f"name the checkpoint: {tmp_path / 'run' / 'checkpoint'}")


def test_a_quantization_config_of_null_is_that_of_a_plain_model(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    edit_config(directory, quantization_config=None, vision={"quantization_config": None})
    assert len(StreamedModel(Checkpoint(directory), torch.device("cpu"), torch.float32)) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    directory = write_checkpoint(tmp_path)
    tensors = load_file(directory / SINGLE)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, directory / SINGLE, {"format": "pt"})
    checkpoint = Checkpoint(directory)
    model = StreamedModel(checkpoint, torch.device("cpu"), torch.float32)
    message = r"model\.layers\.1\.mlp\.up_proj\.weight holds 1 values that are NaN or Inf"
    with pytest.raises(NumericsError, match=message):
        check_finite(checkpoint, trust_remote_code=False)
    with pytest.raises(NumericsError, match=message), model.block(1, model.block_tensors(1)):
        pass


def test_tensors_that_the_model_does_not_use_may_hold_anything(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, "gpt_neox")
    unused = {
        "gpt_neox.layers.1.attention.masked_bias": torch.tensor(float("-inf"), dtype=torch.float16),
        "counter": torch.tensor([1, 2**31], dtype=torch.uint32),
    }
    save_tensors(directory / SINGLE, load_file(directory / SINGLE) | unused)
    checkpoint = Checkpoint(directory)
    check_finite(checkpoint, trust_remote_code=False)
    model = StreamedModel(checkpoint, torch.device("cpu"), torch.float32)
    with model.block(1, model.block_tensors(1)), model.outer():
        copied = model.block_tensors(1) | model.outer_tensors()
    assert all(torch.equal(copied[name], tensor) for name, tensor in unused.items())


def test_a_full_disk_is_an_os_error_with_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:  # what safetensors 0.8 says on a full tmpfs
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("jointq_cli.system.tensor_files.save_file", full)
    with pytest.raises(OSError, match="No space left") as error:
        save_tensors(tmp_path / "shard", {"a": torch.ones(1)})
    assert error.value.errno == errno.ENOSPC
