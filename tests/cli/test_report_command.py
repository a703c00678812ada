"""`jointq report` of directories that have no report.json."""

from pathlib import Path

import pytest

from jointq_cli.cli.main import main


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text("name: mine\nmodel:\n  path: models/x\n")
    (tmp_path / "log.txt").write_text("".join(f"line {number}\n" for number in range(20)) + "stopped\n")
    return tmp_path


def test_an_interrupted_run_shows_how_far_it_came(interrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(interrupted)]) == 1
    out = capsys.readouterr().out
    assert "not finished; recipe mine, model models/x" in out
    assert "line 19\nstopped\n" in out
    assert "line 2\n" not in out


@pytest.mark.parametrize(
    ("files", "option", "rule"),
    [
        ([], [], "neither report.json nor evaluation.json nor recipe.yaml"),
        (["recipe.yaml"], ["--html"], "has no report.json"),
        (["evaluation.json"], [], "evaluation.json: not valid JSON"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: list[str], option: list[str], rule: str
) -> None:
    for name in files:
        (tmp_path / name).touch()
    assert main(["report", str(tmp_path), *option]) == 1
    assert rule in capsys.readouterr().err
