"""Reports as JSON, strict in both directions. Knows dataclasses, not what they mean.

JSON has no NaN and no infinities; floats with these values become the strings "nan", "inf", "-inf".
"""

import dataclasses
import json
import math
import types
from pathlib import Path
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from jointq_cli import __version__
from jointq_cli.errors import JointqError
from jointq_cli.records import RunReport

NOT_FINITE = ("nan", "inf", "-inf")


def encode(record: Any) -> str:
    """A record, or a list of records, as indented JSON. Raises TypeError for values that JSON cannot represent."""
    return json.dumps(_plain(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def load_report(path: Path) -> RunReport:
    """Reads report.json. Raises JointqError, as `load_record` does."""
    return cast(RunReport, load_record(RunReport, path))


def load_record(kind: Any, path: Path) -> Any:
    """Reads a file that `encode` wrote; kind: the dataclass, or list[DATACLASS].

    Raises JointqError when the file is missing or not JSON, and for the first key that is unknown, missing without a
    default, or of another type than its field.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise JointqError(f"{path}: cannot be read ({error.strerror})") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise JointqError(f"{path}: not valid JSON ({error})") from error
    try:
        return _decode(kind, value, "")
    except _Mismatch as mismatch:
        raise JointqError(f"{path}: not a report of this version{_writer(value)}: {mismatch}") from None


class _Mismatch(Exception):
    """A JSON value that does not fit the field's type."""


def _writer(value: Any) -> str:
    """Which version has written a report, where it says so."""
    versions = value.get("versions") if isinstance(value, dict) else None
    writer = versions.get("jointq") if isinstance(versions, dict) else None
    return f" ({__version__}; jointq {writer} wrote it)" if writer else ""


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


def _decode(kind: Any, value: Any, where: str) -> Any:
    """`value` as type `kind`: a dataclass, list, dict, optional or plain type. where: the path of keys, for errors."""
    if dataclasses.is_dataclass(kind):
        return _decode_record(cast(type[Any], kind), value, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is list:
        items = _checked(list, value, where)
        return [_decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(items)]
    if origin is dict:
        entries = _checked(dict, value, where)
        return {key: _decode(arguments[1], item, f"{where}.{key}") for key, item in entries.items()}
    if origin in (Union, types.UnionType):
        kinds = [argument for argument in arguments if argument is not type(None)]
        return None if value is None and len(kinds) < len(arguments) else _decode(kinds[0], value, where)
    if kind is Any:
        return value
    if kind is float and (value in NOT_FINITE or (isinstance(value, int) and not isinstance(value, bool))):
        return float(value)
    return _checked(kind, value, where)


def _decode_record(kind: type[Any], value: Any, where: str) -> Any:
    entries = _checked(dict, value, where)
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    defaults = [field.name for field in dataclasses.fields(kind) if _has_default(field)]
    prefix = f"{where}." if where else ""
    for name in entries:
        if name not in names:
            raise _Mismatch(f"unknown key {prefix}{name}")
    for name in names:
        if name not in entries and name not in defaults:
            raise _Mismatch(f"missing key {prefix}{name}")
    return kind(**{name: _decode(hints[name], entries[name], f"{prefix}{name}") for name in names if name in entries})


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _checked(kind: type, value: Any, where: str) -> Any:
    # Python counts bool as an int; JSON does not.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _Mismatch(f"{where or 'the file'} must be {kind.__name__}, not {type(value).__name__}")
    return value
