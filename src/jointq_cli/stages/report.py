"""What a run shows before it begins and leaves when it has ended: header, report and manifest."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from jointq_cli import __version__
from jointq_cli.data.token_file import Tokens
from jointq_cli.evaluation.perplexity import compare, perplexity, protocol
from jointq_cli.evaluation.windows import ScoredWindows
from jointq_cli.formats.audit import audit
from jointq_cli.models.coverage import coverage
from jointq_cli.models.identity import base_model, result_hashes, write_identity
from jointq_cli.models.layer_selection import KEEP
from jointq_cli.models.sources import provenance
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.overrides import describe
from jointq_cli.quantization.quantizers.base import Quantizer
from jointq_cli.quantization.quantizers.jointq import JointQ
from jointq_cli.quantization.quantizers.uniform import UniformQuantizer
from jointq_cli.recipe import Recipe, RotateRecipe
from jointq_cli.records import Audit, ExportRecord, Generation, RotationRecord, RunReport, TaskRecord
from jointq_cli.report import write_report
from jointq_cli.report.console.final_summary import quantize_summary
from jointq_cli.report.limits import beyond
from jointq_cli.report.measured import figures
from jointq_cli.report.pages.model_card import identity, model_card, rotation_identity
from jointq_cli.stages.allocation import Allocated
from jointq_cli.stages.base import Context
from jointq_cli.stages.quantize import Quantized
from jointq_cli.stages.quantized_scores import QuantizedScores
from jointq_cli.stages.refine import RefinedModel
from jointq_cli.stages.rotate import Rotated
from jointq_cli.system.distributed import SINGLE_PROCESS, Team
from jointq_cli.system.files import link_files, write_text_atomically
from jointq_cli.system.machine import peak_memory, versions
from jointq_cli.system.run_directory import MODEL_CARD, RunDirectory, build_manifest, result_files

Header = list[tuple[str, str]]  # (label, value)


def header(
    recipe: Recipe, model: StreamedModel, tokens: Tokens | None, further: Header, team: Team = SINGLE_PROCESS
) -> Header:
    """What is computed, from what and on what; further: lines between calibration and device."""
    parameters = f"{model.checkpoint.parameters / 1e6:,.1f} M"
    basis = "; ".join(filter(None, [recipe.smoothing.describe(), recipe.rotation.describe()]))
    threads = f"{torch.get_num_threads()} threads"
    processes = threads if team.size == 1 else f"{team.size} processes of {threads}"
    lines = [
        ("recipe", recipe.name),
        ("model", f"{recipe.model.path} ({type(model.module).__name__}, {parameters})"),
        ("rotation", basis),
        ("calibration", _calibration(recipe, tokens)),
        *further,
        ("device", f"{model.device} {str(model.dtype).removeprefix('torch.')}, {processes}"),
    ]
    return [(label, value) for label, value in lines if value]


def quantization_lines(
    recipe: Recipe, layers: Mapping[str, Quantizer], model: StreamedModel, windows: ScoredWindows | None
) -> Header:
    """How the model is quantised and evaluated, for `header`."""
    return [
        ("quantizer", _quantizer(recipe, layers)),
        ("basis", _basis(recipe, layers)),
        ("allocation", recipe.allocation.describe()),
        ("refinement", recipe.refinement.describe()),
        ("simulated", recipe.activations.describe()),
        ("protocol", "" if windows is None else protocol(recipe.evaluation, windows, model.dtype).line()),
    ]


@dataclass(frozen=True)
class RunResults:
    """What the stages of `quantize` have found."""

    allocated: Allocated
    rotated: Rotated
    refined: RefinedModel
    measured: QuantizedScores
    exports: list[ExportRecord]
    failed_exports: list[str]
    generations: list[Generation]
    tasks: list[TaskRecord]


def finish_run(
    context: Context,
    run: RunDirectory,
    recipe: Recipe,
    original: StreamedModel,
    tokens: Tokens,
    windows: ScoredWindows,
    results: RunResults,
) -> RunReport:
    """Hashes and audits the results of `quantize`, and writes manifest and report. On rank 0 only."""
    rotated, refined, measured = results.rotated, results.refined, results.measured
    quantized = refined.quantized
    files = hash_results(context, run)
    audited = _audit(context, original, rotated, refined)
    scores = measured.scores
    report = RunReport(
        recipe=recipe.name,
        model=recipe.model.path,
        model_hash=original.checkpoint.content_hash,
        architecture=type(original.module).__name__,
        parameters=original.checkpoint.parameters,
        quantizer=_quantizer(recipe, results.allocated.layers),
        rotation=rotated.record,
        simulation=measured.simulation,
        calibration=_calibration(recipe, tokens),
        protocol=protocol(recipe.evaluation, windows, original.dtype),
        original=perplexity(scores.original_nll, scores.tokens),
        quantized=perplexity(scores.quantized_nll, scores.tokens),
        comparison=compare(scores),
        reload_check=measured.reload_check,
        audit=audited,
        bits_per_weight=_bits_per_weight(quantized),
        coverage=coverage(rotated.model, quantized.layers, audited.packed_bytes),
        layers=quantized.layers,
        blocks=quantized.blocks,
        stages=context.records,
        peak_memory=peak_memory(),
        versions=versions(),
        device=str(context.device),
        warnings=list(context.console.warnings),
        exports=results.exports,
        failed_exports=results.failed_exports,
        generations=results.generations,
        base_model=base_model(recipe.model.path, original.checkpoint.config),
        tasks=results.tasks,
        refinement=refined.record,
        allocation=results.allocated.record,
    )
    report = replace(report, beyond_limits=beyond(figures(report), recipe.limits.given))
    write_manifest(context, run, recipe, original, tokens, files, windows)
    write_report(report, run, page=not context.console.is_brief)  # of a sweep, jointq report --html draws what is read
    label_checkpoint(run.checkpoint, report)
    for record in results.exports:
        label_export(run.exports / record.format, report, record)
    context.console.show(quantize_summary(report, run.path))
    return report


def label_checkpoint(directory: Path, report: RunReport) -> None:
    """Writes into a quantised checkpoint what it is: model card and the key of config.json."""
    write_identity(directory, identity(report))
    write_text_atomically(directory / MODEL_CARD, model_card(report))


def label_export(directory: Path, report: RunReport, record: ExportRecord) -> None:
    """As `label_checkpoint`, for a packed checkpoint."""
    write_identity(directory, identity(report))
    write_text_atomically(directory / MODEL_CARD, model_card(report, record))


def label_rotated(directory: Path, recipe: RotateRecipe, original: StreamedModel, record: RotationRecord) -> None:
    """Writes into the config.json of a rotated checkpoint what it is."""
    name = base_model(recipe.model.path, original.checkpoint.config)
    origin = {"version": __version__, "base_model": name, "recipe": recipe.name}
    write_identity(directory, origin | rotation_identity(record))


def hash_results(context: Context, run: RunDirectory) -> dict[str, str]:
    """The sha256 of what a replay must reproduce, so that it can be compared even after the files are gone."""
    with context.timed("file hashes"):
        return result_hashes(run.path, result_files(run.path))


def write_manifest(
    context: Context,
    run: RunDirectory,
    recipe: Recipe,
    model: StreamedModel,
    tokens: Tokens,
    files: dict[str, str],
    windows: ScoredWindows | None = None,
) -> None:
    """files: of `hash_results`. windows: where the run has evaluated anything."""
    hashes = {"model": model.checkpoint.content_hash, "calibration tokens": tokens.hash}
    texts = {"calibration": tokens.provenance}
    if windows is not None:
        hashes["evaluation windows"] = windows.hash
        texts["evaluation"] = windows.provenance
    on_gpu = context.device.type == "cuda"
    manifest = build_manifest(
        command=sys.argv,
        device=str(context.device),
        threads=torch.get_num_threads(),
        processes=context.team.size,
        seeds=recipe.seeds,
        hashes=hashes,
        texts=texts,
        files=files,
        gpu=torch.cuda.get_device_name(context.device) if on_gpu else None,
        recipe_sha256=run.recipe_hash,
        model=provenance(recipe.model, model.checkpoint.directory),
    )
    run.write_manifest(manifest)


def link_rotation(rotated: Rotated, run: RunDirectory) -> None:
    """Puts the change of basis beside the model that was quantised in it."""
    if rotated.directory is not None:
        link_files(rotated.directory, run.rotation, "rotation.*")
        return
    for old in run.rotation.glob("rotation.*"):  # an earlier run into this directory may have left a rotation
        old.unlink()
    with suppress(OSError):  # missing, or not empty: then it holds files that are not ours
        run.rotation.rmdir()


def copy_map(allocated: Allocated, run: RunDirectory) -> None:
    """Leaves which layer has which candidate in the run directory, where a budget has decided that."""
    if allocated.file is not None:
        run.write(run.allocation, allocated.file.read_text(encoding="utf-8"))
    else:
        run.allocation.unlink(missing_ok=True)  # of an earlier run into this directory


def _audit(context: Context, original: StreamedModel, rotated: Rotated, refined: RefinedModel) -> Audit:
    """Of the checkpoint against the model that was quantised; sizes are compared with the original's, since a rotated
    model with untied embeddings is larger."""
    quantized = refined.quantized
    with context.timed("audit"):
        audited = audit(rotated.model, quantized.checkpoint, quantized.layers, quantized.codes, refined.gains)
        return replace(audited, source_bytes=original.checkpoint.weight_bytes)


def _bits_per_weight(quantized: Quantized) -> float:
    sizes = [layer.out_features * layer.in_features for layer in quantized.layers]
    bits = sum(layer.bits_per_weight * size for layer, size in zip(quantized.layers, sizes, strict=True))
    return bits / sum(sizes)


def _calibration(recipe: Recipe, tokens: Tokens | None) -> str:
    return f"{(tokens or recipe.calibration).describe()} {recipe.calibration.describe_statistics()}"


def _basis(recipe: Recipe, layers: Mapping[str, Quantizer]) -> str:
    """Where incoherence=auto has decided about it, in words that say what a packed export does; "" elsewhere."""
    if any(isinstance(each, UniformQuantizer) and each.is_turned for each in layers.values()):
        return "turned, for less error; a run for packed formats says export=FORMAT (or quantizer.incoherence=none)"
    is_exported = recipe.exporters and isinstance(recipe.quantizer, JointQ)
    return "the layers' own, as packed formats have it" if is_exported else ""


def _quantizer(recipe: Recipe, layers: Mapping[str, Quantizer]) -> str:
    kept = [pattern for pattern, settings in recipe.layers.overrides.items() if settings == KEEP]
    left = f"{', '.join(kept)} left alone" if kept else ""
    corrections = [recipe.qep.describe(), recipe.curvature.describe()]
    return " + ".join(filter(None, [describe(list(layers.values())), left, *corrections]))
