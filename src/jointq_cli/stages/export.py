"""A quantised model in the layout of a runtime: written from its stored weights, and read back to verify it."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jointq_cli.errors import ConfigError, ModelError
from jointq_cli.formats.base import StoredWeight
from jointq_cli.formats.export import Exporter, QuantizedModel
from jointq_cli.formats.export.verification import verified
from jointq_cli.formats.layer_file import load_form, load_layer
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.quantizers.base import Quantizer
from jointq_cli.records import ExportRecord
from jointq_cli.stages.base import Context, Stage
from jointq_cli.stages.plan.costs import Workload
from jointq_cli.stages.quantize import Quantized, open_quantized
from jointq_cli.system.files import link_files
from jointq_cli.system.record_json import encode, load_record

FILES, RECORD = "files", "export.json"


@dataclass(frozen=True)
class Export:
    """The result of `export_stage`, opened."""

    stage: Stage
    exporter: Exporter
    files: Path
    record: ExportRecord


def export_stage(model: StreamedModel, layers: list[str], quantize: Stage, exporter: Exporter) -> Stage:
    """model: the one that the stage `quantize` quantises, in which `layers` are to be."""

    def make(scratch: Path, context: Context) -> None:
        quantized = open_quantized(context, quantize, layers)

        def write() -> None:
            (scratch / FILES).mkdir()
            source = quantized_model(model, quantized.checkpoint, layers, quantized.codes)
            record = write_export(source, exporter, scratch / FILES)
            (scratch / RECORD).write_text(encode(record), encoding="utf-8")

        context.team.on_rank0(write)

    return Stage(
        name=f"export {exporter.label}",
        kind="export",
        spec={"format": exporter.format, "settings": exporter},
        inputs=(quantize.key,),
        make=make,
        cost=Workload.export,
        together=True,
    )


def export_all(
    context: Context, model: StreamedModel, quantized: Quantized, exporters: Iterable[Exporter]
) -> tuple[list[Export], list[str]]:
    """The exports, and why others could not be written: for some formats only the weights show it, after hours."""
    layers = [layer.name for layer in quantized.layers]
    found, failures = [], []
    for exporter in exporters:
        try:
            found.append(_export(context, export_stage(model, layers, quantized.stage, exporter), exporter))
        except (ConfigError, ModelError) as error:
            if context.team.size > 1:  # the other processes have stopped
                raise
            failures.append(f"not exported: {error}")
            context.console.warn(failures[-1])
    return found, failures


def _export(context: Context, stage: Stage, exporter: Exporter) -> Export:
    directory = context.run(stage).path
    return Export(stage, exporter, directory / FILES, load_record(ExportRecord, directory / RECORD))


def link_exports(exports: Sequence[Export], directory: Path) -> None:
    """Makes `directory` hold these exports, each in a directory of its own, and none of an earlier run."""
    current = {export.record.format for export in exports}
    for old in directory.glob("*"):
        if not old.is_dir():  # such as .DS_Store
            old.unlink()
        elif old.name not in current:
            shutil.rmtree(old)
    for export in exports:
        link_files(export.files, directory / export.record.format)
    if not exports and directory.is_dir():
        directory.rmdir()


def write_export(source: QuantizedModel, exporter: Exporter, directory: Path) -> ExportRecord:
    """Writes into an empty directory and verifies it. Raises ConfigError and ModelError as exporters do."""
    warnings = exporter.check(source)
    exporter.write(source, directory)
    return replace(verified(source, exporter, directory), warnings=warnings)


def quantized_model(model: StreamedModel, result: Checkpoint, layers: Iterable[str], codes: Path) -> QuantizedModel:
    """A finished model. model: it, or the one that it was quantised from. codes: directory of its layer files."""
    files = {own_tensor(model, layer): codes / f"{layer}.safetensors" for layer in layers}
    forms = {name: load_form(file) for name, file in files.items()}
    return QuantizedModel(result, forms, _linear(model), lambda name: load_layer(files[name]), _transposed(model))


def model_to_quantize(model: StreamedModel, layers: Mapping[str, Quantizer]) -> QuantizedModel:
    """What a model will be once these layers are quantised, each by its quantizer; exporters check it before any
    work."""
    linear = model.linear_layers()
    dtype = model.checkpoint.dtype
    forms = {
        own_tensor(model, layer): quantizer.storage(linear[layer].out_features, linear[layer].in_features, dtype)
        for layer, quantizer in layers.items()
    }

    def load(name: str) -> StoredWeight:
        raise AssertionError(f"{name}: is not quantised yet")

    return QuantizedModel(model.checkpoint, forms, _linear(model), load, _transposed(model))


def check_exports(
    exporters: Iterable[Exporter], model: QuantizedModel, online: Sequence[str], simulated: str
) -> list[str]:
    """Warnings. online: rotations that the model must apply at run time. simulated: what is quantised besides weights,
    "" for nothing. Raises ConfigError where a format cannot hold the model."""
    warnings = []
    for exporter in exporters:
        word = f"export={exporter.format}"
        if online:
            raise ConfigError(
                f"{word}: {online[0]} needs a Hadamard product at run time, which no format here can say; "
                "rotation.r4=false"
            )
        if name := next((name for name in model.forms if name in model.transposed), None):
            raise ConfigError(f"{word}: {name} is stored as (in, out), which packed formats do not know")
        warnings += exporter.check(model)
        if simulated:
            warnings.append(f"{word}: holds the weights alone; the runtime does not quantise activations ({simulated})")
    return warnings


def _transposed(model: StreamedModel) -> list[str]:
    return [own_tensor(model, name) for name, layer in model.linear_layers().items() if layer.is_transposed]


def own_tensor(model: StreamedModel, layer: str) -> str:
    """The stored name of a layer's weight. Raises ConfigError for a layer without a tensor of its own."""
    location = model.location(f"{layer}.weight")
    if location.whole is None:
        raise ConfigError(
            f"export: {layer} has no tensor of its own (it is in {', '.join(location.tensors)}), and packed formats "
            "have one for each layer; export=none"
        )
    return location.whole


def _linear(model: StreamedModel) -> list[str]:
    names = (f"{layer}.weight" for layer in model.linear_layers())
    return [whole for name in names if model.stores(name) and (whole := model.location(name).whole)]
