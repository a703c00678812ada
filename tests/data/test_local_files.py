"""Text in local files: every format, and the message for every file that cannot be read."""

import gzip
import json
import socket
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from text_cases import source

from jointq_cli.data.corpus import open_corpus
from jointq_cli.errors import TextError

TEXTS = ["First, with a comma.", "Second\nover two lines.", 'Third "quoted" Grüße']


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
    assert list(open_corpus(source(path=tmp_path / name, column=column)).documents) == TEXTS


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "A.PARQUET"])
def test_a_missing_column_is_told_with_those_that_are_there(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, "text")
    with pytest.raises(TextError, match=r"evaluation.column=body: .* it has number, text"):
        list(open_corpus(source(path=tmp_path / name, column="body")).documents)


def test_a_column_of_numbers_is_not_text(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", "text")
    with pytest.raises(TextError, match=r"column=number: .* holds int there, not text"):
        list(open_corpus(source(path=tmp_path / "a.parquet", column="number")).documents)


def test_rows_without_text_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "  "}\n{"text": "two"}\n')
    assert list(open_corpus(source(path=tmp_path / "a.jsonl")).documents) == ["one", "two"]


def test_every_cell_of_a_csv_file_is_a_text_of_any_length(tmp_path: Path) -> None:
    texts = ["NA", "12", "x" * 300_000]
    (tmp_path / "a.csv").write_text("\ufefftext\n" + "\n".join(texts) + "\n", encoding="utf-8")
    assert list(open_corpus(source(path=tmp_path / "a.csv")).documents) == texts


@pytest.mark.parametrize("name", ["a.txt", "a.raw", "a.md", "A.TXT"])
def test_a_plain_file_is_one_document(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\n")
    assert list(open_corpus(source(path=tmp_path / name)).documents) == ["one\n\ntwo\n"]


def test_a_glob_takes_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    write_jsonl(tmp_path / "c.jsonl", "text")
    corpus = open_corpus(source(path=tmp_path / "*"))
    assert list(corpus.documents) == ["a", "b", *TEXTS]
    assert corpus.provenance["files"] == "a.txt b.txt c.jsonl"


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "A.PARQUET"])
def test_reading_a_local_file_leaves_nothing_behind_and_asks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("asked for an address"))
    WRITERS[name](tmp_path / name, "text")
    assert len(list(open_corpus(source(path=tmp_path / name)).documents)) == 3
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_the_settings_of_the_datasets_library_survive(tmp_path: Path) -> None:
    before = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    write_jsonl(tmp_path / "a.jsonl", "text")
    list(open_corpus(source(path=tmp_path / "a.jsonl")).documents)
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
        list(open_corpus(source(path=tmp_path / name)).documents)
    assert str(caught.value).startswith(f"evaluation.path={tmp_path / name}: {rule}")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_missing_file_an_idle_glob_and_a_directory_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"none\.txt: no such file"):
        open_corpus(source(path=tmp_path / "none.txt"))
    with pytest.raises(TextError, match="no file matches"):
        open_corpus(source(path=tmp_path / "*.txt"))
    with pytest.raises(TextError, match=r"is a directory; name its files, such as .*\*.txt"):
        open_corpus(source(path=tmp_path))


def test_the_raw_wikitext_file_gives_the_rows_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "wiki.raw").write_text(" \n = Title = \n \n One line . \n", encoding="utf-8")
    corpus = open_corpus(source("wikitext2", tmp_path / "wiki.raw", "test"))
    assert list(corpus.documents) == ["", " = Title = \n", "", " One line . \n"]
    assert corpus.running
    assert corpus.joint == "\n\n"
