"""The list of an artifact's files: every change is noticed, and no byte is read twice for it."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from jointq_cli.system.integrity import CONTENTS, completed_at, find_damage, write_contents


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A finished directory of three files."""
    directory = tmp_path / "stage-0123456789abcdef"
    (directory / "layers").mkdir(parents=True)
    (directory / "layers" / "a.bin").write_bytes(bytes(range(200)))
    (directory / "layers" / "b.json").write_text("{}")
    (directory / "empty").touch()
    write_contents(directory)
    return directory


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")
    path.with_name("elsewhere").rename(path.parent.parent.parent / "elsewhere")


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: (path / "layers/a.bin").unlink(), "layers/a.bin is missing"),
    "truncated": (lambda path: os.truncate(path / "layers/a.bin", 10), "layers/a.bin has 10 bytes, not 200"),
    "emptied": (lambda path: os.truncate(path / "layers/b.json", 0), "layers/b.json has 0 bytes, not 2"),
    "one bit": (lambda path: flip(path / "layers/a.bin"), "layers/a.bin has other bytes than were written"),
    "a foreign file": (lambda path: (path / "layers/c.json").touch(), "layers/c.json does not belong there"),
    "a link": (lambda path: link(path / "layers/a.bin"), "layers/a.bin is not a regular file any more"),
    "no list": (lambda path: (path / CONTENTS).unlink(), f"{CONTENTS} is missing or damaged"),
    "half a list": (lambda path: os.truncate(path / CONTENTS, 40), f"{CONTENTS} is missing or damaged"),
    "another list": (lambda path: (path / CONTENTS).write_text("[]"), f"{CONTENTS} is missing or damaged"),
    "a strange list": (
        lambda path: (path / CONTENTS).write_text('{"files": {"empty": 0}}'),
        f"{CONTENTS} is missing or damaged",
    ),
}


def test_an_unchanged_directory_is_intact(finished: Path) -> None:
    assert find_damage(finished) is None


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("checked_before", [False, True])
def test_every_change_is_reported_with_its_file(change: str, checked_before: bool, finished: Path) -> None:
    if checked_before:
        assert find_damage(finished) is None
    act, said = CHANGES[change]
    act(finished)
    assert find_damage(finished) == said


@pytest.mark.parametrize("name", [".DS_Store", "layers/._a.bin", "layers/.nfs0000000001"])
def test_files_of_desktops_and_file_systems_are_no_damage(name: str, finished: Path) -> None:
    (finished / name).touch()
    assert find_damage(finished) is None


def test_a_list_of_contents_can_be_checked_with_sha256sum(finished: Path) -> None:
    listed = json.loads((finished / CONTENTS).read_text())["files"]
    assert set(listed) == {"empty", "layers/a.bin", "layers/b.json"}
    assert listed["layers/a.bin"] == {"size": 200, "sha256": hashlib.sha256(bytes(range(200))).hexdigest()}


def test_a_list_left_by_a_killed_process_is_rewritten(finished: Path) -> None:
    (finished / "late").touch()
    write_contents(finished)
    assert find_damage(finished) is None


def test_no_byte_is_read_twice_while_size_and_time_stay(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: (read.append(file.name), digest(file, name))[1])
    other = finished.rename(finished.with_name("other"))
    for _ in range(2):
        assert find_damage(other) is None
        assert len(read) == 3
    os.utime(other / "layers" / "a.bin")
    assert find_damage(other) is None
    assert [Path(name).name for name in read[3:]] == ["a.bin"]


def test_a_file_on_a_bad_sector_is_damage(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(5, "Input/output error")

    other = finished.rename(finished.with_name("bad"))
    monkeypatch.setattr(hashlib, "file_digest", fail)
    assert find_damage(other) == "empty cannot be read (Input/output error)"


def test_the_time_of_completion_is_not_the_time_of_use(finished: Path) -> None:
    made = completed_at(finished)
    os.utime(finished / CONTENTS, (0, 0))
    assert made is not None
    assert completed_at(finished) == made
    (finished / CONTENTS).write_text('{"made": "yesterday"}')
    assert completed_at(finished) is None
