"""The model card (README.md with a YAML head) of a checkpoint and of an export, as the Hugging Face hub shows it."""

import yaml

from jointq_cli.models.identity import base_model
from jointq_cli.records import ExportRecord, RotationRecord, RunReport
from jointq_cli.report import summary
from jointq_cli.report.measured import figures
from jointq_cli.report.pages.documents import template

PROJECT = "jointq"
LIBRARIES = ("gguf", "mlx")  # formats that are a library of the hub; all others are loaded by transformers


def identity(report: RunReport) -> dict[str, str]:
    """What a checkpoint says of its origin; the same for the same run, whenever, wherever and of whatever path."""
    found = {
        "version": report.versions.get(PROJECT, ""),
        "base_model": report.base_model or base_model(report.model, {}),
        "recipe": report.recipe,
        "quantizer": report.quantizer,
        "calibration": report.calibration,
    }
    return found if report.rotation is None else found | rotation_identity(report.rotation)


def rotation_identity(record: RotationRecord) -> dict[str, str]:
    parts = {"smoothing": record.smoothing, "rotation": record.rotation}
    return {name: text for name, text in parts.items() if text}


def model_card(report: RunReport, export: ExportRecord | None = None) -> str:
    """Of a packed checkpoint, with the commands that serve it, or of the dequantised one."""
    origin = identity(report)
    formats = [export.format] if export else []
    bits = sorted({layer.bits for layer in report.layers if layer.bits})
    measured = {name: figure.value for name, figure in figures(report).items() if not name.endswith("_bytes")}
    head = {
        "base_model": origin["base_model"],
        "base_model_relation": "quantized",
        "library_name": next((name for name in LIBRARIES if "".join(formats).startswith(name)), "transformers"),
        "pipeline_tag": "text-generation",
        "tags": [PROJECT, *formats, *(f"{count}-bit" for count in bits)],
        PROJECT: {
            **origin,
            "protocol": report.protocol.line(),
            "figures": {name: float(f"{value:.6g}") for name, value in measured.items()},
        },
    }
    text = yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=1000)
    card = template("model_card.md.jinja")
    return card.render(head=text, origin=origin, report=report, summary=summary, export=export)
