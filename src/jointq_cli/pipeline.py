"""The road: every command's data path from the top to the bottom, one step a line.

    tokens -> (rotate) -> quantize -> checkpoint -> evaluate -> report

Each step is a stage that reads artifacts and writes an artifact through the store. Nothing here computes, and nothing
here knows Hydra. Where several processes do it together, all take the road, and the leader alone leaves something.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from jointq_cli.data.token_file import Tokens, save_tokens
from jointq_cli.data.tokenizer import load_tokenizer
from jointq_cli.errors import PeerProcessError
from jointq_cli.evaluation.perplexity import compare, perplexity, protocol
from jointq_cli.evaluation.windows import Evaluation, ScoredWindows
from jointq_cli.formats.audit import audit
from jointq_cli.models.sources import ModelSource, provenance
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.recipe import CalibrateRecipe, EvaluateRecipe, Recipe, RotateRecipe
from jointq_cli.records import EvaluationReport, Protocol, RotationRecord, RunEstimate, RunReport
from jointq_cli.report import Console, encode, write_report
from jointq_cli.report.tables.plan import plan_sheet
from jointq_cli.stages import rotate as rotation_stages
from jointq_cli.stages.base import Quantized, QuantizedScores, Stages, selected_layers
from jointq_cli.stages.plan.dry_run import Survey, estimate_run
from jointq_cli.stages.plan.model_sizes import shapes_of
from jointq_cli.stages.plan.preflight import caveats
from jointq_cli.stages.rotate import Rotated
from jointq_cli.system.distributed import SINGLE_PROCESS, Team
from jointq_cli.system.files import file_hashes, link_files, translated_disk_errors
from jointq_cli.system.interrupts import deferred
from jointq_cli.system.machine import peak_memory, versions
from jointq_cli.system.run_directory import Manifest, RunDirectory, build_manifest, result_files
from jointq_cli.system.settings import Runtime
from jointq_cli.system.store import Store
from jointq_cli.transforms import HadamardRotation, LearnedRotation


def quantize(recipe: Recipe, run: RunDirectory, console: Console, team: Team = SINGLE_PROCESS) -> RunReport | None:
    """Quantises a model, measures the checkpoint as it lies on disk, and leaves everything in the run directory.

    The report is the leader's, None for others.
    """
    with _stages(recipe.store, recipe.runtime, console, team) as stages:
        source = stages.source(recipe.model)
        original = stages.model(source, recipe.model)
        tokenizer = load_tokenizer(source.directory, recipe.model.trust_remote_code)
        tokens = stages.calibration_tokens(recipe.calibration, tokenizer)
        windows = stages.evaluation_windows(recipe.evaluation, tokenizer)
        console.header(_header(recipe, stages, original, tokens, _measured_how(recipe, original, windows)))
        shapes = shapes_of(original, selected_layers(original, recipe))  # a key that names nothing is told here
        for caveat in caveats(recipe, original, shapes, tokens.windows.numel(), int(windows.scored.sum())):
            console.warn(caveat)
        rotated = rotation_stages.rotate(stages, original, tokens, recipe)
        team.on_rank0(_keep_rotation, rotated, run)
        quantized = stages.quantize(rotated.model, tokens, recipe)
        team.on_rank0(link_files, quantized.checkpoint.directory, run.checkpoint)
        team.on_rank0(link_files, quantized.codes, run.codes, "*.safetensors")
        hidden = stages.final_hidden(original, windows)
        measured = stages.score(original, hidden, quantized, windows, tokens, recipe)

        def finish() -> RunReport:
            files = _file_hashes(stages, run)
            report = _report(recipe, stages, original, tokens, windows, rotated, quantized, measured)
            _write(run, recipe, report, original, tokens, windows, files, team)
            console.closing(report, run.path)
            return report

        return team.on_rank0(finish)


def rotate(recipe: RotateRecipe, run: RunDirectory, console: Console, team: Team = SINGLE_PROCESS) -> RotationRecord:
    """Smooths and rotates a model at full precision, and leaves it in the run directory."""
    with _stages(recipe.store, recipe.runtime, console, team) as stages:
        original = stages.model(stages.source(recipe.model), recipe.model)
        tokenizer = load_tokenizer(original.checkpoint.directory, recipe.model.trust_remote_code)
        tokens = stages.calibration_tokens(recipe.calibration, tokenizer)
        console.header(_header(recipe, stages, original, tokens, []))
        rotated = rotation_stages.rotate(stages, original, tokens, recipe)
        assert rotated.record is not None  # the recipe was refused if it changes nothing
        team.on_rank0(link_files, rotated.model.checkpoint.directory, run.checkpoint)
        team.on_rank0(_keep_rotation, rotated, run)
        hashes = {"model": original.checkpoint.content_hash, "calibration tokens": tokens.hash}
        texts = {"calibration": tokens.provenance}

        def finish() -> None:
            files = _file_hashes(stages, run)
            run.write_manifest(_manifest(recipe, run, original, str(stages.device), hashes, texts, files, team))

        team.on_rank0(finish)
        console.rotated(rotated.record, run.path)
        return rotated.record


def evaluate(
    recipe: EvaluateRecipe, run: RunDirectory, console: Console, team: Team = SINGLE_PROCESS
) -> EvaluationReport:
    """Perplexity of a checkpoint, and with a reference what became of the original's predictions."""
    with _stages(recipe.store, recipe.runtime, console, team) as stages:
        model = stages.model(stages.source(recipe.model), recipe.model)
        original = _reference(recipe, stages) or model
        tokenizer = load_tokenizer(model.checkpoint.directory, recipe.model.trust_remote_code)
        windows = stages.evaluation_windows(recipe.evaluation, tokenizer)
        console.header(
            [("model", recipe.model.path), ("protocol", _protocol(recipe.evaluation, windows, model).line())]
        )
        scores = stages.measure(original, model, windows)
        report = EvaluationReport(
            model=recipe.model.path,
            model_hash=model.checkpoint.content_hash,
            reference=recipe.reference,
            protocol=_protocol(recipe.evaluation, windows, model),
            perplexity=perplexity(scores.quantized_nll, scores.tokens),
            comparison=compare(scores) if recipe.reference else None,
            stages=stages.records,
            versions=versions(),
        )
        run.write(run.path / "evaluation.json", encode(report))
        console.measured(report, run.path)
        return report


