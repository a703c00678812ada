"""gpt-oss as it is published, its experts in MXFP4."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_models import edit_config, write_checkpoint
from transformers import AutoModelForCausalLM, Mxfp4Config

from jointq_cli.formats.export.unpack import unpack_checkpoint
from jointq_cli.formats.mxfp4 import dequantized
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.sources import ModelSource, fetch


def published(directory: Path) -> Path:
    """A tiny gpt-oss in which experts are random codes and exponents."""
    write_checkpoint(directory, "gpt_oss", dtype=torch.bfloat16)
    file = directory / "model.safetensors"
    tensors, random = load_file(file), torch.Generator().manual_seed(1)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=random).to(torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 126, shape, generator=random).to(torch.uint8)
    save_file(tensors, file, {"format": "pt"})
    edit_config(directory, quantization_config={"quant_method": "mxfp4"})
    return directory


def test_it_is_dequantised_where_it_is_to_be_quantised_as_transformers_does(tmp_path: Path) -> None:
    source = published(tmp_path / "source")
    target = tmp_path / "target"

    def convert(place: Path) -> Path:
        target.mkdir()
        unpack_checkpoint(place, target)
        return target

    found = fetch(ModelSource(str(source)), convert)
    expected = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    ).state_dict()
    assert found.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found.read([name])[name], tensor), name
    config = json.loads((target / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["jointq"] == {"dequantized": "mxfp4"}
    assert Checkpoint(target).dtype == torch.bfloat16


def test_the_lower_half_of_a_byte_comes_first_and_exponents_are_of_two() -> None:
    blocks = torch.zeros(1, 1, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0, :2] = torch.tensor([0x72, 0x9F])  # 1.0 and 6.0, -6.0 and -0.5
    [[*values]] = dequantized(blocks, torch.tensor([[[129]]], dtype=torch.uint8), torch.bfloat16).squeeze(-1).tolist()
    assert values[:5] == [4.0, 24.0, -24.0, -2.0, 0.0]
