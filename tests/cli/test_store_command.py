"""`jointq store`: it lists what is there, and removes what it may and nothing else."""

import os
import re
import time
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path

import pytest

from jointq_cli.cli.main import main
from jointq_cli.errors import JointqError
from jointq_cli.system import inventory
from jointq_cli.system.files import link_files
from jointq_cli.system.integrity import CONTENTS
from jointq_cli.system.inventory import entries
from jointq_cli.system.store import Artifact, Store

DAY = 86400.0
KEY = "0" * 64


def make_of(size: int) -> Callable[[Path], None]:
    def make(scratch: Path) -> None:
        (scratch / "checkpoint").mkdir()
        (scratch / "checkpoint" / "model.safetensors").write_bytes(bytes(size))

    return make


class Shelf:
    """A store under the test's folder, and the command on it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with Store(root):
            pass

    def make(self, stage: str, *, size: int = 1000, days: float = 0.0) -> Artifact:
        """days: since it was used."""
        with Store(self.root) as store:
            artifact = store.reuse(stage, KEY, make_of(size))
        moment = time.time() - days * DAY
        os.utime(artifact.path / CONTENTS, (moment, moment))
        return artifact

    def leave_partial(self, stage: str) -> None:
        def fail(scratch: Path) -> None:
            make_of(500)(scratch)
            raise KeyboardInterrupt

        with Store(self.root) as store, pytest.raises(KeyboardInterrupt):
            store.reuse(stage, KEY, fail)

    def __call__(self, *words: str) -> int:
        return main(["store", *words, "--store", str(self.root)])

    def stages(self) -> list[str]:
        return [entry.stage for entry in entries(self.root)]


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "store")


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A file that must survive whatever is done to the store."""
    directory = tmp_path / "outside" / "stage-0123456789abcdef"
    (directory / "x").mkdir(parents=True)
    (directory / "x" / "precious").write_text("kept")
    (directory / CONTENTS).write_text('{"made": "2020-01-01T00:00:00", "files": {}}')
    yield directory
    assert (directory / "x" / "precious").read_text() == "kept"


def test_ls_has_a_row_for_everything_with_its_state(shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    shelf.make("idle", days=3)
    shelf.make("loose")
    shelf.leave_partial("broken_off")
    with Store(shelf.root) as store:
        store.reuse("held", KEY, make_of(10))
        assert shelf("ls") == 0
    rows = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if re.search(r" \d+-\d+-\d+ ", line)}
    assert set(rows) == {"idle", "loose", "broken_off", "held"}
    assert [rows[stage].split()[-1] for stage in ("idle", "loose")] == ["complete", "complete"]
    used = [str(date.today() - timedelta(days=days)) for days in (3, 4)]  # 4: it has become midnight
    assert any(f" {day} " in rows["idle"] for day in used)
    assert rows["held"].endswith("in use")
    assert rows["broken_off"].endswith("partial")


def test_verify_finds_the_damaged_one_and_says_so_with_its_exit_code(
    shelf: Shelf, capsys: pytest.CaptureFixture[str]
) -> None:
    shelf.make("sound")
    assert shelf("ls", "--verify") == 0
    broken = shelf.make("broken")
    (broken.path / "checkpoint" / "model.safetensors").write_bytes(b"x" * 1000)
    capsys.readouterr()
    assert shelf("ls") == 0
    assert "  damaged" not in capsys.readouterr().out
    assert shelf("ls", "--verify") == 1
    captured = capsys.readouterr()
    assert f"{broken.path.name}: checkpoint/model.safetensors has other bytes than were written" in captured.out
    assert len(captured.err.splitlines()) == 1
    assert shelf.stages() == ["broken", "sound"]


def test_a_file_that_a_run_links_to_counts_as_size_but_is_not_freed(
    shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = shelf.make("linked", size=50_000_000)
    link_files(artifact.path / "checkpoint", tmp_path / "run")
    shelf.make("alone", size=20_000_000)
    assert shelf("size") == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if "MB" in line and " B" in line}
    assert "50.0 MB" in rows["linked"]
    assert "20.0 MB" not in rows["linked"]
    assert shelf("prune", "--all") == 0
    assert "20.0 MB freed" in capsys.readouterr().out
    assert (tmp_path / "run" / "model.safetensors").stat().st_size == 50_000_000


def test_what_was_not_used_for_long_goes(shelf: Shelf) -> None:
    for stage, days in (("old", 40), ("older", 400), ("recent", 2)):
        shelf.make(stage, days=days)
    assert shelf("prune", "--older-than", "30") == 0
    assert shelf.stages() == ["recent"]


@pytest.mark.parametrize("ahead", [0.5, 4000])
def test_a_clock_that_went_back_prunes_nothing(ahead: float, shelf: Shelf) -> None:
    shelf.make("ahead", days=-ahead)
    assert shelf("prune", "--older-than", "0") == 0
    assert shelf.stages() == ["ahead"]


