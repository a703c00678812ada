"""Packed checkpoints as ordinary ones, and what is refused because it would be read wrongly."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import write_quantized
from safetensors.torch import load_file, save_file

from jointq_cli.errors import ModelError
from jointq_cli.formats.export import exporter_of
from jointq_cli.formats.export import unpack as unpack_module
from jointq_cli.formats.export.unpack import unpack_checkpoint
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.quantization.quantizers import RTN

SYMMETRIC = RTN(bits=4, group_size=32, symmetric=True)
ASYMMETRIC = RTN(bits=4, group_size=32)


def exported(tmp_path: Path, word: str, rtn: RTN = ASYMMETRIC, family: str = "llama") -> Path:
    """The directory of an export; the dequantised checkpoint is in tmp_path / "model"."""
    model = write_quantized(tmp_path / "model", family, rtn, shard="100KB")
    target = tmp_path / "export"
    target.mkdir()
    exporter_of(word).write(model, target)
    return target


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One export of each format."""
    words = ("compressed-tensors", "gptq", "mlx")
    return {word: exported(tmp_path_factory.mktemp(word), word) for word in words}


def copied(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "packed"))


def unpacked(tmp_path: Path, packed: Path) -> tuple[Checkpoint, Checkpoint]:
    """What `packed` is unpacked into, and the dequantised checkpoint that it was packed from."""
    (tmp_path / "unpacked").mkdir()
    unpack_checkpoint(packed, tmp_path / "unpacked")
    return Checkpoint(tmp_path / "unpacked"), Checkpoint(packed.parent / "model")


@pytest.mark.parametrize(
    ("word", "rtn"),
    [
        ("compressed-tensors", ASYMMETRIC),
        ("compressed-tensors", RTN(bits=3, group_size=None, symmetric=True)),
        ("gptq:v1", SYMMETRIC),
        ("gptq:v2", RTN(bits=3, group_size=32)),
        ("mlx", SYMMETRIC),
        ("mlx:checkpoint", RTN(bits=8, group_size=None, symmetric=True)),
    ],
)
def test_the_dequantised_checkpoint_comes_back_to_the_bit(
    tmp_path: Path, word: str, rtn: RTN, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpack_module, "SHARD_BYTES", 50_000)
    found, expected = unpacked(tmp_path, exported(tmp_path, word, rtn, "llama_bias"))
    assert found.tensors.keys() == expected.tensors.keys()
    assert len({info.file for info in found.tensors.values()}) > 2
    for name in expected.tensors:
        one, two = (checkpoint.read([name])[name] for checkpoint in (found, expected))
        if word == "mlx" and "_proj.weight" not in name:  # stored in float16
            assert torch.allclose(one.double(), two.double(), rtol=0, atol=2**-25), name
        else:
            assert one.dtype == two.dtype
            assert torch.equal(one, two), name
    assert found.config == expected.config
    ours, theirs = ({file.name for file in one.companions(code=True)} for one in (found, expected))
    assert ours == theirs


def test_mlxs_rounded_biases_stay_within_rounding(tmp_path: Path, written: dict[str, Path]) -> None:
    found, expected = unpacked(tmp_path, written["mlx"])
    for name in expected.tensors:
        one, two = (checkpoint.read([name])[name].float() for checkpoint in (found, expected))
        assert torch.allclose(one, two, rtol=2**-7, atol=1e-3), name


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    if "quantization" in config:
        change(config["quantization"])
    path.write_text(json.dumps(config))


def first_scheme(config: dict[str, Any]) -> dict[str, Any]:
    scheme: dict[str, Any] = config["config_groups"]["group_0"]
    return scheme


@pytest.mark.parametrize(
    ("word", "change", "rule"),
    [
        ("gptq", lambda config: config.update(quant_method="awq"), "quant_method=awq, and compressed-tensors, gptq"),
        (
            "gptq",
            lambda config: config.update(checkpoint_format="marlin"),
            "checkpoint_format=marlin; gptq and gptq_v2",
        ),
        ("gptq", lambda config: config.update(bits=5), "bits=5"),
        ("gptq", lambda config: config.update(bits=8), r"qweight is int32 \[8, .*layout has int32 \[16"),
        ("gptq", lambda config: config.update(dynamic={"+:.*down.*": {"bits": 8}}), r"dynamic=\+:\.\*down"),
        ("compressed-tensors", lambda config: config.update(format="int-quantized"), "format=int-quantized"),
        ("compressed-tensors", lambda config: config.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (
            "compressed-tensors",
            lambda config: first_scheme(config)["weights"].update(actorder="group"),
            "actorder=group of its weights",
        ),
        ("compressed-tensors", lambda config: first_scheme(config)["weights"].update(type="float"), "type=float"),
        (
            "compressed-tensors",
            lambda config: first_scheme(config).update(input_activations={"num_bits": 8}),
            "it has input_activations",
        ),
        ("compressed-tensors", lambda config: first_scheme(config).update(targets=["re:.*mlp"]), "names model.layers"),
        ("compressed-tensors", lambda config: first_scheme(config)["weights"].update(symmetric=True), "zero-points"),
        ("compressed-tensors", lambda config: first_scheme(config)["weights"].update(num_bits=3), "weight_packed is"),
        (
            "compressed-tensors",
            lambda config: config.update(transform_config={"config_groups": {"u": {"type": "hadamard", "apply": []}}}),
            "type=hadamard of its transform_config; random-hadamard is",
        ),
        ("mlx", lambda config: config.update(mode="mxfp4"), "mode=mxfp4 of MLX"),
        ("mlx", lambda config: config.update(group_size=64), "has 2 bits for each of 128 columns, not 4"),
    ],
)
def test_what_would_be_read_wrongly_is_refused_in_one_line(
    tmp_path: Path, written: dict[str, Path], word: str, change: Callable[[dict[str, Any]], object], rule: str
) -> None:
    packed = copied(written[word], tmp_path)
    edit(packed, change)
    with pytest.raises(ModelError, match=rule) as refusal:
        unpack_checkpoint(packed, tmp_path)
    assert str(packed) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("word", "lost"), [("gptq", ".g_idx"), ("mlx", ".biases"), ("compressed-tensors", ".weight_shape")]
)
def test_a_part_that_is_missing_is_named(tmp_path: Path, written: dict[str, Path], word: str, lost: str) -> None:
    packed = copied(written[word], tmp_path)
    for file in packed.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({name: tensor for name, tensor in tensors.items() if not name.endswith(lost)}, file)
    with pytest.raises(ModelError, match=rf"holds model\.layers.* and no model\.layers.*{lost}"):
        unpack_checkpoint(packed, tmp_path)
