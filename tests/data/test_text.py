"""Contracts of every file format and of the hub, and what a user reads when a text cannot be had."""

import gzip
import hashlib
import json
import socket
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from jointq_cli.data import pydoc as pydoc_text
from jointq_cli.data.text import TextSource, documents, read, text_hash
from jointq_cli.errors import ConfigError, ResourceError, TextError

TEXTS = ["First, with a comma.", "Second\nover two lines.", 'Third "quoted" Grüße']


@dataclass(frozen=True)
class Evaluation(TextSource):
    """Stands for the recipe's part of that name."""


def source(
    dataset: str = "text",
    path: Path | str | None = None,
    split: str = "train",
    column: str | None = None,
    revision: str | None = None,
) -> TextSource:
    return Evaluation(dataset, None if path is None else str(path), None, split, column, revision)


def write_csv(file: Path, column: str) -> None:
    quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
    content = "number," + column + "\n" + "".join(f"{n},{text}\n" for n, text in enumerate(quoted))
    file.write_bytes(gzip.compress(content.encode()) if file.suffix == ".gz" else content.encode())


def write_jsonl(file: Path, column: str) -> None:
    content = "".join(json.dumps({"number": n, column: text}) + "\n" for n, text in enumerate(TEXTS))
    file.write_bytes(gzip.compress(content.encode()) if file.suffix == ".gz" else content.encode())


def write_json(file: Path, column: str) -> None:
    file.write_text(json.dumps([{"number": n, column: text} for n, text in enumerate(TEXTS)]))


def write_parquet(file: Path, column: str) -> None:
    table = pyarrow.table({"number": [0, 1, 2], column: TEXTS})
    pyarrow.parquet.write_table(table, file)


WRITERS = {
    "a.csv": write_csv,
    "b.csv.gz": write_csv,
    "a.jsonl": write_jsonl,
    "a.json": write_json,
    "a.json.gz": write_jsonl,
    "A.PARQUET": write_parquet,
    "odd [1] name.jsonl": write_jsonl,
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("column", [None, "body"])
def test_a_table_has_one_document_per_row(tmp_path: Path, name: str, column: str | None) -> None:
    WRITERS[name](tmp_path / name, column or "text")
    assert list(documents(source(path=tmp_path / name, column=column))) == TEXTS


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "A.PARQUET"])
def test_a_missing_column_is_told_with_those_that_are_there(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, "text")
    with pytest.raises(TextError, match=r"evaluation.column=body: .* it has number, text"):
        list(documents(source(path=tmp_path / name, column="body")))


def test_a_column_of_numbers_is_not_text(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", "text")
    with pytest.raises(TextError, match=r"column=number: .* holds int there, not text"):
        list(documents(source(path=tmp_path / "a.parquet", column="number")))


def test_rows_without_text_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "  "}\n{"text": "two"}\n')
    assert list(documents(source(path=tmp_path / "a.jsonl"))) == ["one", "two"]


def test_every_cell_of_a_csv_file_is_a_text_of_any_length(tmp_path: Path) -> None:
    texts = ["NA", "12", "x" * 300_000]
    (tmp_path / "a.csv").write_text("\ufefftext\n" + "\n".join(texts) + "\n", encoding="utf-8")
    assert list(documents(source(path=tmp_path / "a.csv"))) == texts


@pytest.mark.parametrize("name", ["a.txt", "a.raw", "a.md", "A.TXT"])
def test_a_plain_file_is_one_document(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\n")
    assert list(documents(source(path=tmp_path / name))) == ["one\n\ntwo\n"]


def test_a_glob_takes_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    write_jsonl(tmp_path / "c.jsonl", "text")
    corpus = read(source(path=tmp_path / "*"))
    assert list(corpus.documents) == ["a", "b", *TEXTS]
    assert corpus.origin["files"] == "a.txt b.txt c.jsonl"


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "A.PARQUET"])
def test_reading_a_local_file_leaves_nothing_behind_and_asks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("asked for an address"))
    WRITERS[name](tmp_path / name, "text")
    assert len(list(documents(source(path=tmp_path / name)))) == 3
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_the_settings_of_the_datasets_library_survive(tmp_path: Path) -> None:
    before = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    write_jsonl(tmp_path / "a.jsonl", "text")
    list(documents(source(path=tmp_path / "a.jsonl")))
    assert (datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()) == before


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\xef\xbb\xbf\n", "is empty"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"text": ""}\n', "is empty: no row has text in column 'text'"),
        ("a.csv", b"text\n", "is empty"),
        ("a.txt", b"Gr\xfc\xdfe", "is not UTF-8: byte 0xfc at offset 2"),
        ("a.jsonl", b'{"text": "Gr\xfc\xdfe"}\n', "is not UTF-8: byte 0xfc at offset 12"),
        ("a.csv", b"text\nGr\xfc\xdfe\n", "is not UTF-8: byte 0xfc at offset 7"),
        ("a.jsonl", b'{"text": \n', "cannot be read as json"),
        ("a.csv", b"text\none, two\n", "cannot be read as csv (line 2 has more cells than the header)"),
        ("a.csv.gz", b"not gzip", "cannot be read as csv"),
        ("a.parquet", b"PAR1 and no more", "cannot be read as parquet"),
        ("a.json.gz", b"not gzip", "cannot be read as json"),
        ("a.pdf", b"%PDF", r"unknown kind of file '.pdf': must be one of .txt"),
        ("a", b"text", "unknown kind of file ''"),
    ],
)
def test_a_bad_file_is_told_by_name_and_rule_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, content: bytes, rule: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError) as caught:
        list(documents(source(path=tmp_path / name)))
    assert str(caught.value).startswith(f"evaluation.path={tmp_path / name}: {rule}")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_missing_file_an_idle_glob_and_a_directory_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"none\.txt: no such file"):
        read(source(path=tmp_path / "none.txt"))
    with pytest.raises(TextError, match="no file matches"):
        read(source(path=tmp_path / "*.txt"))
    with pytest.raises(TextError, match=r"is a directory; name its files, such as .*\*.txt"):
        read(source(path=tmp_path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dataset": "wikitext"}, "evaluation.dataset=wikitext: must be one of pydoc, text, wikitext2, c4"),
        ({"dataset": "text"}, "evaluation.dataset=text: needs evaluation.path=FILE"),
        ({"dataset": "pydoc", "path": "a.txt"}, "evaluation.path=a.txt: pydoc reads no file"),
        (
            {"dataset": "pydoc", "split": "test"},
            "evaluation.split=test: must be one of evaluation, calibration",
        ),
        ({"dataset": "c4", "split": "test"}, "evaluation.split=test: must be one of train, validation"),
    ],
)
def test_a_source_that_cannot_be_is_a_config_error(values: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        source(**values)


def test_pydoc_gives_the_topics_of_its_split() -> None:
    corpus = read(source("pydoc", split="calibration"))
    assert list(corpus.documents) == pydoc_text.topics("calibration")
    assert corpus.origin["revision"].startswith("python 3.")


def test_the_raw_wikitext_file_gives_the_rows_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "wiki.raw").write_text(" \n = Title = \n \n One line . \n", encoding="utf-8")
    corpus = read(source("wikitext2", tmp_path / "wiki.raw", "test"))
    assert list(corpus.documents) == ["", " = Title = \n", "", " One line . \n"]
    assert corpus.running
    assert corpus.joint == "\n\n"