def calibrate(recipe: CalibrateRecipe, console: Console, team: Team = SINGLE_PROCESS) -> Tokens:
    """Freezes a recipe's calibration tokens in a file that `calibration.tokens` reads without a network."""
    with _stages(recipe.store, recipe.runtime, console, team) as stages:
        source = stages.source(recipe.model)
        tokenizer = load_tokenizer(source.directory, recipe.model.trust_remote_code)
        tokens = stages.calibration_tokens(recipe.calibration, tokenizer)
        team.on_rank0(save_tokens, Path(recipe.output), tokens)
        console.note(f"{tokens.describe()} -> {recipe.output}")
        return tokens


def plan(recipe: Recipe, console: Console) -> RunEstimate:
    """What `quantize` would do with this recipe, told from configs and headers; nothing is written."""
    with torch.no_grad():
        survey = Survey(recipe)
        original = survey.model(survey.source(recipe.model), recipe.model)
        tokenizer = load_tokenizer(original.checkpoint.directory, recipe.model.trust_remote_code)
        tokens = survey.calibration(recipe.calibration, tokenizer)
        windows = survey.evaluation(recipe.evaluation, tokenizer)
        console.header(_header(recipe, survey, original, tokens, _measured_how(recipe, original, windows)))
        survey.look(recipe, original, tokens, windows)
        outlook = estimate_run(survey, recipe, original, tokens, windows)
        console.side_by_side(plan_sheet(outlook))
        return outlook


@contextmanager
def _stages(root: str, runtime: Runtime, console: Console, team: Team) -> Iterator[Stages]:
    path = Path(root)
    with (
        deferred() as interrupts,
        translated_disk_errors(path),
        torch.no_grad(),
        Store(path, interrupts.raise_if_requested, console.note, team) as store,
    ):
        try:
            yield Stages(store, console, runtime, interrupts, team)
        except PeerProcessError:  # Ctrl-C has reached all, and this is what another one makes of it
            interrupts.raise_if_requested()
            raise


def _reference(recipe: EvaluateRecipe, stages: Stages) -> StreamedModel | None:
    if recipe.reference is None:
        return None
    source = ModelSource(recipe.reference, revision=None, trust_remote_code=recipe.model.trust_remote_code)
    return stages.model(stages.source(source), source)


def _protocol(evaluation: Evaluation, windows: ScoredWindows, model: StreamedModel) -> Protocol:
    return protocol(evaluation, windows, model.dtype)


def _keep_rotation(rotated: Rotated, run: RunDirectory) -> None:
    """What the basis is, beside what was made in it."""
    if rotated.directory is not None:
        link_files(rotated.directory, run.rotation, "rotation.*")
        return
    for old in run.rotation.glob("rotation.*"):  # that of an earlier run into this directory would be a wrong one
        old.unlink()
    with suppress(OSError):  # not there, or with something in it that is not ours
        run.rotation.rmdir()


def _computing(team: Team) -> str:
    threads = f"{torch.get_num_threads()} threads"
    return threads if team.size == 1 else f"{team.size} processes of {threads}"


