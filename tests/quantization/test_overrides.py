"""Layers with settings of their own: what each quantizer takes, and that a mixed model has the bits of its parts."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_cases import JOINT, NO_QEP, QEP, ROUND, SOLVE, file_hashes, quantize
from tiny_models import write_checkpoint
from torch import Tensor

from jointq_cli.errors import ConfigError
from jointq_cli.models.layer_selection import LayerSelection
from jointq_cli.quantization.overrides import (
    describe,
    fitting,
    most_common,
    on_type,
    overridden,
    quantizers_of_patterns,
)
from jointq_cli.quantization.quantizers import GPTQ, RTN, JointQ, Quantizer
from jointq_cli.quantization.quantizers.base import Prepared
from jointq_cli.quantization.quantizers.statistics import HeldOut
from jointq_cli.recipe import concrete, schemas
from jointq_cli.setting_rules import default_of

schemas()  # imports every module of quantizers/
EVERY = [kind for kind in concrete(Quantizer) if kind.__module__.startswith("jointq_cli.")]
KEY = "layers.overrides.x"


@pytest.mark.parametrize("kind", EVERY)
def test_every_setting_of_every_quantizer_can_be_overridden_by_its_default(kind: type[Quantizer]) -> None:
    quantizer = kind()
    for field in quantizer.__dataclass_fields__.values():
        rule = field.metadata and next(iter(field.metadata.values()))
        value = default_of(field)
        if (field.name, value) == ("incoherence", "auto"):  # which is decided for all layers together
            continue
        if not hasattr(value, "__dataclass_fields__") and (not rule or rule.used(quantizer)):
            assert overridden(quantizer, {field.name: value}, KEY) == quantizer


def test_other_settings_stay() -> None:
    assert overridden(SOLVE, {"bits": 8, "damping": 1}, KEY) == replace(SOLVE, bits=8, damping=1.0)
    assert overridden(JointQ(enable_gptq=True), {"gptq": {"damping": 0.5}}, KEY).gptq.mse  # type: ignore[attr-defined]
    assert overridden(SOLVE, {}, KEY) is SOLVE
    assert overridden(ROUND, {"group_size": None}, KEY) == replace(ROUND, group_size=None)


@pytest.mark.parametrize(
    ("quantizer", "settings", "message"),
    [
        (RTN(), {"bits": 9}, ".bits=9: must be from 1 to 8"),
        (RTN(), {"bits": "four"}, ".bits=four: must be an integer"),
        (RTN(), {"bits": True}, ".bits=true: must be an integer"),
        (RTN(), {"bits": None}, ".bits=null: must be an integer"),
        (RTN(), {"mse": 1}, ".mse=1: must be true or false"),
        (RTN(), {"group_size": 0}, ".group_size=0: must be positive, or null (-1) for one scale per row"),
        (RTN(), {"damping": 1}, f".damping: RTN has {', '.join(field.name for field in fields(RTN))}"),
        (RTN(), {"grid": "q7_k"}, ".grid=q7_k: must be one of q2_k, q3_k, q4_k, q5_k, q6_k, or null for bits, "
         "group_size and symmetric"),
        (RTN(grid="q4_k"), {"bits": 8}, ".bits=8: has no effect beside grid=q4_k; add grid: null"),
        (JointQ(), {"gptq": {"damping": -1}}, ".gptq.damping=-1.0: must be at least 0 and finite"),
        (JointQ(), {"gptq": {"bits": 4}}, ".gptq.bits: GptqStart has mse, damping, block_size"),
        (JointQ(), {"gptq": 3}, ".gptq=3: must be a dictionary"),
        (JointQ(), {"lambda_list": ["a"]}, ".lambda_list=['a']: must be a list of numbers, such as [1,2]"),
        (JointQ(), {"lambda_mode": "incremental_lambda"}, ": quantizer.regularization_mode=diagonal: lambda_mode="
         "incremental_lambda works with identity only"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_by_its_key(quantizer: Quantizer, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        overridden(quantizer, settings, KEY)
    assert str(caught.value) == KEY + message


def test_patterns_have_their_quantizers() -> None:
    layers = LayerSelection(overrides={"a": {"bits": 8}, "b": "keep"})
    assert quantizers_of_patterns(layers, ROUND) == {"a": replace(ROUND, bits=8), "b": None}


def test_a_line_names_the_usual_quantizer_and_what_others_have() -> None:
    wide, grouped = replace(ROUND, bits=8), replace(ROUND, group_size=64)
    assert describe([ROUND, ROUND]) == ROUND.describe()
    assert describe([wide, ROUND, ROUND, grouped, grouped, grouped]) == (
        f"{grouped.describe()} + 2 layers g32, 1 layer W8 g32"
    )
    assert describe([SOLVE, SOLVE, replace(SOLVE, act_order=False)]).endswith(" + 1 layer act_order=false")
    assert most_common([wide, ROUND]) is wide


def test_rows_that_super_blocks_do_not_divide_get_another_type() -> None:
    quantizer = RTN(grid="q4_k")
    assert fitting(quantizer, 512) is quantizer
    assert fitting(ROUND, 48) is ROUND
    assert fitting(quantizer, 576) == RTN(bits=5, group_size=32, symmetric=True, zero_point=None)
    assert fitting(replace(quantizer, grid="q2_k"), 32) == RTN(bits=4, group_size=32, symmetric=True, zero_point=None)
    assert fitting(replace(quantizer, grid="q5_k"), 32) == RTN(bits=5, group_size=32, symmetric=False, zero_point=None)
    assert fitting(replace(quantizer, grid="q6_k"), 32) == RTN(bits=8, group_size=32, symmetric=True, zero_point=None)
    form = fitting(GPTQ(grid="q6_k", act_order=True), 64).storage(8, 64, torch.bfloat16)
    assert form.label == "W8 g32 symmetric"
    assert form.to_tensors().keys() == {"codes", "scale", "zero_point", "format"}  # GGUF has no permutation


def test_a_quantizer_without_k_grids_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^layers\.mix=q4_k_m: Plain has no K grids"):
        on_type(Plain(), "q6_k", "layers.mix=q4_k_m")


@dataclass(frozen=True)
class Plain:
    bits: int = 4


# --- in the loop

ATTENTION = [f"model.layers.0.self_attn.{kind}_proj" for kind in "qkv"]


def codes(scratch: Path, name: str) -> bytes:
    return (scratch / "layers" / f"{name}.safetensors").read_bytes()


def test_the_same_own_settings_for_all_give_the_uniform_runs_bits(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", num_hidden_layers=1)
    model, _, _ = quantize(directory, tmp_path / "uniform", JOINT, qep=QEP)
    own = {name: JOINT for name in model.linear_layers() if name != "lm_head"}
    quantize(directory, tmp_path / "own", replace(ROUND, bits=2), qep=QEP, own=own)
    for part in ("layers", "checkpoint"):
        assert file_hashes(tmp_path / "uniform" / part) == file_hashes(tmp_path / "own" / part)


def test_layers_of_one_group_are_solved_as_each_would_be_alone(tmp_path: Path) -> None:
    """Two that prepare their input alike, with held-out tokens, and one that does not, all corrected by QEP."""
    base = replace(JOINT, lambda_mode="heldout")
    directory = write_checkpoint(tmp_path / "model", num_hidden_layers=1)
    own = {ATTENTION[1]: replace(base, bits=5), ATTENTION[2]: replace(base, group_size=16)}
    quantize(directory, tmp_path / "mixed", base, qep=QEP, own=own, batch=2, keep=lambda name: name in ATTENTION)
    for name, quantizer in [(ATTENTION[0], base), *own.items()]:
        quantize(directory, tmp_path / name, quantizer, qep=QEP, batch=2, keep=lambda each, name=name: each == name)
        assert codes(tmp_path / "mixed", name) == codes(tmp_path / name, name)


@dataclass(frozen=True)
class Counted(RTN):
    def prepare(self, hessian: Tensor, heldout: HeldOut | None = None) -> Prepared:
        PREPARED.append(self.bits)
        return super().prepare(hessian, heldout)


PREPARED: list[int] = []


def test_layers_prepare_once_for_each_key(tmp_path: Path) -> None:
    """k between q and v in another way: q and v still share."""
    PREPARED.clear()
    base = Counted(**vars(ROUND))
    own = {ATTENTION[1]: replace(base, group_size=16), ATTENTION[2]: replace(base, bits=8)}
    directory = write_checkpoint(tmp_path / "model", num_hidden_layers=1)
    _, _, records = quantize(directory, tmp_path / "work", base, own=own, keep=lambda name: name in ATTENTION)
    assert len(PREPARED) == 2
    assert {record.name: record.label for record in records} == {
        name: f"W{bits} g{size} asymmetric" for name, bits, size in zip(ATTENTION, (4, 4, 8), (32, 16, 32), strict=True)
    }


def test_held_out_tokens_are_collected_where_one_layer_needs_them(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", num_hidden_layers=1)
    needs = replace(JOINT, lambda_mode="heldout")
    _, _, records = quantize(directory, tmp_path / "work", ROUND, qep=NO_QEP, own={ATTENTION[0]: needs}, batch=2)
    assert records[0].notes["lambda"] in needs.lambda_list
    with pytest.raises(ConfigError, match=r"^layers\.overrides: heldout_share=0\.25 and 0\.5; all layers hold out"):
        quantize(directory, tmp_path / "two", needs, own={ATTENTION[0]: replace(needs, heldout_share=0.5)}, batch=2)
