"""The store: an artifact that exists is complete, is computed once, and its key covers what decides its content."""

import os
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest

from jointq_cli.errors import ResourceError
from jointq_cli.system.files import link_files, write_atomically
from jointq_cli.system.integrity import CONTENTS
from jointq_cli.system.inventory import entries, remove
from jointq_cli.system.store import Artifact, Store, artifact_name


def key(digit: int) -> str:
    return str(digit) * 64


KEY = key(0)


def write_one(scratch: Path) -> None:
    (scratch / "one").write_text("1")


def test_an_artifact_is_computed_once_and_then_reused(tmp_path: Path) -> None:
    store, made = Store(tmp_path), []

    def make(scratch: Path) -> None:
        made.append(1)
        write_one(scratch)

    first, second = (store.reuse("stage", KEY, make) for _ in range(2))
    assert (first.reused, second.reused, len(made)) == (False, True, 1)
    assert (second.path / "one").read_text() == "1"


def test_a_stage_that_fails_leaves_no_artifact(tmp_path: Path) -> None:
    def fail(scratch: Path) -> None:
        write_one(scratch)
        raise RuntimeError("half-way")

    store = Store(tmp_path)
    with pytest.raises(RuntimeError):
        store.reuse("stage", KEY, fail)
    assert not list(tmp_path.glob("stage-*"))
    assert not store.reuse("stage", KEY, write_one).reused


def test_only_a_resumable_stage_finds_its_unfinished_output(tmp_path: Path) -> None:
    store, found = Store(tmp_path), []

    def fail_first(scratch: Path) -> None:
        found.append((scratch / "left").exists())
        (scratch / "left").touch()
        if len(found) % 2:
            raise RuntimeError

    for resumable in (True, False):
        for _ in range(2):
            try:
                store.reuse(f"stage{resumable}", KEY, fail_first, resumable=resumable)
            except RuntimeError:
                continue
    assert found == [False, True, False, False]


def _append_and_make(root: Path, log: Path) -> None:
    def make(scratch: Path) -> None:
        with log.open("a") as file:
            file.write("made\n")
        write_one(scratch)

    Store(root).reuse("stage", KEY, make)


