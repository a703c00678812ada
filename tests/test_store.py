"""The store: what exists is complete, nothing is made twice, and a key holds exactly what decides the content."""

import os
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import pytest

from jointq_cli.errors import ResourceError
from jointq_cli.store import Store, artifact_key, link_files, write_atomically


@dataclass(frozen=True)
class Spec:
    bits: int
    damping: float = 0.01


@dataclass(frozen=True)
class OtherSpec:
    bits: int
    damping: float = 0.01


def write_one(scratch: Path) -> None:
    (scratch / "one").write_text("1")


def test_an_artifact_is_made_once_and_then_reused(tmp_path: Path) -> None:
    store, made = Store(tmp_path), []

    def make(scratch: Path) -> None:
        made.append(1)
        write_one(scratch)

    first, second = (store.reuse("stage", Spec(4), ["input"], make) for _ in range(2))
    assert (first.reused, second.reused, len(made)) == (False, True, 1)
    assert (second.path / "one").read_text() == "1"


def test_everything_that_decides_the_content_is_in_the_key() -> None:
    base = artifact_key("stage", Spec(4), ["input"])
    assert base == artifact_key("stage", Spec(4), ["input"])
    others = [
        artifact_key("other", Spec(4), ["input"]),
        artifact_key("stage", Spec(3), ["input"]),
        artifact_key("stage", replace(Spec(4), damping=0.1), ["input"]),
        artifact_key("stage", OtherSpec(4), ["input"]),
        artifact_key("stage", Spec(4), ["another"]),
        artifact_key("stage", Spec(4), []),
    ]
    assert len({base, *others}) == len(others) + 1


def test_a_value_that_has_no_canonical_form_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot hold a set"):
        artifact_key("stage", {"names": {"a"}}, [])


def test_a_stage_that_fails_leaves_no_artifact(tmp_path: Path) -> None:
    def fail(scratch: Path) -> None:
        write_one(scratch)
        raise RuntimeError("half-way")

    store = Store(tmp_path)
    with pytest.raises(RuntimeError):
        store.reuse("stage", Spec(4), [], fail)
    assert [path.name for path in tmp_path.iterdir()] == ["partial"]
    assert not store.reuse("stage", Spec(4), [], write_one).reused


def test_only_a_resumable_stage_finds_what_it_left(tmp_path: Path) -> None:
    store, found = Store(tmp_path), []

    def fail_first(scratch: Path) -> None:
        found.append((scratch / "left").exists())
        (scratch / "left").touch()
        if len(found) % 2:
            raise RuntimeError

    for resumable in (True, False):
        for _ in range(2):
            try:
                store.reuse(f"stage{resumable}", Spec(4), [], fail_first, resumable=resumable)
            except RuntimeError:
                continue
    assert found == [False, True, False, False]


def _append_and_make(root: Path, log: Path) -> None:
    def make(scratch: Path) -> None:
        with log.open("a") as file:
            file.write("made\n")
        write_one(scratch)

    Store(root).reuse("stage", Spec(4), [], make)


def test_two_processes_that_want_the_same_artifact_make_it_once(tmp_path: Path) -> None:
    context = get_context("spawn")
    log = tmp_path / "log"
    workers = [context.Process(target=_append_and_make, args=(tmp_path / "store", log)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert log.read_text() == "made\n"


def test_waiting_for_another_process_is_told_and_can_be_stopped(tmp_path: Path) -> None:
    told: list[str] = []

    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    def make(scratch: Path) -> None:
        with pytest.raises(Stop):
            Store(tmp_path, pause=stop, tell=told.append).reuse("stage", Spec(4), [], write_one)
        write_one(scratch)

    assert not Store(tmp_path).reuse("stage", Spec(4), [], make).reused
    assert len(told) == 1
    assert "waiting for another process, which makes stage-" in told[0]


def test_linked_files_are_those_of_the_last_source_and_nothing_else(tmp_path: Path) -> None:
    for name, files in {"one": ["a.safetensors", "b.json"], "two": ["a.safetensors"]}.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text(name)
    target = tmp_path / "target"
    for name in ("one", "one", "two"):  # twice the same: the second rename is onto another link of the same file
        link_files(tmp_path / name, target)
    assert {file.name: file.read_text() for file in target.iterdir()} == {"a.safetensors": "two"}


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(scratch: Path) -> None:
        scratch.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == "old"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ResourceError, match="cannot be written"):
        Store(tmp_path / "store")


def test_a_file_in_the_place_of_the_store_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="file"):
        Store(tmp_path / "file" / "store")
