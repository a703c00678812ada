"""A key covers everything that decides an artifact's content, and nothing else."""

from dataclasses import dataclass, replace

import pytest

from jointq_cli.system import artifact_key as keys
from jointq_cli.system.artifact_key import artifact_key


@dataclass(frozen=True)
class Spec:
    bits: int
    damping: float = 0.01


@dataclass(frozen=True)
class OtherSpec:
    bits: int
    damping: float = 0.01


def test_everything_that_decides_the_content_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "jointq_cli.stages.text_tokens"
    base = artifact_key("stage", Spec(4), ["input"], module)
    assert base == artifact_key("stage", Spec(4), ["input"], module)
    others = [
        artifact_key("other", Spec(4), ["input"], module),
        artifact_key("stage", Spec(3), ["input"], module),
        artifact_key("stage", replace(Spec(4), damping=0.1), ["input"], module),
        artifact_key("stage", OtherSpec(4), ["input"], module),
        artifact_key("stage", Spec(4), ["another"], module),
        artifact_key("stage", Spec(4), [], module),
        artifact_key("stage", Spec(4), ["input"], "jointq_cli.stages.hidden"),
    ]
    assert len({base, *others}) == len(others) + 1


def test_the_code_of_a_key_is_that_of_the_stage_and_of_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[str]] = []
    monkeypatch.setattr(keys, "code_version", lambda modules: asked.append(modules) or "")
    artifact_key("stage", {"nested": [Spec(4)]}, [], "jointq_cli.stages.quantize")
    assert asked == [{"jointq_cli.stages.quantize", __name__}]


def test_a_value_that_has_no_canonical_form_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot hold a set"):
        artifact_key("stage", {"names": {"a"}}, [], __name__)
