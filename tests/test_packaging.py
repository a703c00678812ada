"""What a user installs: sdist, wheel from that sdist, a fresh environment, away from the checkout."""

import os
import site
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest

from jointq_cli.cli import config_files

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="not in a checkout"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run([*build, "-t", "sdist"], cwd=ROOT, check=True, capture_output=True)
    [sdist] = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    subprocess.run([*build, "-t", "wheel"], cwd=unpacked, check=True, capture_output=True)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def jointq(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The console script of a fresh environment that borrows this one's dependencies, torch among them."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder / "bin" / "jointq"


def run(script: Path, *words: str, folder: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([script, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_installed_package_is_not_the_checkout(jointq: Path, tmp_path: Path) -> None:
    where = run(jointq.with_name("python"), "-c", "import jointq_cli; print(jointq_cli.__file__)", folder=tmp_path)
    assert not Path(where.strip()).is_relative_to(ROOT)


def test_an_installed_recipe_composes_outside_of_the_checkout(jointq: Path, tmp_path: Path) -> None:
    assert "bits: 3" in run(jointq, "quantize", "recipe=pocket_w3g128", "--cfg", "job", folder=tmp_path)


def test_the_wheel_brings_every_recipe_and_the_bundled_model(jointq: Path, tmp_path: Path) -> None:
    listed = run(jointq, "recipes", folder=tmp_path)
    assert all(name in listed for name in config_files.options("recipe"))
    [package] = jointq.parent.parent.glob("lib/python*/site-packages/jointq_cli")
    bundled = {path.name for path in (ROOT / "src" / "jointq_cli" / "pocket").iterdir()} - {"__pycache__"}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= bundled
    assert bundled <= {path.name for path in (package / "pocket").iterdir()}


def test_the_installed_command_quantises_the_bundled_model(jointq: Path, tmp_path: Path) -> None:
    output = run(jointq, "quantize", "recipe=ci_smoke", folder=tmp_path)
    assert "quantize" in output
    [report] = tmp_path.glob("runs/ci_smoke/*/report.json")
    assert (report.parent / "checkpoint" / "config.json").is_file()
