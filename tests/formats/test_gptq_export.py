"""GPTQ's layout: every number at its place, and what is refused or said before."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export_cases import write_quantized

from jointq_cli.errors import ConfigError
from jointq_cli.formats.export import exporter_of
from jointq_cli.formats.export.gptq import GptqExporter, pack_weight, unpack_weight
from jointq_cli.formats.export.verification import verified
from jointq_cli.formats.uniform import UniformWeight
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.quantization.quantizers import RTN


def rounded(bits: int, symmetric: bool, group_size: int | None, permuted: bool = False) -> UniformWeight:
    """A random weight (32, 96); with permuted, its columns are grouped in another order."""
    random = torch.Generator().manual_seed(bits)
    rtn = RTN(bits=bits, group_size=group_size, symmetric=symmetric)
    values = torch.randn(32, 96, generator=random) - 0.2
    weight = rtn.quantize(values, rtn.prepare(torch.eye(96, dtype=torch.float64)), torch.bfloat16).quantized
    assert isinstance(weight, UniformWeight)
    order = torch.randperm(96, generator=random).to(torch.int32) if permuted else None
    return replace(weight, permutation=order)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group_size", "permuted"), [(32, False), (32, True), (None, False)])
def test_a_weight_is_read_back_exactly(
    bits: int, symmetric: bool, group_size: int | None, permuted: bool, version: str
) -> None:
    weight = rounded(bits, symmetric, group_size, permuted)
    if version == "v1":
        weight = replace(weight, zero_point=weight.zero_point.clamp(min=0 if symmetric else 1))
    qweight, qzeros, scales, g_idx = pack_weight("w.weight", weight, version).values()
    groups = weight.scale.shape[1]
    assert (qweight.shape, qzeros.shape) == ((96 * bits // 32, 32), (groups, 32 * bits // 32))
    assert (scales.shape, scales.dtype, g_idx.shape) == ((groups, 32), torch.float16, (96,))
    found = unpack_weight(bits, version, qweight, qzeros, scales, g_idx)
    assert torch.equal(found, weight.dequantize(torch.float32))


def test_the_words_are_gptqs() -> None:
    """Four bits: as AutoGPTQ's `pack` computes them, eight codes of one column in a word, zero-points less 1."""
    weight = replace(rounded(4, False, 32, permuted=True), zero_point=torch.full((32, 3), 9, dtype=torch.uint8))
    tensors = pack_weight("a.b.weight", weight, "v1")
    assert list(tensors) == ["a.b.qweight", "a.b.qzeros", "a.b.scales", "a.b.g_idx"]
    for row in (0, 11):
        codes = weight.codes[:, row * 8 : row * 8 + 8].tolist()
        expected = [sum(code << (4 * place) for place, code in enumerate(column)) for column in codes]
        assert [word & 0xFFFFFFFF for word in tensors["a.b.qweight"][row].tolist()] == expected
    assert [word & 0xFFFFFFFF for word in tensors["a.b.qzeros"].flatten().tolist()] == [0x88888888] * 12
    assert weight.permutation is not None
    assert tensors["a.b.g_idx"][weight.permutation.long()].tolist() == [column // 32 for column in range(96)]


def test_numbers_that_do_not_fit_are_refused() -> None:
    weight = rounded(4, False, 32)
    weight.zero_point[0, 1] = 0
    with pytest.raises(ConfigError, match=r"zero-point 0 \(1 groups of w\.weight\); version=v2"):
        pack_weight("w.weight", weight, "v1")
    for scale in (2.0**-18 * 1.5078125, 70000.0):
        weight.scale[3, 0] = scale
        with pytest.raises(ConfigError, match=r"1 scales of w\.weight are out of float16's range"):
            pack_weight("w.weight", weight, "v2")


@pytest.mark.parametrize(
    ("exporter", "rtn", "expected"),
    [
        (GptqExporter(), RTN(bits=4, group_size=32, symmetric=True), ("gptq", 32, True)),
        (GptqExporter(), RTN(bits=3, group_size=32), ("gptq_v2", 32, False)),
        (GptqExporter("v2"), RTN(bits=8, group_size=None, symmetric=True), ("gptq_v2", -1, True)),
    ],
)
def test_a_model_is_exported_whole(
    tmp_path: Path, exporter: GptqExporter, rtn: RTN, expected: tuple[str, int, bool]
) -> None:
    model = write_quantized(tmp_path / "model", "llama_bias", rtn)
    target = tmp_path / "export"
    target.mkdir()
    exporter.write(model, target)
    record = verified(model, exporter, target)
    assert (record.worst_error, record.rounded) == (0, {})
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    assert json.loads((target / "quantize_config.json").read_text()) == config
    assert (config["checkpoint_format"], config["group_size"], config["sym"]) == expected
    assert (config["bits"], config["desc_act"], config["lm_head"]) == (rtn.bits, False, False)
    assert "dynamic" not in config
    assert (target / "tokenizer.json").is_file()
    stored = sum(
        8 * info.nbytes
        for name, info in Checkpoint(target, packed=True).tensors.items()
        if name.endswith(("qweight", "qzeros", "scales", "g_idx"))
    )
    assert exporter.stored_bits(model) == stored


def test_layers_that_are_left_alone_are_named(tmp_path: Path) -> None:
    rtn = RTN(bits=4, group_size=32)
    model = write_quantized(tmp_path / "model", "llama", lambda name: None if "layers.1" in name else rtn)
    target = tmp_path / "export"
    target.mkdir()
    GptqExporter().write(model, target)
    verified(model, GptqExporter(), target)
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    assert "-:^model\\.layers\\.1\\.mlp\\.up_proj$" in config["dynamic"]
    assert "model.layers.0.mlp.up_proj" in config["modules_in_block_to_quantize"][0]
    assert len(config["dynamic"]) == 7
    assert len(config["modules_in_block_to_quantize"][0]) == 14


def test_what_the_format_cannot_hold_is_refused_before_any_work(tmp_path: Path) -> None:
    model = write_quantized(tmp_path, "llama", RTN(bits=4, group_size=32, symmetric=True))

    def check(**changes: object) -> list[str]:
        forms = {name: replace(form, **changes) for name, form in model.forms.items()}
        return GptqExporter().check(replace(model, forms=forms))

    def runtimes(**changes: object) -> list[str]:
        forms = {name: replace(form, **changes) for name, form in model.forms.items()}
        return [runtime for runtime, _ in GptqExporter().commands(replace(model, forms=forms), ".")]

    assert check() == []
    assert "vLLM" in runtimes()
    assert "vLLM" not in runtimes(symmetric=False)
    for changes in ({"symmetric": False}, {"bits": 2}, {"permutation": torch.arange(64)}):
        assert any("vLLM takes this format" in note for note in check(**changes))
    with pytest.raises(ConfigError, match="has 5 bits, and its runtimes load 2, 3, 4, 8"):
        check(bits=5)
    with pytest.raises(ConfigError, match="float32 as the checkpoint is"):
        check(scale=torch.empty(64, 2, device="meta"))
    name, form = next((name, form) for name, form in model.forms.items() if "q_proj" in name)
    narrow = replace(form, codes=form.codes[:12], scale=form.scale[:12])
    with pytest.raises(ConfigError, match=r"q_proj.weight has out_features=12, which with 4 bits fill no whole 32-bit"):
        GptqExporter().check(replace(model, forms={name: narrow}))
    forms = {name: replace(form, bits=8 if "down" in name else 4) for name, form in model.forms.items()}
    with pytest.raises(
        ConfigError, match=r"_proj.* is W\d g32.* is W\d g32 symmetric; the format holds one grid for all"
    ):
        GptqExporter().check(replace(model, forms=forms))


def test_versions_are_settings() -> None:
    assert exporter_of("gptq:v2").label == "gptq-v2"
    assert exporter_of("gptq").label == "gptq"
    with pytest.raises(ConfigError, match="version=v3: must be v1 or v2"):
        exporter_of("gptq", {"version": "v3"})
