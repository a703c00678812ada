"""Where text comes from: the Python installation, local files or the Hugging Face hub; a string per document.

Knows file formats, hub repositories and how the field reads two of them. Knows no tokenizer, no windows and
no seeds. Local files are read in place: nothing is copied into a cache, and no connection is opened unless
the data set is one of the hub's and no `path` is given.
"""

import csv
import glob
import gzip
import hashlib
import platform
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from jointq_cli.data import pydoc as pydoc_text
from jointq_cli.errors import ConfigError, ResourceError, TextError
from jointq_cli.setting_rules import check, setting

PLAIN: Final = (".txt", ".raw", ".md")
TABLES: Final = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
COLUMN: Final = "text"
HUB_TIMEOUT: Final = 10.0  # seconds to wait for the hub's first answer


@dataclass(frozen=True)
class HubDataset:
    """A data set of the hub and the way in which the field turns it into one text for perplexity."""

    repository: str
    config: str
    splits: tuple[str, ...]
    streamed: bool  # too large to download: documents are fetched while they are read
    running: bool  # rows are the lines of one running text, blank ones included, rather than documents
    joint: str  # what stands between rows in an evaluation text
    evaluated: int | None  # how many documents make the evaluation text, None for all


# The evaluation texts are those of GPTQ (Frantar et al., ICLR 2023, datautils.py): WikiText-2's rows joined
# by a blank line; the first 1100 documents of C4 joined by a space.
HUB: Final = {
    "wikitext2": HubDataset(
        "Salesforce/wikitext", "wikitext-2-raw-v1", ("train", "validation", "test"), False, True, "\n\n", None
    ),
    "c4": HubDataset("allenai/c4", "en", ("train", "validation"), True, False, " ", 1100),
}
DATASETS: Final = ("pydoc", "text", *HUB)


@dataclass(frozen=True)
class TextSource:
    """Which text. The base of the recipe's `calibration` and `evaluation`.

    dataset: `pydoc` (the documentation that this Python installation carries), `text` (local files),
    `wikitext2` or `c4` (the hub; with `path` a local copy). path: a file or a glob. A .txt, .raw or .md file
    is one document; for wikitext2 it is the raw file with a row on each line. .jsonl, .json, .csv (these also
    as .gz) and .parquet have one document per row, in `column` (null: "text"). config and revision matter to
    the hub alone. split names a part of pydoc, wikitext2 or c4, and is a mere label for `text`.

    Raises ConfigError for a value that is none of these.
    """

    dataset: str = setting("pydoc", choices=DATASETS)
    path: str | None = setting(None, place=True)
    config: str | None = setting(None)
    split: str = setting("evaluation")
    column: str | None = setting(None)
    revision: str | None = setting(None, decides=False)  # the hash of the tokens decides

    def __post_init__(self) -> None:
        check(self, self.section)
        if self.dataset == "text" and not self.path:
            raise ConfigError(f"{self.section}.dataset=text: needs {self.section}.path=FILE")
        if self.dataset == "pydoc" and self.path:
            raise ConfigError(f"{self.section}.path={self.path}: pydoc reads no file; add {self.section}.dataset=text")
        if self.dataset != "text" and self.split not in self._splits:
            raise ConfigError(
                f"{self.section}.split={self.split}: must be one of {', '.join(self._splits)} "
                f"for {self.section}.dataset={self.dataset}"
            )

    @property
    def section(self) -> str:
        """The part of the recipe that this is, for messages: parts are named after their dataclasses."""
        return type(self).__name__.lower()

    @property
    def _splits(self) -> tuple[str, ...]:
        return HUB[self.dataset].splits if self.dataset in HUB else pydoc_text.SPLITS


@dataclass(frozen=True)
class Corpus:
    """An opened source. `documents` can be run through once, and is read only as far as it is run through."""

    documents: Iterator[str]
    origin: dict[str, str]  # provenance: dataset, split, revision; config or files where there are any
    running: bool = False  # documents are the lines of one running text: join them, do not separate them
    joint: str = "\n\n"  # what stands between documents in a running or an evaluation text
    streamed: bool = False  # practically endless
    evaluated: int | None = None  # how many documents make an evaluation text, None for all


