"""The command as its user runs it: a process, a directory, an exit code, and what it leaves behind."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import edit_config, write_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from jointq_cli.formats.layer_file import load_layer
from jointq_cli.models.sources import BUNDLED

SMOKE = ["quantize", "recipe=ci_smoke", "output_dir=out", "hydra.run.dir=out/run"]


def start(directory: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "jointq_cli", *arguments],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(directory: Path, *arguments: str, **environment: str) -> tuple[int, str, str]:
    process = start(directory, *arguments, **environment)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run directory of a whole ci_smoke run, and what it printed."""
    directory = tmp_path_factory.mktemp("finished")
    code, out, err = run(directory, *SMOKE)
    assert (code, err) == (0, "")
    return directory / "out" / "run", out


def test_a_run_leaves_everything_that_was_promised(finished: tuple[Path, str]) -> None:
    directory, out = finished
    present = {path.name for path in directory.iterdir()}
    assert present == {
        "recipe.yaml", "overrides.yaml", "manifest.json", "log.txt", "layers.csv", "report.json", "report.md",
        "report.html", "checkpoint", "codes", "importance",
    }  # fmt: skip
    report = json.loads((directory / "report.json").read_text())
    assert report["reload_check"] == "identical"
    assert not report["audit"]["changed"]
    assert len(report["layers"]) == len(list((directory / "codes").iterdir())) == 28
    assert "out/run/report.html" in out
    assert "\x1b" not in out  # a pipe is no terminal


def test_plain_transformers_loads_the_checkpoint_and_its_codes_say_the_same(
    finished: tuple[Path, str],
) -> None:
    directory, _ = finished
    model = AutoModelForCausalLM.from_pretrained(directory / "checkpoint")
    assert model.dtype == torch.bfloat16
    assert model.config.jointq["quantizer"].startswith("JointQ W4 g128")
    assert "base_model: pocket" in (directory / "checkpoint" / "README.md").read_text(encoding="utf-8")
    files = json.loads((directory / "manifest.json").read_text())["files"]
    assert "checkpoint/README.md" not in files
    assert files["checkpoint/config.json"] == hashes(BUNDLED)["config.json"]  # without the key
    name = "model.layers.2.mlp.down_proj"
    codes = load_layer(directory / "codes" / f"{name}.safetensors")
    assert torch.equal(codes.dequantize(torch.bfloat16), model.get_parameter(f"{name}.weight").data)
    tokenizer = AutoTokenizer.from_pretrained(directory / "checkpoint")
    ids = tokenizer("The statement", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] == ids["input_ids"].shape[1] + 3


@pytest.mark.slow
def test_exports_are_reproduced(tmp_path: Path) -> None:
    code, _, err = run(tmp_path, *SMOKE, "export=compressed-tensors")
    assert (code, err) == (0, "")
    code, out, _ = run(tmp_path, "reproduce", "out/run")
    assert code == 0
    assert re.search(r"exports +made +identical +all \d+", out)


@pytest.mark.slow
def test_the_same_recipe_twice_gives_the_same_bytes(finished: tuple[Path, str], tmp_path: Path) -> None:
    directory, _ = finished
    assert run(tmp_path, *SMOKE)[0] == 0
    for name in ("checkpoint", "codes"):
        assert hashes(directory / name) == hashes(tmp_path / "out" / "run" / name)


@pytest.mark.slow
def test_the_same_command_again_reuses_every_long_stage(finished: tuple[Path, str]) -> None:
    directory, _ = finished
    code, out, _ = run(directory.parent.parent, *SMOKE[:-1], "hydra.run.dir=out/again")
    assert code == 0
    stages = json.loads((directory.parent / "again" / "report.json").read_text())["stages"]
    assert {"quantize", "evaluate original", "evaluate quantized"} <= {s["name"] for s in stages if s["reused"]}
    assert "reused" in out
    assert hashes(directory / "checkpoint") == hashes(directory.parent / "again" / "checkpoint")


def test_a_finished_run_is_rendered_again(finished: tuple[Path, str]) -> None:
    directory, out = finished
    code, again, _ = run(directory, "report", str(directory))
    assert code == 0
    assert next(line for line in again.splitlines() if "perplexity" in line) in out


