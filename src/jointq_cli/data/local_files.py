"""Text in local files: plain text, JSON, CSV and Parquet, read in place and row by row, without the network."""

import csv
import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any, Final, cast

from jointq_cli.data.chat import Document
from jointq_cli.data.text import (
    COLUMN,
    HUB,
    Corpus,
    TextSource,
    column_names,
    columns,
    has_column,
    one_line,
    row_document,
)
from jointq_cli.errors import TextError

PLAIN: Final = (".txt", ".raw", ".md")
TABLES: Final = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"}
PARQUET: Final = ".parquet"
COMPRESSED: Final = (".gz", ".zst")  # after the suffix of a plain file or a table, but Parquet compresses itself
READ_ERRORS: Final = (OSError, EOFError, ValueError, RecursionError, zlib.error, csv.Error)


def local_corpus(source: TextSource) -> Corpus:
    """The files that `source.path` names, opened. Raises TextError for a path without files and an unknown suffix."""
    files = _files(source)
    readers = [_reader(source, file) for file in files]
    # File names without folders: the same file elsewhere is the same text.
    provenance = source.provenance(revision="local", files=" ".join(file.name for file in files))
    texts = chain.from_iterable(reader(source, file) for reader, file in zip(readers, files, strict=True))
    hub = HUB.get(source.dataset)
    if hub is None:
        return Corpus(texts, provenance, column=f"{source.section}.column={source.column or COLUMN}")
    return Corpus(texts, provenance, hub.running, hub.joint, evaluated=hub.evaluated)


def _files(source: TextSource) -> list[Path]:
    named = Path(source.path or "").expanduser()
    if named.is_file():
        return [named]
    if named.is_dir():
        raise _bad(source, named, f"is a directory; name its files, such as {named}/*.txt")
    found = sorted(path for name in glob.glob(str(named), recursive=True) if (path := Path(name)).is_file())
    if not found:
        raise _bad(source, named, "no file matches" if glob.has_magic(str(named)) else "no such file")
    return found


def _reader(source: TextSource, file: Path) -> Callable[[TextSource, Path], Iterator[Document]]:
    suffix = _suffix(file)
    if suffix in PLAIN:
        return _wikitext_rows if source.dataset == "wikitext2" else _whole_file
    if suffix in TABLES or suffix == PARQUET:
        return _table_rows
    known = ", ".join((*PLAIN, *TABLES, PARQUET))
    raise _bad(source, file, f"unknown kind of file {suffix!r}: must be one of {known}")


def _suffix(file: Path) -> str:
    """The suffix in lower case; the one before .gz or .zst for kinds of file that may be compressed."""
    outer, inner = file.suffix.lower(), Path(file.stem).suffix.lower()
    return inner if outer in COMPRESSED and (inner in PLAIN or inner in TABLES) else outer


def _open(file: Path) -> IO[bytes]:
    """The uncompressed bytes of a file."""
    if file.suffix.lower() == ".gz":
        return cast(IO[bytes], gzip.open(file, "rb"))
    if file.suffix.lower() == ".zst":
        import pyarrow  # late: it takes a third of a second to import

        return cast(IO[bytes], pyarrow.input_stream(str(file), compression="zstd"))
    return file.open("rb")


def _whole_file(source: TextSource, file: Path) -> Iterator[Document]:
    yield _decoded(source, file)


def _wikitext_rows(source: TextSource, file: Path) -> Iterator[Document]:
    """The rows that the hub has of the raw file: lines with their newline, blank ones as empty strings."""
    lines = _decoded(source, file).split("\n")
    for line in lines[:-1]:
        yield line + "\n" if line.strip() else ""
    if lines[-1].strip():
        yield lines[-1]


