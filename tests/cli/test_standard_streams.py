"""Streams that are closed, full or of another encoding, and paths that are not UTF-8, as a shell gives them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_models import write_checkpoint

from jointq_cli.cli.compose import launch
from jointq_cli.cli.main import main
from jointq_cli.system.run_directory import RunDirectory

SHORT = ["evaluate", "evaluation.seqlen=32", "evaluation.max_windows=4"]
FULL = "error: standard output: cannot be written (No space left on device)\n"


def shell(folder: Path, words: list[str], redirections: str, **environment: str) -> tuple[int, str, str]:
    line = f'"$@" {redirections}'
    command = ["sh", "-c", line, "sh", sys.executable, "-m", "jointq_cli", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "words",
    [["recipes"], ["compare", "--help"], pytest.param(SHORT, marks=pytest.mark.slow)],
    ids=lambda words: words[0],
)
def test_output_that_cannot_be_written_is_named_and_closed_output_is_no_error(words: list[str], tmp_path: Path) -> None:
    assert shell(tmp_path, words, "> /dev/full") == (1, "", FULL)
    assert shell(tmp_path, words, ">&-") == (0, "", "")


@pytest.mark.slow
def test_an_error_that_cannot_be_printed_keeps_its_exit_code(tmp_path: Path) -> None:
    for redirections in ("2> /dev/full", "2>&-", ">&- 2>&-"):
        assert shell(tmp_path, ["recipes", "show", "nothing"], redirections) == (1, "", "")


def test_a_closed_output_does_not_go_into_a_file_of_the_run(tmp_path: Path) -> None:
    script = "from jointq_cli.cli.main import main; main(['--version']); import os; os.write(1, b'x'); open('a', 'w')"
    assert subprocess.run(["sh", "-c", f'{sys.executable} -c "{script}" >&-'], cwd=tmp_path).returncode == 0
    assert (tmp_path / "a").read_bytes() == b""


@pytest.mark.slow
def test_a_sweep_prints_on_ascii(tmp_path: Path) -> None:
    words = [*SHORT, "-m", "evaluation.max_windows=3,4"]
    code, out, err = shell(tmp_path, words, "", PYTHONIOENCODING="ascii", LC_ALL="C")
    assert (code, err) == (0, "")
    assert "? " in out  # a plus-minus sign
    assert out.isascii()


# --- bytes that are not UTF-8


def test_a_text_and_a_run_directory_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t\udcff.txt").write_text("the cat and the dog " * 200)
    words = ["evaluation=text", "evaluation.path='t\udcff.txt'", "hydra.run.dir='r\udcff'"]
    assert main([*SHORT, *words]) == 0
    recipe = yaml.safe_load(RunDirectory(Path("r\udcff")).recipe.read_text(encoding="utf-8"))
    assert recipe["evaluation"]["path"] == "t\udcff.txt"
    done: list[int] = []
    settings = ["-m", "quantizer.bits=3,4", "calibration=text", "calibration.path='t\udcff.txt'"]
    assert launch("quantize", settings, lambda recipe, job: done.append(job.number or 0)) == 0
    assert done == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("words", ["model.path='m\udcff'", "store='s\udcff'"])
def test_what_safetensors_cannot_open_is_refused_before_any_work(words: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / "m\udcff")
    code, _, err = shell(tmp_path, [*SHORT, words], "")
    place = words.split("'")[1].replace("\udcff", "\\udcff")
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith(f"error: {place}: has bytes that are not UTF-8, and safetensors")
