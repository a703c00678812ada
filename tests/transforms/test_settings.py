"""Settings of rotations and smoothings: what is out of range is refused by key, others are described in one line."""

import math
from collections.abc import Callable

import pytest
import yaml

from jointq_cli import transforms as rotation
from jointq_cli.cli import config_files
from jointq_cli.errors import ConfigError
from jointq_cli.transforms import HadamardRotation, LearnedRotation, NoRotation, NoSmoothing, SmoothQuant
from jointq_cli.transforms.settings import SAMPLED_TOKENS


def hadamard(**changes: object) -> HadamardRotation:
    return HadamardRotation(**changes)  # type: ignore[arg-type]


def learned(**changes: object) -> LearnedRotation:
    return LearnedRotation(**changes)  # type: ignore[arg-type]


def smoothquant(**changes: object) -> SmoothQuant:
    return SmoothQuant(**changes)  # type: ignore[arg-type]


NOTHING = {"r1": False, "r2": False, "r4": False}
OUT_OF_RANGE = [
    (hadamard, NOTHING, "rotation.r1=false: with r2=false and r4=false nothing is rotated; use rotation=none"),
    (learned, NOTHING, "rotation.r1=false: with r2=false and r4=false nothing is rotated; use rotation=none"),
    (
        learned,
        {"init": "zeros"},
        "rotation.init=zeros: must be one of random_hadamard, hadamard, orthogonal, identity,",
    ),
    (learned, {"objective": "mse"}, "rotation.objective=mse: must be one of whip, l8, range2"),
    (learned, {"parametrization": "qr"}, "rotation.parametrization=qr: must be lie or qr_orth"),
    (learned, {"r1": False, "r2": False, "r4": True}, "rotation.r1=false: with r2=false nothing is learned"),
    (hadamard, {"seed": -1}, "rotation.seed=-1: must be from 0 to"),
    (learned, {"seed": 2**63}, f"rotation.seed={2**63}: must be from 0 to"),
    (learned, {"r1_lr": 0.0}, "rotation.r1_lr=0.0: must be above 0 and finite"),
    (learned, {"r1_lr": math.nan}, "rotation.r1_lr=nan: must be above 0"),
    (learned, {"r2_lr": -1.0}, "rotation.r2_lr=-1.0: must be above 0"),
    (learned, {"r2_lr": math.inf}, "rotation.r2_lr=inf: must be above 0"),
    (learned, {"r1_epochs": 0}, "rotation.r1_epochs=0: must be at least 1"),
    (learned, {"r2_epochs": -3}, "rotation.r2_epochs=-3: must be at least 1"),
    (learned, {"batch_tokens": 0}, "rotation.batch_tokens=0: must be at least 1"),
    (learned, {"reservoir_tokens": 15}, "rotation.reservoir_tokens=15: must be at least 16"),
    (learned, {"momentum": 1.0}, "rotation.momentum=1.0: must be at least 0 and below 1"),
    (learned, {"momentum": -0.1}, "rotation.momentum=-0.1: must be at least 0 and below 1"),
    (learned, {"momentum": math.nan}, "rotation.momentum=nan: must be at least 0 and below 1"),
    (learned, {"stop_bits": 1}, "rotation.stop_bits=1: must be from 2 to 4"),
    (learned, {"stop_bits": 5}, "rotation.stop_bits=5: must be from 2 to 4"),
    (smoothquant, {"alpha": -0.5}, "smoothing.alpha=-0.5: must be from 0 to 1"),
    (smoothquant, {"alpha": 1.5}, "smoothing.alpha=1.5: must be from 0 to 1"),
    (smoothquant, {"alpha": math.nan}, "smoothing.alpha=nan: must be from 0 to 1"),
    (
        smoothquant,
        {"o_proj": False, "down_proj": False},
        "smoothing.down_proj=false: with o_proj=false nothing is left; use smoothing=none",
    ),
]