def test_evaluating_the_checkpoint_gives_the_perplexity_of_the_report(finished: tuple[Path, str]) -> None:
    directory, _ = finished
    arguments = [
        "evaluation.seqlen=128",
        "evaluation.max_windows=8",
        "reference=pocket",
        "hydra.run.dir=out/evaluated",
    ]
    code, _, err = run(
        directory.parent.parent,
        "evaluate",
        f"model.path={directory}/checkpoint",
        "output_dir=out",
        *arguments,
    )
    assert (code, err) == (0, "")
    found = json.loads((directory.parent / "evaluated" / "evaluation.json").read_text())
    report = json.loads((directory / "report.json").read_text())
    assert found["perplexity"] == report["quantized"]
    assert found["comparison"] == report["comparison"]
    assert found["protocol"] == report["protocol"]
    assert [text for text in report["warnings"] if text.startswith("evaluation.")] == found["warnings"] != []


@pytest.mark.slow
def test_frozen_tokens_give_the_run_that_its_text_gives(finished: tuple[Path, str], tmp_path: Path) -> None:
    directory, _ = finished
    assert run(tmp_path, "calibrate", "recipe=ci_smoke", "output=tokens.safetensors")[0] == 0
    assert run(tmp_path, *SMOKE, "calibration.tokens=tokens.safetensors")[0] == 0
    assert hashes(directory / "checkpoint") == hashes(tmp_path / "out" / "run" / "checkpoint")


@pytest.mark.slow
def test_another_tokenizer_or_generation_config_is_another_checkpoint(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    directory, _ = finished
    copy = shutil.copytree(BUNDLED, tmp_path / "copy")
    (copy / "generation_config.json").write_text('{"max_new_tokens": 7}')
    assert run(directory.parent.parent, *SMOKE[:-1], "hydra.run.dir=out/copied", f"model.path={copy}")[0] == 0
    written = directory.parent / "copied" / "checkpoint" / "generation_config.json"
    assert json.loads(written.read_text()) == {"max_new_tokens": 7}


def layer_files(directory: Path) -> int:
    return len(list(directory.glob("out/store/partial/quantize-*/layers/*.json")))


def wait_for(process: subprocess.Popen[str], directory: Path, layers: int) -> None:
    while layer_files(directory) < layers and process.poll() is None:
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_with_75_and_the_same_command_continues(
    number: signal.Signals, finished: tuple[Path, str], tmp_path: Path
) -> None:
    process = start(tmp_path, *SMOKE)
    wait_for(process, tmp_path, layers=5)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75
    assert len(err.splitlines()) == 1
    assert "same command continues" in err
    done = layer_files(tmp_path)
    assert 5 <= done < 28
    assert run(tmp_path, *SMOKE)[0] == 0
    assert hashes(tmp_path / "out" / "run" / "checkpoint") == hashes(finished[0] / "checkpoint")


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 7, 12, 20, 27])
def test_kill_9_loses_nothing_and_changes_nothing(layers: int, finished: tuple[Path, str], tmp_path: Path) -> None:
    process = start(tmp_path, *SMOKE)
    wait_for(process, tmp_path, layers)
    process.kill()
    process.communicate()
    code, _, err = run(tmp_path, *SMOKE)
    assert (code, err) == (0, "")
    for name in ("checkpoint", "codes"):
        assert hashes(tmp_path / "out" / "run" / name) == hashes(finished[0] / name)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    if (
        not mounted
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount a small tmpfs")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_no_run_that_looks_finished(small_disk: Path) -> None:
    code, _, err = run(small_disk, *SMOKE)
    assert code == 1
    assert len(err.splitlines()) == 1
    assert "the disk is full" in err
    assert not list(small_disk.glob("out/store/quantize-*"))
    assert not (small_disk / "out" / "run" / "report.json").exists()


def damaged(directory: Path, how: str) -> Path:
    """A tiny checkpoint with something wrong with it."""
    write_checkpoint(directory)
    weights = directory / "model.safetensors"
    tensors = load_file(weights)
    if how == "half":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "nan":
        tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] = float("nan")
        save_file(tensors, weights, {"format": "pt"})
    elif how == "no tokenizer":
        for file in directory.glob("*token*"):
            file.unlink()
    elif how == "lacks":
        edit_config(directory, num_hidden_layers=4)
    elif how == "unknown":
        edit_config(directory, model_type="nonesuch")
    return directory


