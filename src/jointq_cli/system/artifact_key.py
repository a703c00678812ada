"""The key of an artifact: a digest of everything that decides its content.

That is the kind of artifact, the types and values of the settings, the keys of what it is made from, and the code that
computes it. On which machine, how verbosely and into which directory a run computes is no part of a key.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from jointq_cli.system.code_version import code_version


def artifact_key(kind: str, spec: object, inputs: Sequence[str], *modules: str) -> str:
    """sha256, 64 hex digits, over the canonical JSON of its arguments and the sources that they name.

    spec: settings, as dataclasses, containers and plain values; TypeError for anything else. inputs: keys and content
    hashes of what the artifact is made from. modules: full names of those whose code makes it; the modules of the
    dataclasses in `spec` count too.
    """
    code = code_version({*modules, *_modules(spec)})
    identity = {"stage": kind, "spec": _canonical(spec), "inputs": list(inputs), "code": code}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _canonical(value: object) -> Any:
    """JSON that distinguishes what may compute differently: the type of a dataclass is part of it."""
    if _is_settings(value):
        return {"type": f"{type(value).__module__}.{type(value).__qualname__}", **_canonical(_fields(value))}
    if isinstance(value, dict):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a store key cannot hold a {type(value).__name__}")


def _modules(value: object) -> Iterator[str]:
    """Where the dataclasses in `value` are defined: their methods may compute."""
    if _is_settings(value):
        yield type(value).__module__
        value = _fields(value)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    for item in items:
        yield from _modules(item)


def _is_settings(value: object) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
