"""When `jointq quantize` ends with exit code 1 although the run went through."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from jointq_cli.commands import quantize
from jointq_cli.errors import JointqError
from jointq_cli.launch import Job
from jointq_cli.records import Audit, LayerRecord

AUDIT = Audit(
    identical=1,
    quantized=1,
    missing=[],
    unexpected=[],
    changed=[],
    source_bytes=1,
    checkpoint_bytes=1,
    packed_bytes=1,
)
LAYER = LayerRecord(
    name="model.layers.0.mlp.up_proj",
    block=0,
    kind="up_proj",
    out_features=1,
    in_features=1,
    bits=4,
    group_size=1,
    bits_per_weight=4.0,
    output_error=0.0,
    weight_error=0.0,
    damping=None,
    seconds=0.0,
    verdict="damped",
)


def report(**changes: Any) -> Any:
    """As much of a RunReport as a verdict reads."""
    return SimpleNamespace(**{"layers": [LAYER], "audit": AUDIT, "reload_check": "identical", **changes})


def test_a_sound_run_has_no_faults() -> None:
    assert quantize.faults(report()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": [LAYER, replace(LAYER, verdict="fallback")]}, "1 of 2 layers could not be solved"),
        ({"audit": replace(AUDIT, changed=["norm"])}, "other tensors differ"),
        ({"audit": replace(AUDIT, missing=["norm"])}, "other tensors differ"),
        ({"reload_check": "differs by 1e-3"}, "differs by 1e-3"),
    ],
)
def test_each_fault_is_named(changes: dict[str, Any], said: str) -> None:
    [fault] = quantize.faults(report(**changes))
    assert said in fault


def test_a_faulty_run_is_an_error_in_one_line_after_everything_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(quantize, "quantize", lambda recipe, run, console: report(reload_check="differs by 1"))
    with pytest.raises(JointqError, match=r"differs by 1; see .*report\.md") as caught:
        quantize.run(SimpleNamespace(), Job(tmp_path, ["a=1"], "name: x\n"))  # type: ignore[arg-type]
    assert caught.value.exit_code == 1
    assert (tmp_path / "recipe.yaml").read_text() == "name: x\n"
    assert "a=1" in (tmp_path / "overrides.yaml").read_text()
