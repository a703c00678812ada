"""The key `jointq` of config.json: where it stands, and that without it the file is what it was."""

import hashlib
import json
from pathlib import Path

import pytest
from tiny_models import edit_config, write_checkpoint
from transformers import AutoConfig

from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.identity import base_model, quantised_by, result_hashes, without_identity, write_identity
from jointq_cli.models.sources import BUNDLED
from jointq_cli.system.run_directory import result_files

FIRST = {"version": "1", "base_model": "org/näme", "quantizer": "a }, {b"}
SECOND = {"version": "2", "base_model": "other"}


@pytest.mark.parametrize(
    "text",
    [
        '{\n  "a": {"b": 1},\n  "c": "}"\n}\n',
        '{"a": {"b": 1}, "c": "jointq"}',
        '\n {\r\n\t"a": "é"}',
        (BUNDLED / "config.json").read_text(encoding="utf-8"),
    ],
    ids=["indented", "one line", "odd", "pocket"],
)
def test_the_key_comes_first_and_leaves_the_other_bytes(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text.encode())
    for identity in (FIRST, SECOND):
        write_identity(tmp_path, identity)
        written = file.read_bytes().decode()
        assert json.loads(written) == {"jointq": identity, **json.loads(text)}
        assert written.count('"jointq": {') == 1
        assert without_identity(written) == text


def test_a_key_that_transformers_has_written_is_replaced(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    write_identity(tmp_path, FIRST)
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))["jointq"] == FIRST
    write_identity(tmp_path / "again", SECOND)
    written = (tmp_path / "again" / "config.json").read_text(encoding="utf-8")
    assert (json.loads(written)["jointq"], written.count('"jointq"')) == (SECOND, 1)


def test_results_are_hashed_without_key_and_model_card(tmp_path: Path) -> None:
    place = tmp_path / "checkpoint"
    place.mkdir()
    for name in ("config.json", "tokenizer.json", "README.md"):
        (place / name).write_text('{"a": 1}', encoding="utf-8")
    write_identity(place, FIRST)
    digest = hashlib.sha256(b'{"a": 1}').hexdigest()
    found = result_hashes(tmp_path, result_files(tmp_path))
    assert found == {"checkpoint/config.json": digest, "checkpoint/tokenizer.json": digest}
    (place / "config.json").write_text("{", encoding="utf-8")  # changed after the run
    assert result_hashes(tmp_path, result_files(tmp_path))["checkpoint/config.json"] != digest


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("pocket", "pocket"),
        ("org/name", "org/name"),
        ("/somewhere/else/mine", "mine"),
        ("~/mine/", "mine"),
        ("./mine.gguf", "mine"),
        ("/cache/models--org--name/snapshots/0123", "org/name"),
    ],
)
def test_a_model_is_called_by_its_hub_id_or_its_directory(path: str, name: str) -> None:
    assert base_model(path, {}) == name
    assert base_model(path, {"jointq": SECOND}) == "other"
    assert base_model(path, {"jointq": "odd"}) == name


def test_a_local_directory_that_looks_like_a_hub_id_has_no_organisation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert base_model("models/mine", {}) == "mine"


def test_weights_that_jointq_has_quantised_are_known_by_the_key_or_the_run(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "checkpoint")
    assert quantised_by(Checkpoint(directory)) == ""
    (tmp_path / "codes").mkdir()
    (tmp_path / "report.json").touch()
    assert quantised_by(Checkpoint(directory)) == f"the run {tmp_path}"
    edit_config(directory, jointq={"version": "1.0", "quantizer": "RTN W4 g128"})
    assert quantised_by(Checkpoint(directory)) == "RTN W4 g128"
    edit_config(directory, jointq={"version": "1.0", "rotation": "R1"})
    assert quantised_by(Checkpoint(directory)) == ""  # rotated, to be quantised now
