"""`jointq export`: what is refused, in one line, before a model is opened."""

from pathlib import Path

import pytest

from jointq_cli.cli.main import main
from jointq_cli.errors import JointqError
from jointq_cli.stages.finished_run import refuse_existing


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["export=awq"], "export=awq: no such format; there are compressed-tensors"),
        (["format=awq"], "export=awq: no such format; there are compressed-tensors"),
        (["compressed-tensors"], "not a setting; write format=compressed-tensors"),
        ([], "format=: names no format"),
        (["format="], "format=: names no format"),
        (["output=x"], "format=: names no format"),
        (["format=[compressed-tensors,gguf]", "output=x"], "output=x: for one format"),
        (["format=gptq,gptq"], "names gptq twice"),
        (["format=compressed-tensors", "bits=4"], "bits=4: compressed-tensors has no such setting"),
        (["format=imatrix", "type=q4_k"], "type=q4_k: imatrix has no settings"),
        (["format=[gguf,imatrix]"], "export=imatrix: holds no model; jointq export RUN format=imatrix"),
        (["format=compressed-tensors"], "no manifest.json, so it is no finished run"),
    ],
)
def test_wrong_words_get_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], rule: str
) -> None:
    assert main(["export", str(tmp_path), *words]) == 1
    error = capsys.readouterr().err
    assert rule in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_nothing_that_exists_is_overwritten(tmp_path: Path) -> None:
    refuse_existing(tmp_path / "new")
    with pytest.raises(JointqError, match="overwrites nothing"):
        refuse_existing(tmp_path)