def test_the_least_recently_used_goes_until_the_rest_is_small_enough(shelf: Shelf) -> None:
    for stage, days in (("a", 1), ("b", 3), ("c", 2), ("future", -9)):
        shelf.make(stage, size=10_000_000, days=days)
    assert shelf("prune", "--to", "0.0201") == 0
    assert shelf.stages() == ["a", "future"]
    assert shelf("prune", "--to", "0.0201") == 0
    assert shelf.stages() == ["a", "future"]


def test_partial_work_alone_can_be_removed(shelf: Shelf) -> None:
    shelf.make("whole")
    shelf.leave_partial("left")
    assert shelf.stages() == ["whole", "left"]
    assert shelf("prune", "--partial") == 0
    assert shelf.stages() == ["whole"]


def test_a_dry_run_tells_the_same_and_removes_nothing(shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    shelf.make("a", days=5)
    shelf.leave_partial("b")
    assert shelf("prune", "--all", "--dry-run") == 0
    output = capsys.readouterr().out
    assert shelf.stages() == ["a", "b"]
    assert shelf("prune", "--all") == 0
    assert capsys.readouterr().out == output.replace("would be ", "")
    assert shelf.stages() == []


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_what_is_in_use_is_left_and_named(dry: list[str], shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    with Store(shelf.root) as store:
        artifact = store.reuse("held", KEY, make_of(10))
        assert shelf("prune", "--all", *dry) == 0
        assert f"in use, and left: {artifact.path.name}" in capsys.readouterr().out
        assert artifact.path.is_dir()


def test_what_is_being_made_is_left(shelf: Shelf) -> None:
    def make(scratch: Path) -> None:
        assert shelf("prune", "--all") == 0
        make_of(10)(scratch)

    with Store(shelf.root) as store:
        assert (store.reuse("held", KEY, make).path / "checkpoint").is_dir()


def test_nothing_that_has_not_the_form_of_an_artifact_is_touched(shelf: Shelf, outside: Path) -> None:
    strangers = ["notes", "stage-123", "stage-0123456789ABCDEF", "stage-fedcba9876543210"]  # the last has no list
    for name in strangers:
        (shelf.root / name).mkdir()
        (shelf.root / name / "file").touch()
    (shelf.root / "partial").mkdir()
    (shelf.root / "partial" / "notes").mkdir()
    (shelf.root / "partial" / "stage-aaaaaaaaaaaaaaaa").symlink_to(outside)
    (shelf.root / "stage-bbbbbbbbbbbbbbbb").symlink_to(outside)
    inner = shelf.make("inner").path
    (inner / "link").symlink_to(outside)
    for words in (["--all"], ["--partial"], ["--older-than", "0"], ["--to", "0"]):
        assert shelf("prune", *words) == 0
    assert not inner.exists()
    assert all((shelf.root / name / "file").exists() for name in strangers)
    assert (shelf.root / "partial" / "notes").is_dir()
    assert (shelf.root / "stage-bbbbbbbbbbbbbbbb").is_symlink()


@pytest.mark.parametrize("place", ["partial", "locks"])
@pytest.mark.parametrize("words", [["ls"], ["prune", "--all"]])
def test_a_store_whose_own_directories_lie_elsewhere_is_refused(
    place: str, words: list[str], shelf: Shelf, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shelf.root / place).symlink_to(outside.parent)
    assert shelf(*words) == 1
    assert f"{place}: must be a directory of the store itself" in capsys.readouterr().err
    with pytest.raises(JointqError, match="must be a directory of the store itself"):
        Store(shelf.root)


@pytest.mark.parametrize("words", [["ls"], ["size"], ["prune", "--all"]])
def test_a_directory_that_is_no_store_is_refused_in_one_line(
    words: list[str], outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["store", *words, "--store", str(outside.parent)]) == 1
    assert "is not a store, for there is no .jointq-store in it" in capsys.readouterr().err
    assert main(["store", *words, "--store", "nowhere"]) == 1
    assert "there is no such directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [[], ["prune"], ["prune", "--all", "--partial"], ["prune", "--to", "nan"], ["prune", "--older-than=-1"]],
)
def test_wrong_usage_exits_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["store", *words])
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_an_empty_store_is_no_error(shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["ls"], ["size"], ["prune", "--all"]):
        assert shelf(*words) == 0
    assert "0 artifacts" in capsys.readouterr().out


def test_a_use_between_the_look_and_the_removal_saves_an_artifact(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.make("old", days=40)
    look = inventory.entries

    def slow_look(root: Path) -> list[inventory.Entry]:
        found = look(root)
        shelf.make("old")
        return found

    monkeypatch.setattr(inventory, "entries", slow_look)
    assert shelf("prune", "--older-than", "30") == 0
    assert look(shelf.root)
