"""The run directory: fixed names, atomic writes, clear errors of the disk."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jointq_cli.errors import ConfigError, ResourceError
from jointq_cli.system import files as disk
from jointq_cli.system import machine
from jointq_cli.system.run_directory import RunDirectory, build_manifest, claimed, new_directory


def test_recipe_and_overrides_are_kept_as_yaml(tmp_path):
    directory = RunDirectory(tmp_path / "a" / "b")
    overrides = ["quantizer.bits=3", 'model.path="a b"', "text=ä: #1", "-x"]
    directory.write_recipe("quantizer:\n  bits: 3\n")
    directory.write_overrides(overrides)
    assert yaml.safe_load(directory.recipe.read_text(encoding="utf-8")) == {"quantizer": {"bits": 3}}
    assert yaml.safe_load(directory.overrides.read_text(encoding="utf-8")) == overrides


def test_no_overrides_are_an_empty_list(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.write_overrides([])
    assert yaml.safe_load(directory.overrides.read_text(encoding="utf-8")) == []


def test_the_manifest_records_versions_and_machine(tmp_path):
    directory = RunDirectory(tmp_path)
    assert directory.recipe_hash is None
    directory.write_recipe("name: mine\n")
    directory.write_manifest(
        build_manifest(
            ["jointq", "quantize"],
            "cpu",
            2,
            processes=3,
            seeds={"calibration.seed": 0},
            hashes={"model": "5c1f"},
            texts={},
            files={"codes/a.safetensors": "9e0b"},
            recipe_sha256=directory.recipe_hash,
            model={"from": "hub", "revision": "c0"},
        )
    )
    manifest = json.loads(directory.manifest.read_text(encoding="utf-8"))
    assert manifest["command"] == ["jointq", "quantize"]
    assert manifest["seeds"] == {"calibration.seed": 0}
    assert manifest["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"jointq", "torch", "transformers"} <= set(manifest["versions"])
    assert manifest["files"] == {"codes/a.safetensors": "9e0b"}
    assert (manifest["threads"], manifest["processes"]) == (2, 3)
    assert manifest["recipe_sha256"] == hashlib.sha256(b"name: mine\n").hexdigest()
    assert manifest["model"] == {"from": "hub", "revision": "c0"}
    assert manifest["cpu"]
    assert manifest["cpu_count"] >= 1


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path)
    directory.write_recipe("old")

    def full(path: Path, text: str) -> None:
        path.write_text("ne", encoding="utf-8")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(disk, "_write_text", full)
    with pytest.raises(ResourceError, match=r"recipe\.yaml.*full"):
        directory.write_recipe("new")
    assert directory.recipe.read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize("place", ["checkpoint", "codes", "rotation"])
def test_directories_that_no_run_has_written_are_not_overwritten(place, tmp_path):
    (tmp_path / place).mkdir()
    (tmp_path / place / "thesis.txt").touch()
    with pytest.raises(ConfigError, match=rf"hydra\.run\.dir=.*: has a {place}/ that no run of jointq made"):
        RunDirectory(tmp_path).claim("pocket")
    (tmp_path / "recipe.yaml").touch()  # an earlier run
    RunDirectory(tmp_path).claim("pocket")


def test_a_run_does_not_replace_the_model_that_it_reads(tmp_path):
    model = tmp_path / "run" / "checkpoint"
    model.mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").touch()
    with pytest.raises(ConfigError, match=r"model\.path=.*: lies in the run directory"):
        RunDirectory(tmp_path / "run").claim(str(model))
    RunDirectory(tmp_path / "another").claim(str(model))


def test_a_rename_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path)
    directory.write_recipe("old")

    def refused(source: Path, target: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(target))

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(ResourceError, match=r"recipe\.yaml: cannot be written \(Read-only file system\)"):
        directory.write_recipe("new")
    assert directory.recipe.read_text(encoding="utf-8") == "old"


def test_a_finished_write_leaves_nothing_beside_the_file(tmp_path):
    RunDirectory(tmp_path).write_recipe("x")
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="file"):
        RunDirectory(tmp_path / "file" / "run")
    with pytest.raises(ResourceError, match="file"):
        RunDirectory(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_forbidden_directory_is_refused_before_any_work(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ResourceError, match="cannot be written"):
        RunDirectory(tmp_path)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_directory_that_cannot_hold_files_is_refused_before_any_work(tmp_path, monkeypatch, number):
    def refused(self: Path) -> None:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "touch", refused)
    with pytest.raises(ResourceError, match=str(tmp_path)):
        RunDirectory(tmp_path)


def test_peak_memory_grows_with_touched_pages_and_stays_after_their_release():
    before = machine.peak_memory()
    block = b"\1" * 300_000_000
    after = machine.peak_memory()
    del block
    assert after - before > 100_000_000 or before > 300_000_000
    # The kernel keeps its counters per core and adds them up now and then.
    assert machine.peak_memory() > after - 20_000_000


def test_peak_memory_is_not_inherited_from_the_parent():
    block = b"\1" * 300_000_000
    program = "from jointq_cli.system.machine import peak_memory; print(peak_memory())"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    del block
    assert 1_000_000 < int(output.stdout) < 200_000_000


def test_the_fallback_for_peak_memory_is_in_bytes():
    assert 1_000_000 < machine._maximum_resident_set() < 10**12


def test_the_commit_is_that_of_this_project_or_none(monkeypatch, tmp_path):
    commit = machine.project_commit()
    assert commit is None or len(commit.removesuffix("-dirty")) == 40
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "site-packages" / "jointq_cli" / "machine.py"))
    assert machine.project_commit() is None


def test_a_directory_that_is_being_written_is_refused_to_a_second_run(tmp_path):
    with claimed(tmp_path / "run", new=False) as run:
        run.write_recipe("a")
        with pytest.raises(ConfigError, match=r"hydra\.run\.dir=.*/run: another run is writing there"):
            claimed(tmp_path / "run", new=False).__enter__()
    assert [file.name for file in run.path.iterdir()] == ["recipe.yaml"]
    with claimed(tmp_path / "run", new=False) as again:  # a second run after the first
        assert again.path == run.path


def test_runs_that_are_named_after_the_same_second_get_a_directory_each(tmp_path):
    with claimed(tmp_path / "12-00", new=True) as first:
        first.write_recipe("a")
        with claimed(tmp_path / "12-00", new=True) as second:
            second.write_recipe("b")
    with claimed(tmp_path / "12-00", new=True) as third:  # the clock was put back
        assert [run.path.name for run in (first, second, third)] == ["12-00", "12-00_2", "12-00_3"]
    assert first.recipe.read_text() == "a"


def test_the_recipe_hash_is_that_of_the_recipe_as_requested(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.write_recipe("mine")
    directory.recipe.write_text("of somebody else")
    assert directory.recipe_hash == hashlib.sha256(b"mine").hexdigest()


def test_each_new_directory_is_another_one(tmp_path):
    assert [new_directory(tmp_path / "a").name for _ in range(3)] == ["a", "a_2", "a_3"]
