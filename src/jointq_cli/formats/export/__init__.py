"""Packed checkpoints for the runtimes that serve models: an exporter for each format, by its name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jointq_cli.errors import ConfigError
from jointq_cli.formats.export.base import Exporter, QuantizedModel
from jointq_cli.formats.export.compressed_tensors import CompressedTensorsExporter
from jointq_cli.formats.export.gguf import GgufExporter
from jointq_cli.formats.export.gptq import GptqExporter
from jointq_cli.formats.export.imatrix import FORMAT as IMATRIX
from jointq_cli.formats.export.mlx import MlxExporter

EXPORTERS: dict[str, Any] = {
    exporter.format: exporter for exporter in (CompressedTensorsExporter, GptqExporter, GgufExporter, MlxExporter)
}

__all__ = ["EXPORTERS", "IMATRIX", "Exporter", "QuantizedModel", "exporter_of", "exporters_of"]


def exporter_of(word: str, settings: Mapping[str, str] | None = None) -> Exporter:
    """The exporter of a word such as "compressed-tensors" or "gguf:q4_0", where the first setting of the format stands
    after the colon. Raises ConfigError for an unknown format, setting or value."""
    name, _, first = word.partition(":")
    if name == IMATRIX:
        raise ConfigError(f"export={word}: holds no model; jointq export RUN format={IMATRIX} writes it afterwards")
    if name not in EXPORTERS:
        raise ConfigError(f"export={word}: no such format; there are {', '.join(EXPORTERS)}")
    kind = EXPORTERS[name]
    known = [field.name for field in dataclasses.fields(kind)]
    chosen = dict(settings or {})
    if first:
        if not known:
            raise ConfigError(f"export={word}: {name} has no types; export={name}")
        chosen.setdefault(known[0], first)
    unknown = next((key for key in chosen if key not in known), None)
    if unknown:
        raise ConfigError(f"{unknown}={chosen[unknown]}: {name} has no such setting; {_settings(known)}")
    exporter: Exporter = kind(**chosen)
    return exporter


def exporters_of(value: object) -> list[Exporter]:
    """Those of the setting `export`: null, a word or a list of words. Raises ConfigError."""
    words = [] if value is None else value if isinstance(value, list) else [value]
    found = [exporter_of(str(word)) for word in words]
    labels = [exporter.label for exporter in found]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ConfigError(f"export={value}: names {twice[0]} twice")
    return found


def _settings(known: list[str]) -> str:
    return f"it has {', '.join(known)}" if known else "it has none"
