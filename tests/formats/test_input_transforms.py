"""Turned weights in compressed-tensors: what the library computes of our files, and what vLLM could not run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.transform import TransformConfig, apply_transform_config
from export_cases import Chosen, write_quantized
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from jointq_cli.errors import ConfigError, ModelError
from jointq_cli.evaluation.engines import opened
from jointq_cli.formats.export import QuantizedModel, exporter_of
from jointq_cli.formats.export.compressed_tensors import CompressedTensorsExporter
from jointq_cli.formats.export.input_transforms import bits_of_matrix, matrix
from jointq_cli.formats.export.unpack import unpack_checkpoint
from jointq_cli.formats.export.verification import verified
from jointq_cli.formats.layer_file import save_layer
from jointq_cli.formats.turned import TurnedWeight, random_signs
from jointq_cli.kernels.hadamard import orthogonal_hadamard
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.quantizers import RTN
from jointq_cli.stages.export import model_to_quantize, quantized_model

EXPORTER = CompressedTensorsExporter()
TURNED = RTN(bits=4, group_size=32, incoherence="input")


def exported(tmp_path: Path, chosen: RTN | Chosen) -> tuple[QuantizedModel, Path]:
    """In float32, so that nothing is rounded but by the products with the matrices."""
    model = write_quantized(tmp_path / "model", "llama", chosen, dtype=torch.float32)
    target = tmp_path / "export"
    target.mkdir()
    EXPORTER.write(model, target)
    return model, target


def in_the_library(target: Path, reference: Path) -> nn.Module:
    """The export with its weights as the library decodes them, and its inputs turned by the library's own modules.

    reference: a checkpoint with the same tensors that are not quantised.
    """
    tensors = load_file(target / "model.safetensors")
    packed = json.loads((target / "config.json").read_text())["quantization_config"]
    model: nn.Module = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    groups = QuantizationConfig.model_validate(packed).config_groups
    compressor = BaseCompressor.get_value_from_registry(packed["format"])
    for name in [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]:
        scheme = next(group for group in groups.values() if {"Linear", name} & set(group.targets))
        state = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.rpartition(".")[0] == name}
        model.get_submodule(name).weight.data = compressor.decompress(state, scheme)["weight"].float()
    apply_transform_config(model, TransformConfig.model_validate(packed["transform_config"]))
    loaded = {name: value for name, value in tensors.items() if name.endswith("_input.weight")}
    for name, value in loaded.items():
        model.get_parameter(name).data.copy_(value)
    assert {value.data_ptr() for name, value in model.state_dict().items() if name.endswith("_input.weight")} == {
        model.get_parameter(name).data_ptr() for name in loaded
    }
    return model


def some(name: str) -> RTN:
    """Two seeds, and layers in their own basis."""
    if "o_proj" in name:
        return replace(TURNED, incoherence="none")
    return replace(TURNED, incoherence_seed=int("mlp" in name))


@pytest.mark.parametrize(
    ("chosen", "matrices"), [(TURNED, 2), (replace(TURNED, symmetric=True, bits=3, incoherence_block=16), 1), (some, 3)]
)
def test_the_library_turns_inputs_as_the_weights_are(tmp_path: Path, chosen: RTN | Chosen, matrices: int) -> None:
    model, target = exported(tmp_path, chosen)
    assert verified(model, EXPORTER, target).worst_error < 1e-4
    assert sum(name.endswith("_input.weight") for name in Checkpoint(target, packed=True).tensors) == matrices
    ids = torch.arange(32)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)(ids).logits
        found = in_the_library(target, tmp_path / "model")(ids).logits
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)
    (tmp_path / "unpacked").mkdir()
    unpack_checkpoint(target, tmp_path / "unpacked")
    one, two = (Checkpoint(tmp_path / name) for name in ("unpacked", "model"))
    assert one.tensors.keys() == two.tensors.keys()
    for name in two.tensors:
        ours, theirs = (checkpoint.read([name])[name].float() for checkpoint in (one, two))
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6), name


@pytest.mark.parametrize(("size", "dtype"), [(12, torch.bfloat16), (64, torch.bfloat16), (7, torch.float32)])
def test_matrices_are_the_basis_times_the_root_of_their_size(size: int, dtype: torch.dtype) -> None:
    signs = random_signs(size, 0, torch.device("cpu"))
    found = matrix(signs)
    assert found.dtype == dtype
    assert bits_of_matrix(size) == 8 * found.nbytes
    basis = torch.diag(signs.double()) @ orthogonal_hadamard(size)
    assert torch.allclose(found.double() / size**0.5, basis, rtol=0, atol=1e-7)


def test_their_size_is_counted_and_what_runs_them_is_said(tmp_path: Path) -> None:
    model = write_quantized(tmp_path, "llama", TURNED)
    inner = [form.inner.stored_bits for form in model.forms.values() if isinstance(form, TurnedWeight)]
    assert EXPORTER.stored_bits(model) == sum(inner) + 16 * (64**2 + 128**2)
    [note] = EXPORTER.check(model)
    assert "matrices of 64 x 64 and 128 x 128" in note
    # Of a block: inputs of 64 (q, k and v; o; gate and up) and of 128 (down); k and v have half the rows of q and o.
    assert f"{100 * (3 * 64**2 + 128**2) / (3 * 64**2 + 3 * 64 * 128):.2g} % more" in note
    assert not EXPORTER.engine_reads(model)
    assert [runtime for runtime, _ in EXPORTER.commands(model, ".")] == ["vLLM"]
    some_turned = replace(model, forms={name: form for name, form in model.forms.items() if "k_proj" not in name})
    plain = {name: getattr(form, "inner", form) if "up_proj" in name else form for name, form in model.forms.items()}
    for other, parts in ((some_turned, "q_proj, k_proj"), (replace(model, forms=plain), "gate_proj, up_proj")):
        assert any(parts in each for each in EXPORTER.check(other))


@pytest.mark.parametrize(
    ("family", "rtn", "rule"),
    [
        ("llama_bias", TURNED, r"q_proj\.weight is turned and has a bias, .*; quantizer\.incoherence=none"),
        ("phi3", TURNED, r"qkv_proj\.weight is turned and is several layers in one"),
        ("mixtral", replace(TURNED, symmetric=True), "is turned and is an expert"),
        ("llama", replace(TURNED, bits=2), r"W2 g32 half turned, .*quantizer\.zero_point=integer"),
    ],
)
def test_what_vllm_does_not_turn_is_refused_before_any_work(tmp_path: Path, family: str, rtn: RTN, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        EXPORTER.check(write_quantized(tmp_path, family, rtn))


def test_transformers_which_would_leave_inputs_as_they_are_is_not_asked(tmp_path: Path) -> None:
    _, target = exported(tmp_path, TURNED)
    with pytest.raises(ModelError, match="does not turn inputs by a transform_config"), opened("transformers", target):
        pass


@pytest.mark.parametrize("other", [{"incoherence_seed": 1}, {"incoherence_block": 16}])
def test_layers_that_vllm_joins_share_their_signs(tmp_path: Path, other: dict[str, int]) -> None:
    """Which is found in the settings, before any work, and in the files of a finished model."""

    def chosen(name: str) -> RTN:
        return replace(TURNED, **(other if "k_proj" in name else {}))

    finished = write_quantized(tmp_path, "llama", chosen)
    model = StreamedModel(finished.checkpoint, torch.device("cpu"), torch.float32)
    layers = [name.removesuffix(".weight") for name in finished.forms]
    for layer in layers:
        save_layer(tmp_path / f"{layer}.safetensors", finished.load(f"{layer}.weight"))
    planned = model_to_quantize(model, {layer: chosen(layer) for layer in layers})
    for each in (planned, quantized_model(model, finished.checkpoint, layers, tmp_path)):
        with pytest.raises(ConfigError, match=r"q_proj and .*k_proj are turned by different signs"):
            EXPORTER.check(each)


def test_other_formats_name_the_one_that_holds_them(tmp_path: Path) -> None:
    model = write_quantized(tmp_path, "llama", TURNED)
    for word in ("gptq", "gguf", "mlx"):
        with pytest.raises(ConfigError, match=r"; a new run with export=\w+ \(and no incoherence=input\), or "):
            exporter_of(word).check(model)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda tensors: tensors.pop("model.layers.0.mlp.down_proj.turned_0_input.weight"), "no tensor LAYER.turned_0"),
        (lambda tensors: next(value for name, value in tensors.items() if "turned_1" in name)[0].neg_(), "steps"),
    ],
)
def test_a_damaged_matrix_is_found(tmp_path: Path, change: Callable[[dict[str, Any]], object], rule: str) -> None:
    model, target = exported(tmp_path, TURNED)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rule):
        verified(model, EXPORTER, target)