def documents(source: TextSource) -> Iterator[str]:
    """The documents of `source`, fetched as they are taken. Raises what `read` and its `documents` raise."""
    return read(source).documents


def read(source: TextSource) -> Corpus:
    """Opens `source`.

    Raises TextError when a file is missing or of an unknown kind, or the hub has no such revision, and
    ResourceError when the hub cannot be reached. Running through `documents` raises TextError for a file that
    is empty, not UTF-8, damaged or without the column, and ResourceError when the connection breaks.
    """
    if source.path:
        return _local_corpus(source)
    if source.dataset == "pydoc":
        origin = _origin(source, revision=f"python {platform.python_version()}")
        return Corpus(iter(pydoc_text.topics(source.split)), origin)
    return _hub_corpus(source, HUB[source.dataset])


def text_hash(parts: list[str]) -> str:
    """sha256, 64 hex digits, of the documents with a blank line between them."""
    digest = hashlib.sha256()
    for number, part in enumerate(parts):
        # surrogatepass: JSON can spell a lone surrogate, which is no reason to lose the hash
        digest.update((("\n\n" if number else "") + part).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _origin(source: TextSource, **more: str) -> dict[str, str]:
    return {"dataset": source.dataset, "split": source.split, **more}


# --- local files


def _local_corpus(source: TextSource) -> Corpus:
    files = _files(source)
    readers = [_reader(source, file) for file in files]
    # File names without folders: the same file elsewhere is the same text.
    origin = _origin(source, revision="local", files=" ".join(file.name for file in files))
    texts = chain.from_iterable(reader(source, file) for reader, file in zip(readers, files, strict=True))
    hub = HUB.get(source.dataset)
    if hub is None:
        return Corpus(texts, origin)
    return Corpus(texts, origin, hub.running, hub.joint, evaluated=hub.evaluated)


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
    """The suffix in lower case; .gz is looked through where it can be read."""
    outer, inner = file.suffix.lower(), Path(file.stem).suffix.lower()
    return inner if outer == ".gz" and inner in (".jsonl", ".json", ".csv") else outer


def _whole_file(source: TextSource, file: Path) -> Iterator[str]:
    yield _decoded(source, file)


def _wikitext_rows(source: TextSource, file: Path) -> Iterator[str]:
    """The rows that the hub makes of the raw file: lines with their newline, blank ones as empty strings."""
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
    found = False
    for row in _rows(source, file):
        text = _cell(source, row, file)
        if text.strip():
            found = True
            yield text
    if not found:
        raise _bad(source, file, f"is empty: no row has text in column {source.column or COLUMN!r}")


def _rows(source: TextSource, file: Path) -> Iterator[dict[str, Any]]:
    kind = TABLES[_suffix(file)]
    try:
        yield from _csv_rows(file) if kind == "csv" else _typed_rows(kind, file)
    # csv, gzip, pyarrow and datasets each have their own exceptions for a damaged file.
    except Exception as error:
        _refuse_non_utf8(source, file, error)
        raise _bad(source, file, f"cannot be read as {kind} ({_one_line(error)})") from error


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


def _cell(source: TextSource, row: dict[str, Any], place: Path | None) -> str:
    column = source.column or COLUMN
    where = place if place is not None else source.dataset
    if column not in row:
        raise TextError(
            f"{source.section}.column={column}: {where} has no such column; it has {', '.join(map(str, row))}"
        )
    value = row[column]
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    raise TextError(f"{source.section}.column={column}: {where} holds {type(value).__name__} there, not text")


def _bad(source: TextSource, file: Path, rule: str) -> TextError:
    return TextError(f"{source.section}.path={file}: {rule}")


def _not_utf8(source: TextSource, file: Path, error: UnicodeDecodeError) -> TextError:
    byte = f"0x{error.object[error.start]:02x}"
    return _bad(source, file, f"is not UTF-8: byte {byte} at offset {error.start}")


# --- the hub


def _hub_corpus(source: TextSource, hub: HubDataset) -> Corpus:
    commit, trouble = _commit(source, hub)
    config = source.config or hub.config
    try:
        with _datasets(offline=commit is None) as datasets:
            table = datasets.load_dataset(
                hub.repository,
                config,
                split=source.split,
                revision=commit or source.revision,
                streaming=hub.streamed,
            )
    # The hub's client, its transport and datasets each have their own exceptions.
    except Exception as error:
        raise _unreachable(source, hub, trouble or error) from error
    revision = commit or _cached_commit(source, hub, table)
    origin = _origin(source, repository=hub.repository, config=config, revision=revision)
    texts = _hub_rows(source, hub, table)
    return Corpus(texts, origin, hub.running, hub.joint, hub.streamed, hub.evaluated)


def _commit(source: TextSource, hub: HubDataset) -> tuple[str | None, Exception | None]:
    """The commit that the revision stands for today; or None and why the hub cannot say.

    It is asked first because it fails at once, where `datasets` tries six times over 23 seconds.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return HfApi().dataset_info(hub.repository, revision=source.revision, timeout=HUB_TIMEOUT).sha, None
    except RevisionNotFoundError as error:
        raise TextError(
            f"{source.section}.revision={source.revision}: {hub.repository} has no such revision"
        ) from error
    # Which exceptions a failed connection gives depends on the hub client's transport and its version.
    except Exception as error:
        return None, error


def _cached_commit(source: TextSource, hub: HubDataset, table: Any) -> str:
    """The commit of a data set found in the local cache: `datasets` names its folder so."""
    folders = {Path(file["filename"]).parent.name for file in getattr(table, "cache_files", [])}
    commit = next((name for name in folders if re.fullmatch("[0-9a-f]{40}", name)), "unknown")
    asked = source.revision or ""
    if re.fullmatch("[0-9a-f]{7,40}", asked) and not commit.startswith(asked):
        raise ResourceError(
            f"{source.section}.revision={asked}: the hub cannot be reached, "
            f"and the cache holds {hub.repository} at {commit}"
        )
    return commit


def _hub_rows(source: TextSource, hub: HubDataset, table: Any) -> Iterator[str]:
    for row in _fetched(source, hub, table):
        text = _cell(source, row, None)
        if hub.running or text.strip():
            yield text


def _fetched(source: TextSource, hub: HubDataset, table: Any) -> Iterator[dict[str, Any]]:
    with _datasets():
        try:
            yield from table
        except Exception as error:  # as above
            raise _unreachable(source, hub, error) from error


def _unreachable(source: TextSource, hub: HubDataset, error: Exception) -> ResourceError:
    key = source.section
    tokens = f"{key}.tokens=FILE, " if hasattr(source, "tokens") else ""
    return ResourceError(
        f"{key}.dataset={source.dataset}: cannot fetch {hub.repository} from the Hugging Face hub "
        f"({_one_line(error)}); offline, give a local copy: {key}.path=FILE, {tokens}"
        f"or take {key}.dataset=pydoc {key}.split={key}"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


@contextmanager
def _datasets(offline: bool = False) -> Iterator[ModuleType]:
    """The `datasets` library, without its progress bars and its own error lines."""
    import datasets  # late, since it takes more than a second

    config, logging = datasets.config, datasets.logging
    was_offline, verbosity, quiet = (
        config.HF_HUB_OFFLINE,
        logging.get_verbosity(),
        datasets.are_progress_bars_disabled(),
    )
    config.HF_HUB_OFFLINE = was_offline or offline
    logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        config.HF_HUB_OFFLINE = was_offline
        logging.set_verbosity(verbosity)
        if not quiet:
            datasets.enable_progress_bars()
