"""The model card (README.md with a YAML head) of a checkpoint and of an export, as the Hugging Face hub shows it."""

from collections.abc import Mapping, Sequence

import yaml

from jointq_cli.models.identity import base_model
from jointq_cli.records import ExportRecord, RotationRecord, RunReport
from jointq_cli.report import summary
from jointq_cli.report.measured import figures
from jointq_cli.report.pages.markdown import environment, inline

PROJECT = "jointq"
LIBRARIES = ("gguf", "mlx")  # formats that are a library of the hub; all others are loaded by transformers
LOAD = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")  # this directory, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(".")
```"""
LOAD_ONLINE = """\
```sh
jointq evaluate model.path=.  # transformers does not run the rotation that the model needs online
```"""


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


def checkpoint_card(report: RunReport) -> str:
    """Of the dequantised checkpoint."""
    online = report.rotation is not None and report.rotation.online
    return model_card(report, [LOAD_ONLINE if online else LOAD])


def export_card(report: RunReport, record: ExportRecord) -> str:
    """Of a packed checkpoint: the commands that serve it, and how exactly it holds the weights."""
    library = next((name for name in LIBRARIES if record.format.startswith(name)), "transformers")
    exact = f"Packed as {record.format}: {summary.export_line(record)}. The figures above are the checkpoint's."
    notes = [f"- {inline(warning)}" for warning in record.warnings]
    usage = [exact, *(["\n".join(notes)] if notes else []), *([shell(record.commands)] if record.commands else [])]
    return model_card(report, usage, library, [record.format])


def shell(commands: Mapping[str, str]) -> str:
    """Commands by the runtime that they start, as a block of code."""
    lines = [line for runtime, command in commands.items() for line in (f"# {runtime}", command)]
    return "\n".join(["```sh", *lines, "```"])


def model_card(report: RunReport, usage: Sequence[str], library: str = "transformers", tags: Sequence[str] = ()) -> str:
    """usage: paragraphs in Markdown on how the files are loaded. library: the hub's name for what loads them."""
    origin = identity(report)
    bits = sorted({layer.bits for layer in report.layers if layer.bits})
    measured = {name: figure.value for name, figure in figures(report).items() if not name.endswith("_bytes")}
    head = {
        "base_model": origin["base_model"],
        "base_model_relation": "quantized",
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": [PROJECT, *tags, *(f"{count}-bit" for count in bits)],
        PROJECT: {
            **origin,
            "protocol": report.protocol.line(),
            "figures": {name: float(f"{value:.6g}") for name, value in measured.items()},
        },
    }
    text = yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=1000)
    template = environment(escape=False).get_template("model_card.md.jinja")
    return template.render(head=text, origin=origin, report=report, summary=summary, usage=usage)
