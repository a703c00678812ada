"""When `jointq quantize` ends with exit code 1 although the run went through."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from jointq_cli import pipeline
from jointq_cli.cli.commands import quantize
from jointq_cli.cli.compose import Job
from jointq_cli.errors import JointqError
from jointq_cli.system.distributed import SINGLE_PROCESS
from jointq_cli.tracking import NoTracking


def test_a_run_with_problems_is_an_error_in_one_line_after_everything_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pipeline, "quantize", lambda *asked: SimpleNamespace(layers=[], blocks=[]))
    monkeypatch.setattr(quantize, "problems", lambda report: ["the audit failed", "so did the reload check"])
    recipe = SimpleNamespace(model=SimpleNamespace(path="pocket"), tracking=NoTracking())
    with pytest.raises(JointqError, match=r"the audit failed; so did the reload check; see .*report\.md") as caught:
        quantize.run(recipe, Job(tmp_path, ["a=1"], "name: x\n", SINGLE_PROCESS))  # type: ignore[arg-type]
    assert caught.value.exit_code == 1
    assert (tmp_path / "recipe.yaml").read_text() == "name: x\n"
    assert "a=1" in (tmp_path / "overrides.yaml").read_text()
