"""A kind of stored weight and a quantizer made up here go from Hessian to audit without a change anywhere else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from loop_cases import FULL, file_hashes, quantize
from safetensors import safe_open
from tiny_models import write_checkpoint
from torch import Tensor

from jointq_cli.errors import ModelError
from jointq_cli.formats import StoredWeight, UniformWeight
from jointq_cli.formats.audit import audit
from jointq_cli.formats.base import TensorDifference
from jointq_cli.formats.layer_file import load_layer, save_layer
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.quantization.quantizers import DBF, RTN, Binary, Prepared, Quantizer, Solution
from jointq_cli.quantization.quantizers.statistics import HeldOut
from jointq_cli.system.tensor_files import save_tensors


@dataclass(frozen=True, eq=False)
class LevelTable(StoredWeight):
    """Each row has a table of levels: no scale, no zero-point, no groups, and a number of levels that is no power of 2.

    codes (out, in) uint8; levels (out, count) in the checkpoint's dtype.
    """

    kind: ClassVar[str] = "level_table"

    codes: Tensor
    levels: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def label(self) -> str:
        return f"{self.levels.shape[1]} levels per row"

    @property
    def stored_bits(self) -> int:
        width = (self.levels.shape[1] - 1).bit_length()
        return width * self.codes.numel() + 8 * self.levels.element_size() * self.levels.numel()

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.levels.float().gather(1, self.codes.long()).to(dtype)

    def to_tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes.contiguous(), "levels": self.levels.contiguous()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "LevelTable":
        return cls(tensors["codes"], tensors["levels"])

    @classmethod
    def joined(cls, parts: Sequence["LevelTable"]) -> "LevelTable":
        return cls(torch.cat([part.codes for part in parts]), torch.cat([part.levels for part in parts]))


@dataclass(frozen=True)
class Quantiles(Quantizer):
    """Rounds to quantiles of the row."""

    count: int

    @property
    def prepare_key(self) -> str:
        return ""

    def storage(self, out_features: int, in_features: int, dtype: torch.dtype) -> LevelTable:
        codes = torch.empty(out_features, in_features, dtype=torch.uint8, device="meta")
        return LevelTable(codes, torch.empty(out_features, self.count, dtype=dtype, device="meta"))

    def cost(self, out_features: int, in_features: int, tokens: int) -> float:
        return float(out_features * in_features * self.count)

    def prepare(self, hessian: Tensor, heldout: HeldOut | None = None) -> Prepared:
        return Prepared()

    def quantize(self, weight: Tensor, prepared: Prepared, scale_dtype: torch.dtype) -> Solution:
        levels = weight.quantile(torch.linspace(0, 1, self.count), dim=1).T.to(scale_dtype).contiguous()
        codes = (weight[:, :, None] - levels.float()[:, None, :]).abs().argmin(dim=2).to(torch.uint8)
        return Solution(LevelTable(codes, levels), damping=None, verdict="ok")

    def describe(self) -> str:
        return f"Quantiles {self.count}"


def uniform(bits: int = 4) -> UniformWeight:
    rounding = RTN(bits, 8, symmetric=False, mse=False)
    solution = rounding.quantize(torch.linspace(-1, 2, 64).view(4, 16).sin(), Prepared(), torch.bfloat16)
    assert isinstance(solution.quantized, UniformWeight)
    return solution.quantized


def test_a_new_form_goes_through_the_loop_workspace_assembly_and_audit(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    quantizer = Quantiles(11)
    model, workspace, records = quantize(directory, tmp_path / "work", quantizer)
    names = {record.name: model.stored_name(f"{record.name}.weight") for record in records}
    result = Checkpoint(tmp_path / "work" / "checkpoint")
    audited = audit(model, result, records, tmp_path / "work" / "layers")
    assert audited.passed
    assert audited.quantized == len(records) == 21
    packed = sum(round(record.bits_per_weight * record.out_features * record.in_features) for record in records)
    assert packed == sum(
        quantizer.storage(record.out_features, record.in_features, torch.float32).stored_bits for record in records
    )
    record = records[0]
    assert (record.label, record.bits, record.group_size) == ("11 levels per row", None, None)
    assert workspace.record(record.name) == record
    kept = workspace.layer(record.name)
    assert kept is not None
    weight = kept[0]
    assert isinstance(weight, LevelTable)
    stored = result.read([names[record.name]])[names[record.name]]
    assert torch.equal(weight.dequantize(stored.dtype), stored)


@pytest.mark.parametrize("quantizer", [DBF(bits=4.0, start_rounds=4, rounds=1), Binary(None, column_scale=True)])
def test_other_forms_of_the_package_are_kept_resumed_and_corrected_by_qep(quantizer: Quantizer, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    stop = iter(range(2))  # layers

    def kept_layers(name: str) -> bool:
        return name.endswith("o_proj")

    def pause() -> None:
        if next(stop, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(directory, tmp_path / "stopped", quantizer, qep=FULL, keep=kept_layers, pause=pause)
    model, workspace, records = quantize(directory, tmp_path / "stopped", quantizer, qep=FULL, keep=kept_layers)
    quantize(directory, tmp_path / "whole", quantizer, qep=FULL, keep=kept_layers)
    for part in ("layers", "checkpoint"):
        assert file_hashes(tmp_path / "stopped" / part) == file_hashes(tmp_path / "whole" / part)
    result = Checkpoint(tmp_path / "stopped" / "checkpoint")
    assert audit(model, result, records, tmp_path / "stopped" / "layers").passed
    kept = workspace.layer(records[-1].name)
    assert kept is not None
    assert kept[0].label == kept[1].label == quantizer.storage(*kept[0].shape, torch.float32).label
    assert any("alpha" in record.notes for record in records)


def test_the_audit_of_a_new_form_finds_a_weight_that_is_not_what_its_codes_say(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    model, workspace, records = quantize(directory, tmp_path / "work", Quantiles(11))
    kept = workspace.layer(records[0].name)
    assert kept is not None
    other = LevelTable.from_tensors({name: tensor.flip(1) for name, tensor in kept[0].to_tensors().items()})
    save_layer(tmp_path / "work" / "layers" / f"{records[0].name}.safetensors", other)
    names = {record.name: model.stored_name(f"{record.name}.weight") for record in records}
    result = Checkpoint(tmp_path / "work" / "checkpoint")
    audited = audit(model, result, records, tmp_path / "work" / "layers")
    assert audited.changed == [names[records[0].name]]


def test_parts_of_a_layer_are_joined_whatever_their_form() -> None:
    weight = torch.randn(32, 24, generator=torch.Generator().manual_seed(0))
    quantizer = Quantiles(5)
    complete = quantizer.quantize(weight, Prepared(), torch.float32)
    parts = [quantizer.quantize(part, Prepared(), torch.float32) for part in weight.split(16)]
    joined = quantizer.join(parts).quantized
    assert joined.difference(complete.quantized) == []
    assert joined.shape == (32, 24)


# --- files


@pytest.mark.parametrize(
    "weight", [uniform(), Quantiles(5).quantize(torch.eye(6), Prepared(), torch.float16).quantized]
)
def test_a_file_brings_back_the_kind_and_every_tensor(weight: StoredWeight, tmp_path: Path) -> None:
    save_layer(tmp_path / "layer.safetensors", weight)
    back = load_layer(tmp_path / "layer.safetensors")
    assert type(back) is type(weight)
    assert back.label == weight.label
    assert weight.difference(back) == []
    assert torch.equal(back.dequantize(torch.float32), weight.dequantize(torch.float32))
    assert sum(tensor.nbytes for tensor in weight.to_tensors().values()) == weight.file_bytes


def test_a_uniform_weight_is_written_to_the_bytes_of_before_there_were_kinds(tmp_path: Path) -> None:
    save_layer(tmp_path / "now.safetensors", uniform())
    save_tensors(tmp_path / "before.safetensors", uniform().to_tensors())
    assert (tmp_path / "now.safetensors").read_bytes() == (tmp_path / "before.safetensors").read_bytes()
    with safe_open(tmp_path / "now.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_an_unknown_kind_is_an_error_in_one_line_that_names_file_and_kind(tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    save_tensors(path, uniform().to_tensors(), {"kind": "lattice"})
    with pytest.raises(ModelError) as caught:
        load_layer(path)
    assert str(caught.value).startswith(f"{path}: a stored weight of kind lattice; known are ")
    assert {"binary_product", "column_scaled", "k_quant", "turned", "uniform"} <= set(
        str(caught.value).split("known are ")[1].split(", ")
    )
    assert "\n" not in str(caught.value)


def test_a_missing_tensor_is_an_error_that_names_file_and_tensor(tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    save_tensors(path, {name: tensor for name, tensor in uniform().to_tensors().items() if name != "scale"})
    with pytest.raises(ModelError) as caught:
        load_layer(path)
    assert str(caught.value) == f"{path}: tensor scale is missing"


def test_moving_to_a_device_keeps_the_form() -> None:
    for weight in (uniform(), Quantiles(5).quantize(torch.eye(6), Prepared(), torch.float16).quantized):
        moved = weight.to("cpu")
        assert type(moved) is type(weight)
        assert moved.difference(weight) == []


# --- differences


def test_differences_are_counted_by_tensor_and_those_of_numbers_measured() -> None:
    ours = LevelTable(torch.zeros(2, 3, dtype=torch.uint8), torch.tensor([[1.0, 2.0], [0.0, 4.0]]))
    theirs = LevelTable(torch.eye(2, 3).to(torch.uint8), torch.tensor([[1.0, 2.5], [0.0, 4.0]]))
    assert ours.difference(ours) == []
    assert ours.difference(theirs) == [TensorDifference("2 of 6 codes"), TensorDifference("1 of 4 levels", 0.25)]
    zero = LevelTable(ours.codes, torch.tensor([[1.0, 2.0], [1.0, 4.0]]))
    assert ours.difference(zero) == [TensorDifference("1 of 4 levels", torch.inf)]


def test_weights_of_other_forms_are_described_by_their_labels() -> None:
    table = Quantiles(5).quantize(torch.ones(4, 16), Prepared(), torch.bfloat16).quantized
    assert uniform(4).difference(uniform(3)) == [
        TensorDifference("W4 g8 asymmetric [4, 16] → W3 g8 asymmetric [4, 16]"),
    ]
    assert uniform().difference(table) == [TensorDifference("W4 g8 asymmetric [4, 16] → 5 levels per row [4, 16]")]
