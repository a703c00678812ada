"""Records as JSON files. msgspec decodes and checks them against their dataclasses; nothing here knows what they mean.

JSON has no NaN and no infinities; floats with these values become the strings "nan", "inf", "-inf".
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec

from jointq_cli import __version__
from jointq_cli.errors import JointqError
from jointq_cli.records import RunReport


def encode(record: Any) -> str:
    """A record, or a list of records, as indented JSON. Raises TypeError for values that JSON cannot represent."""
    return json.dumps(_plain(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def load_report(path: Path) -> RunReport:
    """Reads report.json. Raises JointqError, as `load_record` does."""
    return cast(RunReport, load_record(RunReport, path))


def load_record(kind: Any, path: Path) -> Any:
    """Reads a file that `encode` wrote; kind: the dataclass, or list[DATACLASS].

    Keys that `kind` does not have are of a later version, and are left out. Raises JointqError when the file is missing
    or not JSON, for a missing key without a default, and for a value of another type than its field.
    """
    try:
        content = path.read_bytes()
        found = msgspec.json.decode(content, type=kind, strict=False)  # not strict: the string "nan" is a float
        if place := next(_misread(msgspec.json.decode(content), _plain(found)), None):
            raise msgspec.ValidationError(f"Expected a number, got text - at `{place}`")
        return found
    except OSError as error:
        raise JointqError(f"{path}: cannot be read ({error.strerror})") from error
    except msgspec.ValidationError as error:
        raise JointqError(f"{path}: not readable by jointq {__version__}{_writer(content)}: {error}") from None
    except msgspec.DecodeError as error:
        raise JointqError(f"{path}: not valid JSON ({error})") from error


def _misread(given: Any, found: Any, place: str = "$") -> Iterator[str]:
    """Where texts have been read as numbers, "3" as 3, but for those that `encode` writes."""
    if isinstance(given, dict):
        for key in (key for key in given if key in found):
            yield from _misread(given[key], found[key], f"{place}.{key}")
    elif isinstance(given, list):
        for at, pair in enumerate(zip(given, found, strict=True)):
            yield from _misread(*pair, f"{place}[{at}]")
    elif isinstance(given, str) and given != found:
        yield place


def _writer(content: bytes) -> str:
    """Which version has written a record, where it says so."""
    found = msgspec.json.decode(content)
    versions = found.get("versions") if isinstance(found, dict) else None
    writer = versions.get("jointq") if isinstance(versions, dict) else None
    return f" (jointq {writer} wrote it)" if writer else ""


def _plain(value: Any) -> Any:
    """With dictionaries for dataclasses, and strings for floats that are not finite."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