BAD = {
    "bits of 0": (["quantizer.bits=0"], "quantizer.bits=0: must be from 1 to 8"),
    "bits of 9": (["quantizer.bits=9"], "quantizer.bits=9: must be from 1 to 8"),
    "wrong type": (["quantizer.bits=four"], "quantizer.bits=four: must be an integer"),
    "unknown recipe": (["recipe=pocket_w4g12"], "did you mean pocket_w4g128?"),
    "mistyped key": (["quantizer.bit=4"], "did you mean quantizer.bits?"),
    "group that does not divide": (
        ["quantizer.group_size=96"],
        "quantizer.group_size=96: must divide in_features",
    ),
    "pattern without a match": (
        ["layers.include_layer_names=[qproj]"],
        "layers.include_layer_names: 'qproj' matches none",
    ),
    "rules that leave nothing": (
        ["layers.exclude_layer_keywords=[proj]"],
        "select none of the model's 28 linear layers",
    ),
    "missing model": (["model.path=./nowhere"], "nowhere: no such directory"),
    "hub out of reach": (["model.path=some/model"], "offline, give a downloaded directory: model.path=DIR"),
    "text of the hub out of reach": (
        ["evaluation=wikitext2"],
        "offline, give a local copy: evaluation.path=FILE",
    ),
    "text too short": (
        ["evaluation=text", "evaluation.path=short.txt"],
        "tokens, not one window",
    ),
    "calibration too short": (["calibration=text", "calibration.path=short.txt"], "calibration.seqlen=128"),
    "empty file": (["evaluation=text", "evaluation.path=empty.txt"], "empty.txt: is empty"),
    "not UTF-8": (
        ["evaluation=text", "evaluation.path=latin.txt"],
        "latin.txt: is not UTF-8: byte 0xe9 at offset 3",
    ),
    "a device of no kind": (["runtime.device=cuda:x"], "runtime.device=cuda:x: must be auto, cpu, cuda or cuda:N"),
    "CUDA that is not there": (["runtime.device=cuda:7"], "runtime.device=cuda:7: this machine offers"),
    "half-downloaded": (["model.path=half"], "half-downloaded"),
    "NaN": (
        ["model.path=nan", "quantizer.group_size=32"],
        "o_proj.weight holds 1 values that are NaN or Inf",
    ),
    "no tokenizer": (["model.path=no tokenizer"], "has no tokenizer"),
    "lacking tensors": (["model.path=lacks"], "lacks 9 of the"),
    "unknown architecture": (["model.path=unknown"], "nonesuch"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_leaves_nothing_that_looks_finished(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from jointq_cli.cli.main import main

    arguments, said = BAD[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "short.txt").write_text("no no")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    for how in ("half", "nan", "no tokenizer", "lacks", "unknown"):
        if f"model.path={how}" in arguments:
            damaged(tmp_path / how, how)
    code = main([*SMOKE, *arguments])
    err = capsys.readouterr().err
    assert code == 1
    assert len(err.splitlines()) == 1, err
    assert said in err
    assert not list(tmp_path.glob("out/store/quantize-*"))
    assert not (tmp_path / "out" / "run" / "report.json").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_does_what_a_cpu_does(finished: tuple[Path, str], tmp_path: Path) -> None:
    code, _, err = run(tmp_path, *SMOKE, "runtime.device=cuda")
    assert (code, err) == (0, "")
    found, expected = (
        json.loads((directory / "report.json").read_text()) for directory in (tmp_path / "out" / "run", finished[0])
    )
    assert found["reload_check"] == "identical"
    assert found["quantized"]["nll"] == pytest.approx(expected["quantized"]["nll"], rel=5e-3)


@pytest.mark.slow
def test_a_checkpoint_directory_of_any_name_is_a_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "mine", "qwen3", dtype=torch.bfloat16)
    settings = ["model.path=mine", "quantizer.group_size=32", "calibration.seqlen=32", "evaluation.seqlen=32"]
    code, _, err = run(tmp_path, *SMOKE, *settings)
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "out/run/report.json").read_text())["architecture"] == "Qwen3ForCausalLM"