def test_a_text_has_the_hash_of_its_documents_joined_by_a_blank_line() -> None:
    assert text_hash(["a", "", "ü"]) == hashlib.sha256("a\n\n\n\nü".encode()).hexdigest()


def no_hub(*_: object, **__: object) -> None:
    raise huggingface_hub.errors.OfflineModeIsEnabled("offline mode\nis enabled")


@pytest.mark.parametrize("dataset", ["wikitext2", "c4"])
def test_an_unreachable_hub_says_how_to_go_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", no_hub)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("asked for an address"))
    with pytest.raises(ResourceError) as caught:
        read(source(dataset, split="train"))
    message = str(caught.value)
    assert message.startswith(f"evaluation.dataset={dataset}: cannot fetch ")
    assert message.endswith("evaluation.path=FILE, or take evaluation.dataset=pydoc evaluation.split=evaluation")
    assert "\n" not in message
    assert not datasets.config.HF_HUB_OFFLINE


def test_an_unknown_revision_is_not_taken_for_a_lost_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        error = huggingface_hub.errors.RevisionNotFoundError
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(TextError, match=r"evaluation\.revision=v9: Salesforce/wikitext has no such revision"):
        read(source("wikitext2", split="test", revision="v9"))


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_the_hub_is_read_at_the_commit_that_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def load(*names: str, **options: object) -> list[dict[str, str]]:
        asked.update(options, names=names)
        return [{"text": ""}, {"text": " = Title = \n"}]

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha=COMMIT))
    monkeypatch.setattr(datasets, "load_dataset", load)
    corpus = read(source("wikitext2", split="test"))
    assert list(corpus.documents) == ["", " = Title = \n"]
    assert corpus.origin["revision"] == asked["revision"] == COMMIT
    assert asked["names"] == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert asked["split"] == "test"


class Cached(list[dict[str, str]]):
    cache_files = ({"filename": f"/cache/Salesforce___wikitext/0.0.0/{COMMIT}/wikitext-test.arrow"},)


def test_a_cached_data_set_serves_offline_and_tells_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", no_hub)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Cached([{"text": "row"}]))
    assert read(source("wikitext2", split="test")).origin["revision"] == COMMIT
    assert read(source("wikitext2", split="test", revision=COMMIT[:7])).origin["revision"] == COMMIT
    with pytest.raises(ResourceError, match=f"revision={'f' * 40}: the hub cannot be reached, and the cache holds"):
        read(source("wikitext2", split="test", revision="f" * 40))


def test_c4_is_streamed_and_a_broken_connection_is_a_resource_error(monkeypatch: pytest.MonkeyPatch) -> None:
    served = []

    def stream() -> object:
        for number in range(3):
            served.append(number)
            yield {"text": f"document {number}"}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha=COMMIT))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, streaming, **__: stream() if streaming else None)
    texts = documents(source("c4", split="train"))
    assert next(texts) == "document 0"
    assert served == [0]
    with pytest.raises(ResourceError, match="reset by peer"):
        list(texts)


@pytest.mark.network
def test_wikitext2_from_the_hub_has_the_rows_that_everybody_counts() -> None:
    corpus = read(source("wikitext2", split="test"))
    rows = list(corpus.documents)
    assert len(rows) == 4358
    assert rows[:2] == ["", " = Robert Boulter = \n"]
    assert len(corpus.origin["revision"]) == 40


@pytest.mark.network
def test_c4_from_the_hub_streams() -> None:
    corpus = read(source("c4", split="train"))
    assert len(next(corpus.documents)) > 10
    assert len(corpus.origin["revision"]) == 40
