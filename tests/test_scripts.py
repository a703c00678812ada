"""What those scripts do of themselves that need other machines or other tools."""

import argparse
import importlib.machinery
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

SCRIPTS = Path(__file__).parents[1] / "scripts"


def script(name: str) -> ModuleType:
    loader = importlib.machinery.SourceFileLoader(f"script_{name.partition('.')[0]}", str(SCRIPTS / name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    sys.modules[loader.name] = module  # where dataclasses look for it
    loader.exec_module(module)
    return module


PEERS, CHECK_GPU = script("bench_peers.py"), script("check_gpu")
FINE, BAD, SLOW = (
    "import pathlib; pathlib.Path('result.json').write_text('{\"rows\": 4}')",
    "print('no GPU'); raise SystemExit(1)",
    "import time; time.sleep(60)",
)


def test_every_step_for_a_gpu_can_be_run_and_every_measurement_is_a_step() -> None:
    measured = [step.name for step in CHECK_GPU.PLAN if not step.tests]
    assert sorted(measured) == sorted(script("gpu_steps.py").STEPS)
    files = [word for step in CHECK_GPU.PLAN for word in step.tests if word.endswith(".py")]
    assert files
    assert all((SCRIPTS.parent / file).is_file() for file in files)


def test_a_run_on_a_gpu_keeps_what_each_step_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {"fine": FINE, "bad": BAD, "slow": SLOW, "fine too": FINE}
    plan = tuple(CHECK_GPU.Step(name, 0.5 if name == "slow" else 60) for name in sources)

    def command(step: Any, given: argparse.Namespace, place: Path) -> list[str]:
        return [sys.executable, "-c", f"import os; os.chdir({str(place)!r}); {sources[step.name]}"]

    monkeypatch.setattr(CHECK_GPU, "PLAN", plan)
    monkeypatch.setattr(CHECK_GPU, "command_of", command)
    given = argparse.Namespace(wheels=None, output=tmp_path / "found.json", work=tmp_path, minutes=1, patience=1)
    assert CHECK_GPU.run(given) == 2
    steps = json.loads(given.output.read_text())["steps"]
    assert [row["status"] for row in steps.values()] == ["done", "failed", "ended after 0 s", "done"]
    assert steps["fine too"]["result"] == {"rows": 4}
    assert steps["bad"]["output"] == "no GPU\n"
    given.minutes = 0
    assert CHECK_GPU.run(given) == 4
    assert {row["status"] for row in json.loads(given.output.read_text())["steps"].values()} == {"no time left"}


def test_levels_are_counted_by_group_in_what_lies_on_the_disk(tmp_path: Path) -> None:
    levels = torch.tensor([[0.0, 1, 2, 3, 5, 6, 7, 8], [0, 0, 0, 0, 1, 1, 1, 1]]).bfloat16()
    names = {"model.layers.0.mlp.up_proj.weight": levels, "model.embed_tokens.weight": torch.rand(8, 8)}
    save_file(names, tmp_path / "model.safetensors")
    assert PEERS.count_levels(tmp_path, 4) == [4]
    assert PEERS.count_levels(tmp_path, -1) == [8]
    mixed = levels[:, [0, 4, 1, 5, 2, 6, 3, 7]].contiguous()
    save_file({"model.layers.0.mlp.up_proj.weight": mixed}, tmp_path / "model.safetensors")
    assert PEERS.count_levels(tmp_path, 4) == [4]  # 0, 5, 1, 6
    save_file({"model.layers.0.mlp.up_proj.weight": mixed.repeat(1, 2)}, tmp_path / "model.safetensors")
    assert PEERS.count_levels(tmp_path, 8) == [8]
    groups = {"model.layers.0.mlp.up_proj.weight": torch.tensor([0, 1] * 8, dtype=torch.int32)}
    save_file(groups, tmp_path / PEERS.GROUPS)
    assert PEERS.count_levels(tmp_path, 8) == [4]


def test_a_table_of_peers_marks_a_checkpoint_with_too_many_levels_and_says_what_did_not_run() -> None:
    whole = {
        "model": "m", "bits": 3, "name": "b", "kl": 0.5, "kl_se": 0.1, "perplexity": 40.0, "perplexity_se": 1.0,
        "cpu_seconds": 12.3, "peak_memory": 2e9, "matrices": 7, "most_levels": 8, "above": 0,
    }  # fmt: skip
    original = {**whole, "name": "a", "kl": 0.0, "most_levels": 60, "above": 7}
    missing = {"model": "m", "bits": 3, "name": "c", "reason": "not done after 1 s"}
    lines = PEERS.table([missing, whole, original]).splitlines()[2:]
    assert [line.split(" | ")[2] for line in lines] == ["a", "b", "c"]
    assert "60 **of 7 of 7 matrices: too many**" in lines[0]
    assert lines[1].endswith("| 0.5000 ± 0.1000 | 40.00 ± 1.00 | 12 | 2.0 | 8 |")
    assert "not done after 1 s" in lines[2]


def test_what_did_not_run_is_in_the_table_and_a_result_of_other_arguments_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tmp_path / "tokens.safetensors"
    tokens.write_bytes(b"tokens")

    def cannot_run(*_: Any) -> None:
        raise PEERS.CannotRun("no compiler")

    monkeypatch.setattr(PEERS, "quantise", cannot_run)
    words = ["--model", str(tmp_path), "--tokens", str(tokens), "--work", str(tmp_path), "--bits", "3"]
    monkeypatch.setattr(sys, "argv", ["bench_peers.py", *words, "--peers", "gptqmodel"])
    PEERS.main()
    assert "| gptqmodel | no compiler |" in (tmp_path / "table.md").read_text()

    (place,) = tmp_path.glob("*-gptqmodel")
    (place / "result.json").write_text(json.dumps({"model": "m", "bits": 3, "name": "gptqmodel", "reason": ""}))
    PEERS.main()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--windows", "7"])
    with pytest.raises(SystemExit, match="other tokens, text or arguments"):
        PEERS.main()


def test_another_row_is_a_name_a_tool_and_its_words() -> None:
    assert PEERS.another("best: jointq quality=best") == ("best", PEERS.Method("jointq", ("quality=best",)))
    for wrong in ("jointq quality=best", "best:", "best: awq", ": jointq"):
        with pytest.raises(argparse.ArgumentTypeError, match="NAME: TOOL ARGUMENT"):
            PEERS.another(wrong)


def test_a_process_that_fails_or_takes_too_long_is_told_by_its_last_line(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    measured = PEERS.run_measured([sys.executable, "-c", "bytearray(50_000_000)"], log, 60, {})
    assert measured["peak_memory"] > 50e6
    with pytest.raises(PEERS.CannotRun, match="no GPU"):
        PEERS.run_measured([sys.executable, "-c", BAD], log, 60, {})
    with pytest.raises(PEERS.CannotRun, match=r"not done after 0\.2 s"):
        PEERS.run_measured([sys.executable, "-c", SLOW], log, 0.2, {})
