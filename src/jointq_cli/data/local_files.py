"""Text in local files: plain text, JSON, CSV and Parquet, read in place, without a cache or a network connection."""

import csv
import glob
import gzip
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Final

from jointq_cli.data.hub import _datasets
from jointq_cli.data.text import COLUMN, HUB, Corpus, TextSource, cell_text, one_line
from jointq_cli.errors import TextError

PLAIN: Final = (".txt", ".raw", ".md")
TABLES: Final = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def local_corpus(source: TextSource) -> Corpus:
    """The files that `source.path` names, opened. Raises TextError for a path without files and an unknown suffix."""
    files = _files(source)
    readers = [_reader(source, file) for file in files]
    # File names without folders: the same file elsewhere is the same text.
    provenance = source.provenance(revision="local", files=" ".join(file.name for file in files))
    texts = chain.from_iterable(reader(source, file) for reader, file in zip(readers, files, strict=True))
    hub = HUB.get(source.dataset)
    if hub is None:
        return Corpus(texts, provenance)
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


def _reader(source: TextSource, file: Path) -> Callable[[TextSource, Path], Iterator[str]]:
    suffix = _suffix(file)
    if suffix in PLAIN:
        return _wikitext_rows if source.dataset == "wikitext2" else _whole_file
    if suffix in TABLES:
        return _table_rows
    known = ", ".join((*PLAIN, *TABLES))
    raise _bad(source, file, f"unknown kind of file {suffix!r}: must be one of {known}")


def _suffix(file: Path) -> str:
    """The suffix in lower case; the one before .gz for kinds of file that may be compressed."""
    outer, inner = file.suffix.lower(), Path(file.stem).suffix.lower()
    return inner if outer == ".gz" and inner in (".jsonl", ".json", ".csv") else outer


def _whole_file(source: TextSource, file: Path) -> Iterator[str]:
    yield _decoded(source, file)


def _wikitext_rows(source: TextSource, file: Path) -> Iterator[str]:
    """The rows that the hub has of the raw file: lines with their newline, blank ones as empty strings."""
    lines = _decoded(source, file).split("\n")
    for line in lines[:-1]:
        yield line + "\n" if line.strip() else ""
    if lines[-1].strip():
        yield lines[-1]


def _decoded(source: TextSource, file: Path) -> str:
    """The file's text, without a byte order mark and with Unix line ends."""
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(source, file, error) from error
    except OSError as error:
        raise _bad(source, file, f"cannot be read ({error.strerror})") from error
    if not text.strip("\ufeff \t\r\n"):
        raise _bad(source, file, "is empty")
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _table_rows(source: TextSource, file: Path) -> Iterator[str]:
    """The texts of one column; rows without text are skipped."""
    if file.stat().st_size == 0:
        raise _bad(source, file, "is empty")
    has_text = False
    for row in _rows(source, file):
        text = cell_text(source, row, file)
        if text.strip():
            has_text = True
            yield text
    if not has_text:
        raise _bad(source, file, f"is empty: no row has text in column {source.column or COLUMN!r}")


def _rows(source: TextSource, file: Path) -> Iterator[dict[str, Any]]:
    kind = TABLES[_suffix(file)]
    try:
        yield from _csv_rows(file) if kind == "csv" else _typed_rows(kind, file)
    # csv, gzip, pyarrow and datasets each have their own exceptions for a damaged file.
    except Exception as error:
        _refuse_non_utf8(source, file, error)
        raise _bad(source, file, f"cannot be read as {kind} ({one_line(error)})") from error


def _typed_rows(kind: str, file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a json or parquet file."""
    # Offline, since `datasets` reports even the reading of a local file to a counter in the network.
    with _datasets(offline=True) as datasets, tempfile.TemporaryDirectory() as cache:
        name = glob.escape(str(file))
        yield from datasets.load_dataset(kind, data_files=name, split="train", streaming=True, cache_dir=cache)


def _csv_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a csv file, all cells text: `datasets` would turn the texts 12 and NA into numbers."""
    opener = gzip.open if file.suffix.lower() == ".gz" else open
    limit = csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than many a document
    try:
        with opener(file, "rt", encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            for row in reader:
                if None in row:
                    raise csv.Error(f"line {reader.line_num} has more cells than the header")
                yield row
    finally:
        csv.field_size_limit(limit)


def _refuse_non_utf8(source: TextSource, file: Path, cause: Exception) -> None:
    if file.suffix.lower() in (".parquet", ".gz"):
        return
    try:
        file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(source, file, error) from cause


def _bad(source: TextSource, file: Path, rule: str) -> TextError:
    return TextError(f"{source.section}.path={file}: {rule}")


def _not_utf8(source: TextSource, file: Path, error: UnicodeDecodeError) -> TextError:
    byte = f"0x{error.object[error.start]:02x}"
    return _bad(source, file, f"is not UTF-8: byte {byte} at offset {error.start}")
