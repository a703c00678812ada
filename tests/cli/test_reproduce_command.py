"""`jointq reproduce` as its user runs it: a process runs a recipe, another one runs it again elsewhere."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PUBLISHED = Path("tests/published/ci_smoke")  # its own paths begin where this one does

pytestmark = pytest.mark.slow


def jointq(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jointq_cli", *words]
    return subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)


def finished(folder: Path, *words: str) -> Path:
    done = jointq(folder, "quantize", "recipe=ci_smoke", "hydra.run.dir=run", *words)
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("first"))


@pytest.mark.parametrize("threads", [1, 2])
def test_ci_smoke_is_identical_in_another_directory_whatever_the_threads(
    threads: int, run: Path, tmp_path: Path
) -> None:
    done = jointq(tmp_path, "reproduce", str(run), "--directory", "fresh", f"runtime.num_threads={threads}")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads((tmp_path / "fresh" / "reproduction.json").read_text(encoding="utf-8"))
    assert found["verdict"] == "identical"
    assert len([step for step in found["steps"] if step["same"]]) == 18
    report = json.loads((tmp_path / "fresh" / "report.json").read_text(encoding="utf-8"))
    assert not any(stage["reused"] for stage in report["stages"])
    assert not (tmp_path / "fresh" / "store").exists()
    assert "\n**identical: " in (tmp_path / "fresh" / "reproduction.md").read_text(encoding="utf-8")
    manifest = json.loads((tmp_path / "fresh" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["command"][1:] == ["reproduce", str(run), "--directory", "fresh", f"runtime.num_threads={threads}"]
    again = jointq(tmp_path, "reproduce", str(run), "--directory", "fresh")
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)


def test_a_rotated_run_reproduces_and_a_replay_may_be_replayed(tmp_path: Path) -> None:
    first = finished(tmp_path, "rotation=learned", "activations=a4", "runtime.num_threads=2")
    assert jointq(tmp_path, "reproduce", str(first), "--directory", "second").returncode == 0
    done = jointq(tmp_path, "reproduce", "second")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in tmp_path.glob("reproduced_*/rotation/rotation.safetensors")]


def test_a_run_from_before_other_levels_and_bases_keeps_its_own(tmp_path: Path) -> None:
    first = finished(tmp_path, "quantizer.bits=1", "quantizer.zero_point=integer", "quantizer.incoherence=none")
    recipe, manifest = first / "recipe.yaml", first / "manifest.json"
    lines = recipe.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if not re.search("zero_point|incoherence", line)]
    recipe.write_text("".join(kept), encoding="utf-8")
    recorded = json.loads(manifest.read_text(encoding="utf-8"))
    del recorded["recipe_sha256"]  # as then
    manifest.write_text(json.dumps(recorded), encoding="utf-8")
    done = jointq(tmp_path, "reproduce", str(first), "--directory", "second")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_published_run_is_within_its_tolerance_also_where_products_are_rounded_otherwise(tmp_path: Path) -> None:
    words = ["reproduce", str(PUBLISHED), "--directory", str(tmp_path / "fresh"), "--tolerance", "0.05"]
    limited = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    done = jointq(ROOT, *words, **limited)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "ATEN_CPU_CAPABILITY=avx2" in done.stdout