def _header(
    recipe: Recipe, stages: Stages, model: StreamedModel, tokens: Tokens | None, further: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    parameters = f"{model.checkpoint.parameters / 1e6:,.1f} M"
    basis = "; ".join(filter(None, [recipe.smoothing.describe(), recipe.rotation.describe()]))
    lines = [
        ("recipe", recipe.name),
        ("model", f"{recipe.model.path} ({type(model.module).__name__}, {parameters})"),
        ("rotation", basis),
        ("calibration", f"{(tokens or recipe.calibration).describe()} {recipe.calibration.describe_statistics()}"),
        *further,
        ("device", f"{model.device} {str(model.dtype).removeprefix('torch.')}, {_computing(stages.team)}"),
    ]
    return [(label, value) for label, value in lines if value]


def _measured_how(recipe: Recipe, model: StreamedModel, windows: ScoredWindows | None) -> list[tuple[str, str]]:
    protocol = "" if windows is None else _protocol(recipe.evaluation, windows, model).line()
    return [
        ("quantizer", _quantizer(recipe)),
        ("simulated", recipe.activations.describe()),
        ("protocol", protocol),
    ]


def _quantizer(recipe: Recipe) -> str:
    return " + ".join(filter(None, [recipe.quantizer.describe(), recipe.qep.describe()]))


def _report(
    recipe: Recipe,
    stages: Stages,
    model: StreamedModel,
    tokens: Tokens,
    windows: ScoredWindows,
    rotated: Rotated,
    quantized: Quantized,
    measured: QuantizedScores,
) -> RunReport:
    with stages.stage("audit"):
        source = rotated.model.checkpoint
        names = {layer.name: rotated.model.stored_name(f"{layer.name}.weight") for layer in quantized.layers}
        audited = audit(source, quantized.checkpoint, names, quantized.layers, quantized.codes)
        # What is saved is told against the model as it came: untied for a rotation, it is larger.
        audited = replace(audited, source_bytes=model.checkpoint.weight_bytes)
    scores = measured.scores
    weights = sum(layer.out_features * layer.in_features for layer in quantized.layers)
    bits = sum(layer.bits_per_weight * layer.out_features * layer.in_features for layer in quantized.layers)
    return RunReport(
        recipe=recipe.name,
        model=recipe.model.path,
        model_hash=model.checkpoint.content_hash,
        architecture=type(model.module).__name__,
        parameters=model.checkpoint.parameters,
        quantizer=_quantizer(recipe),
        rotation=rotated.record,
        simulation=measured.simulation,
        calibration=f"{tokens.describe()} {recipe.calibration.describe_statistics()}",
        protocol=_protocol(recipe.evaluation, windows, model),
        original=perplexity(scores.original_nll, scores.tokens),
        quantized=perplexity(scores.quantized_nll, scores.tokens),
        comparison=compare(scores),
        reload_check=measured.reload_check,
        audit=audited,
        bits_per_weight=bits / weights,
        layers=quantized.layers,
        blocks=quantized.blocks,
        stages=stages.records,
        peak_memory=peak_memory(),
        versions=versions(),
        device=str(stages.device),
        warnings=list(stages.console.warnings),
    )


def _file_hashes(stages: Stages, run: RunDirectory) -> dict[str, str]:
    """What a replay of this run must make again, even where the files are gone by then."""
    with stages.stage("file hashes"):
        return file_hashes(run.path, result_files(run.path))


def _write(
    run: RunDirectory,
    recipe: Recipe,
    report: RunReport,
    model: StreamedModel,
    tokens: Tokens,
    windows: ScoredWindows,
    files: dict[str, str],
    team: Team,
) -> None:
    hashes = {
        "model": report.model_hash,
        "calibration tokens": tokens.hash,
        "evaluation windows": windows.hash,
    }
    texts = {"calibration": tokens.provenance, "evaluation": windows.provenance}
    run.write_manifest(_manifest(recipe, run, model, report.device, hashes, texts, files, team))
    write_report(report, run)


def _manifest(
    recipe: Recipe,
    run: RunDirectory,
    model: StreamedModel,
    device: str,
    hashes: dict[str, str],
    texts: dict[str, dict[str, str]],
    files: dict[str, str],
    team: Team,
) -> Manifest:
    seeds = {"calibration.seed": recipe.calibration.seed}
    if isinstance(recipe.rotation, (HadamardRotation, LearnedRotation)):
        seeds["rotation.seed"] = recipe.rotation.seed
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return build_manifest(
        command=sys.argv,
        device=device,
        threads=torch.get_num_threads(),
        processes=team.size,
        seeds=seeds,
        hashes=hashes,
        texts=texts,
        files=files,
        gpu=gpu,
        recipe_sha256=run.recipe_hash,
        model=provenance(recipe.model, model.checkpoint.directory),
    )