@pytest.mark.parametrize(("settings", "changes", "message"), OUT_OF_RANGE)
def test_settings_out_of_range_are_refused_by_key(
    settings: Callable[..., object], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(**changes)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


AT_THE_EDGES: list[tuple[Callable[..., object], dict[str, object]]] = [
    (learned, {"r1_lr": 1e-9, "r2_lr": 1e9, "r1_epochs": 1, "r2_epochs": 1, "batch_tokens": 1, "momentum": 0.0}),
    (learned, {"reservoir_tokens": 16, "stop_bits": 2}),
    (learned, {"stop_bits": 4, "momentum": 0.999}),
    (hadamard, {"r1": False, "r2": False, "r4": True}),
    (smoothquant, {"alpha": 0.0, "o_proj": False}),
    (smoothquant, {"alpha": 1.0, "down_proj": False}),
]


@pytest.mark.parametrize(("settings", "changes"), AT_THE_EDGES)
def test_the_edges_of_the_ranges_are_inside(settings: Callable[..., object], changes: dict[str, object]) -> None:
    found = settings(**changes)
    assert {key: getattr(found, key) for key in changes} == changes


# --- one line for people


def test_what_is_rotated_is_told_and_nothing_else() -> None:
    assert NoRotation().describe() == ""
    assert hadamard().describe() == "R1+R2 random Hadamard seed=0"
    assert hadamard(r1=False, r4=True, seed=7).describe() == "R2+R4 random Hadamard seed=7"
    assert learned(r2=False, r4=True).describe().startswith("R1 learned range2")
    assert learned(r2=False, r4=True).describe().endswith(" + R4 Hadamard")
    assert learned(r2=False).describe() == "R1 learned range2 lie from random_hadamard seed=0"
    assert (
        learned(objective="whip", parametrization="qr_orth", init="dc_aligned").describe()
        == "R1+R2 learned whip qr_orth from dc_aligned seed=0"
    )


def test_what_is_smoothed_is_told_and_nothing_else() -> None:
    assert NoSmoothing().describe() == ""
    assert smoothquant().describe() == "SmoothQuant alpha=0.5 o_proj+down_proj"
    assert smoothquant(alpha=0.25, o_proj=False).describe() == "SmoothQuant alpha=0.25 down_proj"


def test_a_description_is_empty_exactly_where_nothing_changes() -> None:
    for found in (NoRotation(), hadamard(), hadamard(r1=False), learned(r1=False, r4=True)):
        assert bool(found.describe()) == bool(found.parts)
    for smoothing in (NoSmoothing(), smoothquant(), smoothquant(o_proj=False)):
        assert bool(smoothing.describe()) == bool(smoothing.places)


def test_only_what_is_learned_says_how_many_tokens_it_wants() -> None:
    assert NoRotation().sampled_tokens == hadamard().sampled_tokens == SAMPLED_TOKENS
    assert learned(reservoir_tokens=99).sampled_tokens == 99


# --- what is shipped


def shipped(group: str) -> dict[str, str]:
    """Option -> what it describes itself as, from the bare yaml: each option carries every value itself."""
    described = {}
    for name, path in config_files.options(group).items():
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        schema, own = values.pop("defaults")
        assert own == "_self_"
        described[name] = getattr(rotation, schema["/schema@_here_"])(**values).describe()
    return described


def test_the_shipped_options_are_what_they_are_called() -> None:
    assert shipped("rotation") == {
        "none": "",
        "hadamard": "R1+R2 random Hadamard seed=0",
        "hadamard_seed1": "R1+R2 random Hadamard seed=1",
        "hadamard_seed2": "R1+R2 random Hadamard seed=2",
        "learned": "R1+R2 learned range2 lie from random_hadamard seed=0",
        "dartquant": "R1+R2 learned whip qr_orth from hadamard seed=0",
        "jointquant": "R1+R2 learned whip qr_orth from random_hadamard seed=0",
    }
    assert shipped("smoothing") == {"none": "", "smoothquant": "SmoothQuant alpha=0.5 o_proj+down_proj"}
