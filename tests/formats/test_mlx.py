"""MLX's layout: the error that its rounded biases leave, and what mlx computes of our words where it is installed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export_cases import write_quantized
from safetensors.torch import load_file, save_file
from tiny_models import edit_config

from jointq_cli.errors import ConfigError
from jointq_cli.formats.export import exporter_of
from jointq_cli.formats.export.base import relative_error
from jointq_cli.formats.export.mlx import ROUNDING, MlxExporter, pack_weight, unpack_weight
from jointq_cli.formats.export.verification import verified
from jointq_cli.formats.uniform import UniformWeight
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.quantization.quantizers import DBF, RTN, Binary, Quantizer


def rounded(bits: int, symmetric: bool, group_size: int | None) -> UniformWeight:
    """A random weight (40, 192), all positive, so that asymmetric zero-points are large."""
    rtn = RTN(bits=bits, group_size=group_size, symmetric=symmetric)
    values = -torch.rand(40, 192, generator=torch.Generator().manual_seed(bits))
    weight = rtn.quantize(values, rtn.prepare(torch.eye(192, dtype=torch.float64)), torch.bfloat16).quantized
    assert isinstance(weight, UniformWeight)
    return weight


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 96, None])
def test_a_weight_is_read_back_within_the_rounding_of_its_bias(
    bits: int, symmetric: bool, group_size: int | None
) -> None:
    weight = rounded(bits, symmetric, group_size)
    words, scales, biases = pack_weight("w.weight", weight).values()
    size = {None: 64, 96: 32}.get(group_size, group_size)
    assert (words.shape, words.dtype, scales.shape) == ((40, 192 * bits // 32), torch.uint32, (40, 192 // size))
    found = unpack_weight(bits, words, scales, biases)
    step = weight.scale.float()[:, weight.column_groups()]
    worst = ((found - weight.dequantize(torch.float32)) / step).abs().max()
    # Symmetric: the zero-point is a power of two, so the bias is exact; what is left is float32's rounding.
    assert worst <= (1e-4 if symmetric else (2**bits - 1) * ROUNDING)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_decodes_our_words(bits: int) -> None:
    mx = pytest.importorskip("mlx.core")
    import numpy as np

    weight = rounded(bits, False, 64)
    words, scales, biases = pack_weight("w.weight", weight).values()
    arrays = (mx.array(tensor.numpy()) for tensor in (words, scales.float(), biases.float()))
    found = np.array(mx.dequantize(*arrays, group_size=64, bits=bits))
    assert np.allclose(found, unpack_weight(bits, words, scales, biases).numpy(), rtol=0, atol=1e-6)


def test_mlx_lm_computes_what_the_dequantised_model_does(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    from jointq_cli.evaluation.engines import opened

    several = {"o_proj": RTN(bits=8, group_size=32), "up_proj": None}
    usual = RTN(bits=4, group_size=None)
    model = write_quantized(tmp_path / "model", "qwen3", lambda name: several.get(name.rpartition(".")[2], usual))
    target = tmp_path / "export"
    target.mkdir()
    MlxExporter().write(model, target)
    ids = torch.arange(32)
    with opened("mlx", target) as one, opened("transformers", tmp_path / "model") as two:
        two.model.float()
        found, expected = one.log_probabilities(ids), two.log_probabilities(ids)
    assert torch.nn.functional.kl_div(found, expected, log_target=True, reduction="batchmean") < 1e-4


def test_a_model_is_exported_whole(tmp_path: Path) -> None:
    wide = RTN(bits=8, group_size=32)
    model = write_quantized(
        tmp_path / "model", "llama_tied", lambda name: wide if "down" in name else RTN(bits=4, group_size=64)
    )
    target = tmp_path / "export"
    target.mkdir()
    MlxExporter().write(model, target)
    record = verified(model, MlxExporter(), target)
    assert 0 < record.worst_error <= 255 * ROUNDING
    written = Checkpoint(target, packed=True)
    assert {info.dtype for info in written.tensors.values()} == {"U32", "F16"}
    config = json.loads((target / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    assert config["quantization"] == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        **{
            f"model.layers.{index}.mlp.down_proj": {"group_size": 32, "bits": 8, "mode": "affine"} for index in range(3)
        },
        "model.embed_tokens": False,
    }
    parts = [info.nbytes for name, info in written.tensors.items() if "_proj" in name]
    assert MlxExporter().stored_bits(model) == 8 * sum(parts)


def test_other_tensors_stay_as_they_are_on_request(tmp_path: Path) -> None:
    model = write_quantized(tmp_path / "model", "llama", RTN(bits=4, group_size=32))
    target = tmp_path / "export"
    target.mkdir()
    exporter = exporter_of("mlx:checkpoint")
    assert exporter.label == "mlx-checkpoint"
    exporter.write(model, target)
    assert verified(model, exporter, target).rounded == {}
    assert Checkpoint(target, packed=True).tensors["model.norm.weight"].dtype == "BF16"


@pytest.mark.parametrize("zero_point", ["half", "real"])
def test_zero_points_that_are_no_integers_are_held_here_and_refused_elsewhere(tmp_path: Path, zero_point: str) -> None:
    model = write_quantized(tmp_path / "model", "llama", RTN(bits=2, group_size=32, zero_point=zero_point))
    target = tmp_path / "export"
    target.mkdir()
    exporter = MlxExporter()
    assert exporter.check(model) == []
    exporter.write(model, target)
    assert verified(model, exporter, target).worst_error <= 3 * ROUNDING
    for word in ("gptq", "compressed-tensors", "gguf:q4_1"):
        with pytest.raises(ConfigError, match=rf"W2 g32 {zero_point}, .* integer zero-points alone; export=mlx"):
            exporter_of(word).check(model)


@pytest.mark.parametrize(
    ("quantizer", "way_out"),
    [
        (Binary(group_size=32, column_scale=True), r"W1 g32 half column-scaled, .*; quantizer=jointq, or the run's"),
        (DBF(bits=3.0), r"DBF rank \d+, .*; quantizer=jointq, or the run's checkpoint as it is"),
    ],
)
def test_what_no_engine_computes_is_refused_with_a_way_out(quantizer: Quantizer, way_out: str, tmp_path: Path) -> None:
    model = write_quantized(tmp_path / "model", "llama", RTN(bits=4, group_size=32))
    forms = {name: quantizer.storage(*form.shape, torch.bfloat16) for name, form in model.forms.items()}
    for word in ("mlx", "gptq", "compressed-tensors", "gguf:q4_1"):
        with pytest.raises(ConfigError, match=way_out):
            exporter_of(word).check(replace(model, forms=forms))


def test_two_levels_around_zero_are_refused_with_a_way_out(tmp_path: Path) -> None:
    model = write_quantized(tmp_path / "model", "llama", RTN(bits=4, group_size=32))
    forms = {name: Binary(group_size=32).storage(*form.shape, torch.bfloat16) for name, form in model.forms.items()}
    with pytest.raises(ConfigError, match=r"W1 g32 half, .*; quantizer=jointq with quantizer.zero_point=integer"):
        exporter_of("gptq").check(replace(model, forms=forms))


def test_numbers_out_of_float16s_range_are_refused(tmp_path: Path) -> None:
    weight = rounded(8, False, 64)
    weight.scale[0, 0] = 600.0
    with pytest.raises(ConfigError, match=r"zero-point of w\.weight is out of float16's range"):
        pack_weight("w.weight", weight)
    model = write_quantized(tmp_path / "model", "llama", RTN(bits=4, group_size=32))
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, file, {"format": "pt"})
    (tmp_path / "export").mkdir()
    with pytest.raises(ConfigError, match=r"model\.norm\.weight has numbers out of .*dtype=checkpoint"):
        MlxExporter().write(model, tmp_path / "export")


def test_tensors_of_zeros_are_in_float16s_range(tmp_path: Path) -> None:
    model = write_quantized(tmp_path / "model", "llama_bias", RTN(bits=4, group_size=32))
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.k_proj.bias"].zero_()
    save_file(tensors, file, {"format": "pt"})
    (tmp_path / "export").mkdir()
    MlxExporter().write(model, tmp_path / "export")
    verified(model, MlxExporter(), tmp_path / "export")
    assert relative_error(torch.ones(3), torch.zeros(3)) == torch.inf


def test_what_the_format_cannot_hold_is_refused_before_any_work(tmp_path: Path) -> None:
    model = write_quantized(tmp_path, "llama", RTN(bits=4, group_size=32))

    def check(**changes: object) -> list[str]:
        forms = {name: replace(form, **changes) for name, form in model.forms.items()}
        return MlxExporter().check(replace(model, forms=forms))

    assert check() == []
    for changes, rule in (
        ({"bits": 7}, "7 bits, and MLX takes 2, 3, 4, 5, 6 or 8"),
        ({"permutation": torch.arange(64)}, "act_order"),
        ({"scale": torch.empty(64, 4, dtype=torch.bfloat16, device="meta")}, "groups of 16 columns"),
        ({"scale": torch.empty(64, 2, device="meta")}, "float32"),
    ):
        with pytest.raises(ConfigError, match=rule):
            check(**changes)
    edit_config(tmp_path, model_type="falcon")
    assert "no model of type falcon" in MlxExporter().check(replace(model, checkpoint=Checkpoint(tmp_path)))[0]
