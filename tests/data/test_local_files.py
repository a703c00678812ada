"""Text in local files: every format, and the message for every file that cannot be read."""

import gzip
import json
import socket
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from text_cases import source

from jointq_cli.data.corpus import open_corpus
from jointq_cli.errors import TextError

TEXTS = ["First, with a comma.", "Second\nover two lines.", 'Third "quoted" Grüße']


def write(file: Path, content: str) -> None:
    data = content.encode()
    if file.suffix == ".zst":
        with pyarrow.output_stream(str(file), compression="zstd") as stream:
            stream.write(data)
    else:
        file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)


def write_csv(file: Path, column: str) -> None:
    quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
    delimiter = "\t" if ".tsv" in file.name else ","
    write(file, "".join(f"{n}{delimiter}{text}\n" for n, text in [("number", column), *enumerate(quoted)]))


def write_jsonl(file: Path, column: str) -> None:
    write(file, "".join(json.dumps({"number": n, column: text}) + "\n" for n, text in enumerate(TEXTS)))


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
    "a.tsv": write_csv,
    "a.tsv.gz": write_csv,
    "a.ndjson": write_jsonl,
    "a.jsonl.zst": write_jsonl,
    "A.PARQUET": write_parquet,
    "odd [1] name.jsonl": write_jsonl,
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("column", [None, "body"])
def test_a_table_has_one_document_per_row(tmp_path: Path, name: str, column: str | None) -> None:
    WRITERS[name](tmp_path / name, column or "text")
    assert list(open_corpus(source(path=tmp_path / name, column=column)).documents) == TEXTS


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "A.PARQUET"])
def test_a_missing_column_is_reported_with_the_existing_ones(tmp_path: Path, name: str) -> None:
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


@pytest.mark.parametrize("name", ["a.txt", "a.raw", "a.md", "A.TXT", "a.txt.gz", "a.md.zst"])
def test_a_plain_file_is_one_document(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, "\ufeffone\r\n\r\ntwo\n")
    assert list(open_corpus(source(path=tmp_path / name)).documents) == ["one\n\ntwo\n"]


def test_a_glob_takes_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    write_jsonl(tmp_path / "c.jsonl", "text")
    corpus = open_corpus(source(path=tmp_path / "*"))
    assert list(corpus.documents) == ["a", "b", *TEXTS]
    assert corpus.provenance["files"] == "a.txt b.txt c.jsonl"


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "A.PARQUET"])
def test_reading_a_local_file_writes_nothing_and_opens_no_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("asked for an address"))
    WRITERS[name](tmp_path / name, "text")
    assert len(list(open_corpus(source(path=tmp_path / name)).documents)) == 3
    assert [file.name for file in tmp_path.iterdir()] == [name]


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
        ("a.jsonl", b'"text"\n', "cannot be read as json (row 1 is a str, not an object)"),
        ("a.txt.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.zst", b"not zstd", "cannot be read as json"),
        ("a.csv", b"text\none, two\n", "cannot be read as csv (line 2 has more cells than the header)"),
        ("a.csv.gz", b"not gzip", "cannot be read as csv"),
        ("a.parquet", b"PAR1 and no more", "cannot be read as parquet"),
        ("a.json.gz", b"not gzip", "cannot be read as json"),
        ("a.pdf", b"%PDF", r"unknown kind of file '.pdf': must be one of .txt"),
        ("a", b"text", "unknown kind of file ''"),
    ],
)
def test_a_bad_file_is_reported_by_name_and_rule_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, content: bytes, rule: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError) as caught:
        list(open_corpus(source(path=tmp_path / name)).documents)
    assert str(caught.value).startswith(f"evaluation.path={tmp_path / name}: {rule}")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_missing_file_an_unmatched_glob_and_a_directory_are_refused_at_once(tmp_path: Path) -> None:
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


def test_rows_of_a_large_file_may_differ_in_their_other_columns(tmp_path: Path) -> None:
    """More than one block of 10 MB, of which the `datasets` library infers the columns and types."""
    texts = [f"text {number} " + "x" * 1000 for number in range(12_000)]
    rows: list[dict[str, object]] = [{"text": text, "id": number} for number, text in enumerate(texts)]
    rows[11_000]["id"] = {"another": "type"}
    rows[11_500]["late"] = "another column"
    rows.insert(11_800, {"note": "a row without the column"})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(open_corpus(source(path=tmp_path / "a.jsonl")).documents) == texts


def test_a_row_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": ["two"]}\n')
    with pytest.raises(TextError, match=r"column=text: .* holds list there, not text"):
        list(open_corpus(source(path=tmp_path / "a.jsonl")).documents)


@pytest.mark.parametrize("write", [write_jsonl, write_json, write_parquet])
def test_a_dotted_column_is_a_key_of_an_object(tmp_path: Path, write: Callable[[Path, str], None]) -> None:
    file = tmp_path / ("a.parquet" if write is write_parquet else "a.json")
    if write is write_parquet:
        pyarrow.parquet.write_table(pyarrow.table({"id": [0, 1, 2], "meta": [{"text": text} for text in TEXTS]}), file)
    else:
        rows = [{"id": number, "meta": {"text": text}} for number, text in enumerate(TEXTS)]
        file.write_text(json.dumps(rows) if write is write_json else "\n".join(map(json.dumps, rows)))
    assert list(open_corpus(source(path=file, column="meta.text")).documents) == TEXTS
    with pytest.raises(TextError, match=r"has no such column; it has (id, )?meta"):
        list(open_corpus(source(path=file, column="meta.body")).documents)


def test_a_json_array_may_take_several_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS], indent=2))
    assert list(open_corpus(source(path=tmp_path / "a.json")).documents) == TEXTS


def test_a_bad_line_of_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": \n')
    with pytest.raises(TextError, match=r"a\.jsonl: cannot be read as json \(line 3: Expecting value"):
        list(open_corpus(source(path=tmp_path / "a.jsonl")).documents)


def test_a_byte_that_is_not_utf8_is_found_in_a_compressed_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "Gr\xfc\xdfe"}\n'))
    with pytest.raises(TextError, match="is not UTF-8: byte 0xfc at offset 28"):
        list(open_corpus(source(path=tmp_path / "a.jsonl.gz")).documents)


def test_a_table_without_header_gets_a_short_message(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text(",".join(f"{number} words" * 50 for number in range(20)) + "\n" + ",".join("x" * 20) + "\n")
    with pytest.raises(TextError, match=r"and 12 more$") as refused:
        list(open_corpus(source(path=file)).documents)
    assert len(str(refused.value)) < 600