def _decoded(source: TextSource, file: Path) -> str:
    """The file's text, without a byte order mark and with Unix line ends."""
    try:
        with _open(file) as stream:
            text = stream.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad(source, file, f"is not UTF-8: {_byte(error, 0)}") from error
    except READ_ERRORS as error:
        raise _bad(source, file, f"cannot be read ({one_line(error)})") from error
    if not text.strip("\ufeff \t\r\n"):
        raise _bad(source, file, "is empty")
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _table_rows(source: TextSource, file: Path) -> Iterator[Document]:
    """The texts or conversations of one column; rows without the column, or without text in it, are skipped."""
    if file.stat().st_size == 0:
        raise _bad(source, file, "is empty")
    names: dict[str, None] = {}
    is_found = has_text = False
    for row in _rows(source, file):
        if not all(has_column(row, column) for column in columns(source)):
            names.update(dict.fromkeys(column_names(row)))
            continue
        is_found = True
        document = row_document(source, row, file)
        if document.strip() if isinstance(document, str) else document:
            has_text = True
            yield document
    if names and not is_found:
        row_document(source, names, file)  # raises: none of the rows has the column
    if not has_text:
        raise _bad(source, file, f"is empty: no row has text in column {source.column or COLUMN!r}")


def _rows(source: TextSource, file: Path) -> Iterator[dict[str, Any]]:
    suffix = _suffix(file)
    kind = TABLES.get(suffix, "parquet")
    try:
        if kind == "parquet":
            yield from _parquet_rows(file, columns(source))
        else:
            with io.TextIOWrapper(_open(file), encoding="utf-8-sig", newline="" if kind == "csv" else "\n") as lines:
                yield from _json_rows(lines) if kind == "json" else _csv_rows(lines, "\t" if suffix == ".tsv" else ",")
    except UnicodeDecodeError as error:
        raise _bad(source, file, f"is not UTF-8: {_first_bad_byte(file)}") from error
    except READ_ERRORS as error:
        raise _bad(source, file, f"cannot be read as {kind} ({one_line(error)})") from error


def _json_rows(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The objects of JSON Lines, or of a single JSON array of objects. Raises ValueError."""
    first = next((line for line in lines if line.strip()), "")
    try:
        value = json.loads(first)
    except ValueError:  # an array over several lines, or damaged
        value = json.loads(first + "".join(lines))
    yield from (_object(row, number) for number, row in enumerate(value if isinstance(value, list) else [value], 1))
    for number, line in enumerate(lines, 2):
        if line.strip():
            yield _object(_line_value(line, number), number)


def _line_value(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error


def _object(row: Any, number: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"row {number} is a {type(row).__name__}, not an object")
    return row


def _csv_rows(lines: Iterator[str], delimiter: str) -> Iterator[dict[str, Any]]:
    """The rows of a csv file; all cells are text."""
    with _unlimited_cells():
        reader = csv.DictReader(lines, strict=True, delimiter=delimiter)
        for row in reader:
            if None in row:
                raise csv.Error(f"line {reader.line_num} has more cells than the header")
            yield row


@contextmanager
def _unlimited_cells() -> Iterator[None]:
    limit = csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than many a document
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _parquet_rows(file: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Rows with these columns only; a row of empty cells if there is none of them. Raises ValueError."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as table:
        names = table.schema_arrow.names
        wanted = [name for name in names if any(name in (one, one.partition(".")[0]) for one in columns)]
        if not wanted:
            yield dict.fromkeys(names)
            return
        for batch in table.iter_batches(columns=wanted):
            yield from batch.to_pylist()


def _first_bad_byte(file: Path) -> str:
    offset = 0
    with _open(file) as lines:
        for line in lines:
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return _byte(error, offset)
            offset += len(line)
    return "at its end"


def _byte(error: UnicodeDecodeError, offset: int) -> str:
    return f"byte 0x{error.object[error.start]:02x} at offset {offset + error.start}"


def _bad(source: TextSource, file: Path, rule: str) -> TextError:
    return TextError(f"{source.section}.path={file}: {rule}")