def test_two_processes_compute_the_same_artifact_once(tmp_path: Path) -> None:
    context = get_context("spawn")
    log = tmp_path / "log"
    workers = [context.Process(target=_append_and_make, args=(tmp_path / "store", log)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert log.read_text() == "made\n"


def test_waiting_for_another_process_is_logged_and_can_be_interrupted(tmp_path: Path) -> None:
    logged: list[str] = []

    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    def make(scratch: Path) -> None:
        with pytest.raises(Stop):
            Store(tmp_path, pause=stop, log=logged.append).reuse("stage", KEY, write_one)
        write_one(scratch)

    assert not Store(tmp_path).reuse("stage", KEY, make).reused
    assert len(logged) == 1
    assert "waiting for another process, which writes stage-" in logged[0]


def damaged(path: Path) -> None:
    (path / "one").write_text("2")


def test_a_damaged_artifact_is_logged_and_computed_again(tmp_path: Path) -> None:
    logged: list[str] = []
    with Store(tmp_path) as store:
        path = store.reuse("stage", KEY, write_one).path
    damaged(path)
    with Store(tmp_path, log=logged.append) as store:
        again = [store.reuse("stage", KEY, write_one) for _ in range(2)]
    assert [artifact.reused for artifact in again] == [False, True]
    assert (path / "one").read_text() == "1"
    assert logged == [f"warning: {path}: one has other bytes than were written; it is removed and computed again"]
    assert not list((tmp_path / "partial").iterdir())


def test_damage_is_noticed_while_the_artifact_is_in_use(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        damaged(store.reuse("stage", KEY, write_one).path)
        assert not store.reuse("stage", KEY, write_one).reused


def test_an_edit_of_a_run_directory_reaches_the_store_and_is_noticed(tmp_path: Path) -> None:
    def make(scratch: Path) -> None:
        (scratch / "model.safetensors").write_text("weights")

    with Store(tmp_path / "store") as store:
        link_files(store.reuse("stage", KEY, make).path, tmp_path / "run", "*.safetensors")
        with (tmp_path / "run" / "model.safetensors").open("r+") as file:
            file.write("W")
        artifact = store.reuse("stage", KEY, make)
        assert not artifact.reused
        assert (artifact.path / "model.safetensors").read_text() == "weights"


@pytest.mark.parametrize("instead", [Path.touch, lambda path: path.symlink_to("nowhere")])
def test_a_foreign_file_in_place_of_an_artifact_is_replaced(instead: Callable[[Path], None], tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        path = store.reuse("stage", KEY, write_one).path
        path.rename(tmp_path / "elsewhere")
        instead(path)
        assert not store.reuse("stage", KEY, write_one).reused
        assert path.is_dir()
        assert not path.is_symlink()
        assert (tmp_path / "elsewhere" / "one").exists()


def test_an_artifact_in_use_cannot_be_removed(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.reuse("stage", KEY, write_one)
        [entry] = entries(tmp_path)
        assert not remove(tmp_path, entry)
    [entry] = entries(tmp_path)
    assert remove(tmp_path, entry)
    assert not entries(tmp_path)
    assert not list((tmp_path / "locks").iterdir())


def test_an_artifact_that_is_removed_at_once_is_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    with Store(tmp_path) as store:
        acquire = store._acquire

        def slow_acquire(name: str, *, is_new: bool = False) -> bool:
            if len(made) == 1:
                assert remove(tmp_path, entries(tmp_path)[0])
            return acquire(name, is_new=is_new)

        def make(scratch: Path) -> None:
            made.append(1)
            write_one(scratch)

        monkeypatch.setattr(store, "_acquire", slow_acquire)
        artifact = store.reuse("stage", KEY, make)
        assert (artifact.path / "one").exists()
        assert (len(made), artifact.reused) == (2, False)


# --- a budget for a stage


LISTS = 1000  # bytes, more than all lists of contents in these tests


def large(store: Store, bits: int, *, size: int, budget: int) -> Artifact | None:
    """An artifact of `size` bytes, one per number of bits, of a stage that may have `budget`."""

    def make(scratch: Path) -> None:
        (scratch / "data").write_bytes(bytes(size))

    fits = store.make_room("large", key(bits), budget=budget + LISTS, size=size)
    return store.reuse("large", key(bits), make) if fits else None


def dated(artifact: Artifact | None, seconds: float) -> None:
    assert artifact is not None
    os.utime(artifact.path / CONTENTS, (seconds, seconds))


def kept(root: Path) -> set[int]:
    by_name = {artifact_name("large", key(bits)): bits for bits in range(1, 9)}
    return {by_name[entry.name] for entry in entries(root) if entry.stage == "large"}


def test_the_least_recently_used_artifacts_of_a_stage_are_removed_first(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.reuse("small", KEY, write_one)
        for bits, used in ((1, 3000), (2, 1000), (3, 2000)):
            dated(large(store, bits, size=4000, budget=12000), used)
    with Store(tmp_path) as store:
        assert large(store, 4, size=4000, budget=12000) is not None
    assert kept(tmp_path) == {1, 3, 4}
    assert any(entry.stage == "small" for entry in entries(tmp_path))


def test_an_existing_artifact_is_reused_and_none_is_removed(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for bits in (1, 2):
            large(store, bits, size=4000, budget=8000)
        found = large(store, 1, size=4000, budget=8000)
        assert found is not None
        assert found.reused
    assert kept(tmp_path) == {1, 2}


def test_nothing_is_removed_for_an_artifact_above_the_budget(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        large(store, 1, size=4000, budget=8000)
    with Store(tmp_path) as store:
        assert large(store, 2, size=9500, budget=8000) is None
        large(store, 3, size=4000, budget=8000)
        assert large(store, 4, size=8000, budget=8000) is None  # 3 is in use
    assert kept(tmp_path) == {1, 3}


def test_an_artifact_used_in_the_future_is_removed_last(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        dated(large(store, 1, size=4000, budget=8000), 4e9)
        large(store, 2, size=4000, budget=8000)
    with Store(tmp_path) as store:
        assert large(store, 3, size=4000, budget=8000) is not None
    assert kept(tmp_path) == {1, 3}


def test_linked_files_are_those_of_the_last_source_and_nothing_else(tmp_path: Path) -> None:
    for name, files in {"one": ["a.safetensors", "b.json"], "two": ["a.safetensors"]}.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text(name)
    target = tmp_path / "target"
    for name in ("one", "one", "two"):  # twice the same: the second rename is onto another link of the same file
        link_files(tmp_path / name, target)
    assert {file.name: file.read_text() for file in target.iterdir()} == {"a.safetensors": "two"}


def test_scratch_files_of_a_killed_write_are_no_part_of_an_artifact(tmp_path: Path) -> None:
    def stopped(scratch: Path) -> None:
        (scratch / ".hidden.safetensors.host-1-2.partial").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).reuse("stage", KEY, stopped, resumable=True)
    artifact = Store(tmp_path).reuse("stage", KEY, lambda scratch: (scratch / "a").touch(), resumable=True)
    assert {path.name for path in artifact.path.iterdir()} == {"a", CONTENTS}


def test_a_scratch_directory_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").touch()
    store = Store(tmp_path / "store")
    name = artifact_name("stage", KEY)
    (tmp_path / "store" / "partial").mkdir()
    for resumable in (False, True):
        (tmp_path / "store" / "partial" / name).symlink_to(tmp_path / "outside")
        artifact = store.reuse("stage", KEY, lambda scratch: (scratch / "a").touch(), resumable=resumable)
        assert {path.name for path in artifact.path.iterdir()} == {"a", CONTENTS}
        assert [path.name for path in (tmp_path / "outside").iterdir()] == ["precious"]
        store.close()
        remove(store.root, entries(store.root)[0])


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
