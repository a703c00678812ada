"""Further exports of a finished run, from the files in its directory instead of the store."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from jointq_cli.data.tokenizer import load_tokenizer
from jointq_cli.errors import JointqError, ModelError
from jointq_cli.evaluation.windows import Evaluation
from jointq_cli.formats.export import Exporter, QuantizedModel
from jointq_cli.formats.export.imatrix import FILE, FORMAT, write_imatrix
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.importance import load_importance
from jointq_cli.records import EngineCheck, ExportRecord, RunReport
from jointq_cli.report import Console, load_report, write_report
from jointq_cli.report.finished_run import read_finished_run
from jointq_cli.stages.engine_check import WINDOWS, check_in_engine, failed_check, is_checked
from jointq_cli.stages.export import check_exports, own_tensor, quantized_model, write_export
from jointq_cli.stages.report import label_export
from jointq_cli.stages.tokens import evaluation_windows
from jointq_cli.system.files import UNFINISHED, sync_tree, translated_disk_errors
from jointq_cli.system.run_directory import RunDirectory


@dataclass(frozen=True)
class FinishedModel:
    """The quantised model of a run directory and the run's report."""

    run: RunDirectory
    report: RunReport
    streamed: StreamedModel  # in float32
    model: QuantizedModel

    def check(self, exporters: Sequence[Exporter]) -> list[str]:
        """As `check_exports`."""
        online = self.report.rotation.online if self.report.rotation else []
        simulated = self.report.simulation.activations if self.report.simulation else ""
        return check_exports(exporters, self.model, online, simulated)


def open_finished(directory: Path, device: torch.device) -> FinishedModel:
    """Reads no weight. Raises JointqError, which names what is missing or was changed after the run."""
    finished = read_finished_run(directory)
    run = RunDirectory(directory)
    layers = [layer.name for layer in finished.report.layers]
    missing = [name for name in layers if not (run.codes / f"{name}.safetensors").is_file()]
    if missing:
        raise JointqError(f"{run.codes}: lacks {missing[0]}.safetensors, and an export is packed from the codes")
    checkpoint = Checkpoint(run.checkpoint)
    code = finished.settings.get("model.trust_remote_code") == "true"
    model = StreamedModel(checkpoint, device, torch.float32, code)
    return FinishedModel(run, finished.report, model, quantized_model(model, checkpoint, layers, run.codes))


def refuse_existing(place: Path) -> None:
    if os.path.lexists(place):
        raise JointqError(f"{place}: exists, and an export overwrites nothing; delete it, or name another: output=DIR")


def export_finished(
    finished: FinishedModel, exporter: Exporter, place: Path, console: Console, *, listed: bool
) -> ExportRecord:
    """Writes an export and tries it in its engine. listed: whether the run's report is to list it, which it does before
    the check, since that may be interrupted."""
    with console.stage(f"export {exporter.label}"):
        record = _write(finished, exporter, place)
    if listed:
        _list(finished.run, record)
    if not is_checked(exporter, finished.model):
        return record
    with console.stage(f"check in {exporter.engine}"):
        record = replace(record, check=_check(finished, exporter, place))
    label_export(place, finished.report, record)
    if listed:
        _list(finished.run, record)
    return record


def export_imatrix(finished: FinishedModel, place: Path, console: Console) -> None:
    """Writes llama.cpp's importance matrix, of the statistics that the run has solved its layers with, into a new
    directory. Raises JointqError where the run has none, ConfigError as `write_imatrix`."""
    run, layers = finished.run, finished.report.layers
    kept = load_importance(run.importance)
    if missing := [layer.name for layer in layers if layer.name not in kept.mean_squares]:
        raise JointqError(
            f"{run.importance}: has no statistics of {missing[0]}; a run of before export knew format=imatrix kept "
            "none, and has to be repeated"
        )
    model = finished.streamed
    means = {own_tensor(model, layer.name): kept.mean_squares[layer.name] for layer in layers}
    with console.stage(f"export {FORMAT}"), _written(place) as scratch:
        text = finished.report.calibration
        write_imatrix(scratch / FILE, model.checkpoint.directory, means, text, kept.windows, kept.seqlen)
    console.note(f"importance of {len(means)} weights -> {place / FILE}; llama-quantize --imatrix {FILE} ...")


@contextmanager
def _written(place: Path) -> Iterator[Path]:
    """An empty directory to fill, which is renamed to `place` at the end."""
    scratch = place.with_name(f".{place.name}{UNFINISHED}")
    with translated_disk_errors(place):
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
        scratch.mkdir(parents=True)
        try:
            yield scratch
            sync_tree(scratch)
            os.replace(scratch, place)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _write(finished: FinishedModel, exporter: Exporter, place: Path) -> ExportRecord:
    """Writes, verifies and labels an export; `place` exists once it is complete."""
    with _written(place) as scratch:
        record = write_export(finished.model, exporter, scratch)
        label_export(scratch, finished.report, record)
    return record


def _check(finished: FinishedModel, exporter: Exporter, place: Path) -> EngineCheck:
    """Tries an export in its engine, on text that comes with Python, since that of the run may be far away."""
    model = finished.streamed
    tokenizer = load_tokenizer(model.checkpoint.directory, model.trust_remote_code)
    windows = evaluation_windows(Evaluation(max_windows=WINDOWS), tokenizer)
    try:
        return check_in_engine(exporter, place, model, tokenizer, windows)
    except ModelError as error:
        return failed_check(exporter, error)


def _list(run: RunDirectory, record: ExportRecord) -> None:
    """Writes the run's report again, with this export."""
    report = load_report(run.report_json)
    others = [other for other in report.exports if other.format != record.format]
    write_report(replace(report, exports=[*others, record]), run)
