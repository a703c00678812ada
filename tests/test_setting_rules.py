"""Settings: a rule admits what its words say, and everything that follows from the fields does follow."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest

from jointq_cli.errors import ConfigError
from jointq_cli.recipe import Recipe, keys
from jointq_cli.setting_rules import RENAMED, changed, check_settings, places, rule_of, setting


@dataclass(frozen=True)
class Inner:
    path: str | None = setting(None, place=True)


@dataclass(frozen=True)
class Outer:
    bits: int = setting(4, least=1, most=8)
    step: float = setting(0.5, above=0)
    share: float = setting(0.5, above=0, below=1)
    limit: float = setting(1.0, least=0, infinite=True)
    kind: str = setting("a", choices=("a", "b"))
    other: str = setting("a", choices=("a", "b", "c"))
    device: str = setting("cpu", pattern=r"cpu|cuda(:\d+)?", form="be cpu, cuda or cuda:N")
    rows: int | None = setting(None, least=1, null="for all")
    values: list[float] = setting([0.1, 0.2], least=0)
    by_name: dict[str, int] = setting({}, least=2)
    flag: bool = setting(True)
    inner: Inner = Inner()


REFUSED: list[tuple[str, Any, str]] = [
    ("bits", 0, "bits=0: must be from 1 to 8"),
    ("bits", 9, "bits=9: must be from 1 to 8"),
    ("step", 0.0, "step=0.0: must be above 0 and finite"),
    ("step", math.nan, "step=nan: must be above 0 and finite"),
    ("step", math.inf, "step=inf: must be above 0 and finite"),
    ("share", 1.0, "share=1.0: must be above 0 and below 1"),
    ("limit", -math.inf, "limit=-inf: must be at least 0"),
    ("limit", math.nan, "limit=nan: must be at least 0"),
    ("kind", "c", "kind=c: must be a or b"),
    ("other", "d", "other=d: must be one of a, b, c"),
    ("device", "cuda:", "device=cuda:: must be cpu, cuda or cuda:N"),
    ("rows", 0, "rows=0: must be at least 1, or null for all"),
    ("values", [0.1, -1.0], "values=[0.1, -1.0]: each value must be at least 0 and finite, and -1.0 is not"),
    ("by_name", {"x": 4, "y": 1}, "by_name.y=1: must be at least 2"),
]


@pytest.mark.parametrize(("name", "value", "message"), REFUSED)
def test_a_value_that_breaks_its_rule_is_named_by_key(name: str, value: object, message: str) -> None:
    settings = dataclasses.replace(Outer(), **{name: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        check_settings(settings, "group")
    assert str(caught.value) == f"group.{message}"
    with pytest.raises(ConfigError) as caught:
        check_settings(settings)
    assert str(caught.value) == message


def test_the_edges_are_inside() -> None:
    check_settings(Outer())
    check_settings(Outer(bits=1, share=1e-9, limit=math.inf, kind="b", device="cuda:12", rows=1, values=[]))
    check_settings(Outer(by_name={"x": 2}, other="c"))
    check_settings(Outer(bits=8, share=1 - 1e-9, limit=0.0))


def test_what_differs_from_the_default_is_found_and_defaults_are_not_shared() -> None:
    assert changed(Outer()) == {}
    assert changed(Outer(bits=3, values=[0.1])) == {"bits": 3, "values": [0.1]}
    Outer().values.append(1.0)
    assert Outer().values == [0.1, 0.2]


def test_places_of_files_are_found_in_nested_settings() -> None:
    assert list(places(Outer())) == []
    assert list(places(Outer(inner=Inner("a.txt")))) == [("inner.path", "a.txt")]
    assert [rule_of(field).decides for field in dataclasses.fields(Inner)] == [False]


def test_renamed_keys_lead_to_keys_of_a_recipe_and_are_none_themselves() -> None:
    assert set(RENAMED.values()) <= set(keys(Recipe))
    assert not set(RENAMED) & set(keys(Recipe))
