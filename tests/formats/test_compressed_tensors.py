"""compressed-tensors: what the library makes of our files, and what is refused or said before."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from export_cases import Chosen, write_quantized
from tiny_models import write_checkpoint
from transformers import AutoModelForCausalLM

from jointq_cli.errors import ConfigError, ModelError
from jointq_cli.formats.export import QuantizedModel, exporter_of, exporters_of
from jointq_cli.formats.export.compressed_tensors import CompressedTensorsExporter, pack_weight, unpack_weight
from jointq_cli.formats.export.verification import verified
from jointq_cli.formats.uniform import UniformWeight
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.quantizers import RTN
from jointq_cli.stages.export import model_to_quantize

EXPORTER = CompressedTensorsExporter()


def exported(tmp_path: Path, family: str, chosen: RTN | Chosen) -> tuple[QuantizedModel, Path]:
    """A model whose dequantised checkpoint is in tmp_path / "model", and the directory of its export."""
    model = write_quantized(tmp_path / "model", family, chosen)
    target = tmp_path / "export"
    target.mkdir()
    EXPORTER.write(model, target)
    return model, target


def same_model(one: Path, two: Path) -> None:
    loaded = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for path in (one, two)]
    ids = torch.arange(32)[None]
    logits = [model(ids).logits for model in loaded]
    assert torch.equal(*logits)
    states = [model.state_dict() for model in loaded]
    assert states[0].keys() <= states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [32, None])
def test_the_library_decodes_our_words(bits: int, group_size: int | None, symmetric: bool) -> None:
    values = torch.randn(40, 96, generator=torch.Generator().manual_seed(bits))
    rtn = RTN(bits=bits, group_size=group_size, symmetric=symmetric)
    weight = rtn.quantize(values, rtn.prepare(torch.eye(96, dtype=torch.float64)), torch.bfloat16).quantized
    assert isinstance(weight, UniformWeight)
    packed = pack_weight("w", weight)
    lowest = 1 << (bits - 1)  # the library's codes are signed
    codes = unpack_from_int32(packed["w.weight_packed"], bits, torch.Size(weight.shape))
    assert torch.equal(codes.int() + lowest, weight.unsigned_codes().int())
    if not symmetric:
        zeros = unpack_from_int32(packed["w.weight_zero_point"], bits, weight.zero_point.shape, packed_dim=0)
        assert torch.equal(zeros.int() + lowest, weight.zero_point.int())
    assert torch.equal(unpack_weight(bits, *packed.values()), weight.dequantize(torch.float32))


@pytest.mark.parametrize(
    ("family", "rtn"),
    [
        ("llama", RTN(bits=4, group_size=32)),
        ("llama_tied", RTN(bits=4, group_size=32, symmetric=True)),
        ("llama_bias", RTN(bits=3, group_size=32)),
        ("qwen3", RTN(bits=8, group_size=None, symmetric=True)),
        ("phi3", RTN(bits=4, group_size=64)),
    ],
)
def test_transformers_loads_the_same_model_to_the_bit(tmp_path: Path, family: str, rtn: RTN) -> None:
    model, target = exported(tmp_path, family, rtn)
    record = verified(model, EXPORTER, target)
    assert (record.worst_error, record.rounded) == (0, {})
    same_model(tmp_path / "model", target)


def test_layers_that_are_left_alone_stay_as_they_are(tmp_path: Path) -> None:
    rtn = RTN(bits=4, group_size=32)
    _, target = exported(tmp_path, "llama", lambda name: None if "layers.0" in name or "o_proj" in name else rtn)
    same_model(tmp_path / "model", target)


def test_symmetric_layers_of_several_widths_become_several_schemes(tmp_path: Path) -> None:
    model, target = exported(
        tmp_path, "llama", lambda name: RTN(bits=8 if "down_proj" in name else 4, group_size=32, symmetric=True)
    )
    assert EXPORTER.check(model) == []
    same_model(tmp_path / "model", target)
    mixed = replace(model, forms={name: replace(form, symmetric=False) for name, form in model.forms.items()})
    assert any("vLLM only" in note for note in EXPORTER.check(mixed))


def test_a_damaged_export_is_found(tmp_path: Path) -> None:
    model, target = exported(tmp_path, "llama", RTN(bits=4, group_size=32))
    file = target / "model.safetensors"
    written = Checkpoint(target, packed=True)
    place = written.tensors["model.layers.0.mlp.up_proj.weight_packed"]
    damaged = bytearray(file.read_bytes())
    damaged[place.offset] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ModelError, match=r"up_proj.*steps"):
        verified(model, EXPORTER, target)
    damaged[place.offset] ^= 1
    damaged[written.tensors["model.norm.weight"].offset] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ModelError, match="norm"):
        verified(model, EXPORTER, target)


def test_what_the_format_or_its_runtimes_cannot_do_is_said_before_any_work(tmp_path: Path) -> None:
    model = write_quantized(tmp_path, "llama", RTN(bits=4, group_size=32))
    permuted = {name: replace(form, permutation=torch.arange(64)) for name, form in model.forms.items()}
    with pytest.raises(ConfigError, match="act_order"):
        EXPORTER.check(replace(model, forms=permuted))
    one_bit = {name: replace(form, bits=1) for name, form in model.forms.items()}
    with pytest.raises(ConfigError, match="1 bit"):
        EXPORTER.check(replace(model, forms=one_bit))
    three = {name: replace(form, bits=3) for name, form in model.forms.items()}
    assert any("Humming" in note for note in EXPORTER.check(replace(model, forms=three)))
    some = {name: form for name, form in model.forms.items() if "k_proj" not in name}
    assert any("q_proj, k_proj, v_proj" in note for note in EXPORTER.check(replace(model, forms=some)))
    assert EXPORTER.check(model) == []


def test_words_name_exporters() -> None:
    assert exporters_of(None) == []
    assert exporters_of("compressed-tensors") == exporters_of(["compressed-tensors"]) == [EXPORTER]
    for word, rule in (
        ("awq", "no such format; there are compressed-tensors"),
        ("compressed-tensors:w4", "has no types"),
        (["compressed-tensors"] * 2, "twice"),
        (4, "no such format"),
    ):
        with pytest.raises(ConfigError, match=rule):
            exporters_of(word)
    with pytest.raises(ConfigError, match="bits=4: compressed-tensors has no such setting"):
        exporter_of("compressed-tensors", {"bits": "4"})


def test_experts_are_read_back_by_transformers_and_are_refused_where_it_cannot(tmp_path: Path) -> None:
    _, target = exported(tmp_path, "mixtral", RTN(bits=4, group_size=32, symmetric=True))
    same_model(tmp_path / "model", target)
    asymmetric = write_quantized(tmp_path / "other", "mixtral", RTN(bits=4, group_size=32))
    with pytest.raises(ConfigError, match=r"experts\.0\.w1\.weight is asymmetric.*quantizer\.symmetric=true"):
        EXPORTER.check(asymmetric)


def test_layers_without_a_tensor_of_their_own_are_refused(tmp_path: Path) -> None:
    model = StreamedModel(Checkpoint(write_checkpoint(tmp_path, "llama4")), torch.device("cpu"), torch.float32)
    expert = "model.layers.0.feed_forward.experts.0.gate_proj"
    assert model_to_quantize(model, {"model.layers.0.self_attn.q_proj": RTN()}).forms
    with pytest.raises(ConfigError, match=rf"{expert} has no tensor of its own \(it is in .*experts.gate_up_proj\)"):
        model_to_quantize(model, {expert: RTN()})
