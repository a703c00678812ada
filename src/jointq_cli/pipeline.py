"""Each command's data path from top to bottom, one stage per line.

    tokens -> (rotate) -> (allocate) -> quantize -> (refine) -> checkpoint -> (export) -> evaluate -> report

Each stage reads artifacts and writes one through the store. Nothing here computes, and nothing here knows Hydra. Where
several processes share a run, all of them take every line, and rank 0 alone writes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from jointq_cli.data.token_file import Tokens, save_tokens
from jointq_cli.data.tokenizer import load_tokenizer
from jointq_cli.errors import ModelError, ResourceError
from jointq_cli.evaluation.engines import require_installed
from jointq_cli.evaluation.perplexity import compare, perplexity, protocol
from jointq_cli.formats.export import IMATRIX, Exporter
from jointq_cli.models.sources import ModelSource
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.recipe import CalibrateRecipe, EvaluateRecipe, Recipe, RotateRecipe
from jointq_cli.records import EvaluationReport, ExportRecord, RotationRecord, RunEstimate, RunReport
from jointq_cli.report import Console, encode
from jointq_cli.report.console.final_summary import evaluate_summary, export_summary, rotate_summary
from jointq_cli.report.tables.plan import plan_document
from jointq_cli.report.tables.run import few_tokens
from jointq_cli.stages.allocation import allocate, expected_layers
from jointq_cli.stages.base import Context, open_context, use_device, windows_per_pass
from jointq_cli.stages.engine import engine_path, score_in_engine
from jointq_cli.stages.engine_check import check_all
from jointq_cli.stages.export import export_all, link_exports
from jointq_cli.stages.finished_run import export_finished, export_imatrix, open_finished, refuse_existing
from jointq_cli.stages.generation import generate_texts
from jointq_cli.stages.hidden import hidden_stage
from jointq_cli.stages.loop_settings import loop_settings, refuse_turned_twice, selected_layers
from jointq_cli.stages.model import fetch_model
from jointq_cli.stages.plan.dry_run import find_inputs
from jointq_cli.stages.plan.estimate import estimate_run
from jointq_cli.stages.plan.model_sizes import shapes_of
from jointq_cli.stages.plan.preflight import evaluation_warnings, export_warnings, preflight_warnings, shared_text
from jointq_cli.stages.quantize import quantize as quantize_model
from jointq_cli.stages.quantized_scores import quantized_scores_stage, read_quantized_scores
from jointq_cli.stages.refine import check_refinable, further_windows
from jointq_cli.stages.refine import refine as refine_model
from jointq_cli.stages.report import (
    RunResults,
    copy_map,
    finish_run,
    hash_results,
    header,
    label_rotated,
    link_rotation,
    quantization_lines,
    write_manifest,
)
from jointq_cli.stages.rotate import rotate as rotate_model
from jointq_cli.stages.scores import score_model
from jointq_cli.stages.tasks import fetch_tasks, run_tasks, size_tasks, task_stage, task_warnings, with_tokenizer
from jointq_cli.stages.tokens import load_calibration, load_evaluation
from jointq_cli.stages.trial import try_paths
from jointq_cli.system.distributed import SINGLE_PROCESS, Team
from jointq_cli.system.files import link_files
from jointq_cli.system.machine import versions
from jointq_cli.system.run_directory import RunDirectory
from jointq_cli.system.settings import Runtime


def quantize(recipe: Recipe, run: RunDirectory, console: Console, team: Team = SINGLE_PROCESS) -> RunReport | None:
    """Quantises a model, measures the checkpoint as it lies on disk, and writes everything into the run directory.

    Returns the report on rank 0, None elsewhere.
    """
    with open_context(recipe.store, recipe.runtime, console, team) as context:
        loaded = fetch_tasks(context, recipe.evaluation)
        original = _open_model(context, recipe.model)
        tokenizer = load_tokenizer(original.checkpoint.directory, recipe.model.trust_remote_code)
        asked = selected_layers(original, recipe.layers, recipe.quantizer, recipe.activations)
        layers = expected_layers(original, asked, recipe)
        refuse_turned_twice(layers, recipe.rotation)
        warnings = export_warnings(recipe, original, layers)  # before tokens, which the model may have to write
        tokens = load_calibration(context, recipe.calibration, original, tokenizer)
        windows = load_evaluation(context, recipe.evaluation, tokenizer)
        console.header(header(recipe, original, tokens, quantization_lines(recipe, asked, original, windows), team))

        check_refinable(original, layers, recipe.refinement, len(tokens.windows))
        shapes, scored = shapes_of(original, layers), int(windows.scored.sum())
        warnings += preflight_warnings(recipe, original, shapes, tokens.windows.numel(), scored)
        tasks = size_tasks(loaded, original, tokenizer, recipe.runtime)
        warnings += task_warnings(tasks, recipe.activations)
        for warning in [*shared_text(recipe, tokens, windows), *warnings]:
            console.warn(warning)

        loop = loop_settings(layers, recipe, tokens)
        try_paths(original, tokens, windows, loop, recipe.activations)
        rotated = rotate_model(context, original, tokens, recipe.rotation, recipe.smoothing)
        team.on_rank0(link_rotation, rotated, run)

        allocated = allocate(context, rotated.model, tokens, asked, recipe)
        layers, loop = allocated.layers, loop_settings(allocated.layers, recipe, tokens)
        solved = quantize_model(context, rotated.model, tokens, loop)
        further = further_windows(original, tokenizer, tokens, recipe.refinement)
        refined = refine_model(context, rotated.model, solved, tokens, recipe.refinement, loop.batch, further)
        quantized = refined.quantized
        for warning in few_tokens(quantized.layers, recipe.experts.warn_below):
            console.warn(warning)
        team.on_rank0(link_files, quantized.checkpoint.directory, run.checkpoint)
        team.on_rank0(link_files, quantized.codes, run.codes, "*.safetensors")
        team.on_rank0(link_files, quantized.importance, run.importance)
        team.on_rank0(copy_map, allocated, run)
        exports, failures = export_all(context, rotated.model, quantized, recipe.exporters)
        if recipe.check_exports:
            exports = check_all(context, rotated.model, quantized, exports, tokenizer, windows)
        team.on_rank0(link_exports, exports, run.exports)

        batch = windows_per_pass(recipe.runtime, windows.ids)
        hidden = hidden_stage(original, windows, batch)
        context.run(hidden)
        scores = quantized_scores_stage(
            original, hidden, quantized.stage, loop, tokens, windows, batch, recipe.activations
        )
        measured = read_quantized_scores(context.run(scores).path, recipe.activations)
        texts = generate_texts(context, original, quantized, tokenizer, recipe.generate_tokens)
        reloaded = context.open_model(quantized.checkpoint, recipe.model.trust_remote_code)
        before = [task_stage(task, original, with_tokenizer(original), "original") for task in tasks]
        after = [task_stage(task, reloaded, [quantized.stage.key], "quantized") for task in tasks]
        figures = run_tasks(context, tasks, after, before)
        records = [export.record for export in exports]
        results = RunResults(allocated, rotated, refined, measured, records, failures, texts, figures)
        return team.on_rank0(finish_run, context, run, recipe, original, tokens, windows, results)


def rotate(recipe: RotateRecipe, run: RunDirectory, console: Console, team: Team = SINGLE_PROCESS) -> RotationRecord:
    """Smooths and rotates a model at full precision, and leaves it in the run directory."""
    with open_context(recipe.store, recipe.runtime, console, team) as context:
        original = _open_model(context, recipe.model)
        tokenizer = load_tokenizer(original.checkpoint.directory, recipe.model.trust_remote_code)
        tokens = load_calibration(context, recipe.calibration, original, tokenizer)
        console.header(header(recipe, original, tokens, [], team))
        for warning in original.checkpoint.warnings:
            console.warn(warning)
        rotated = rotate_model(context, original, tokens, recipe.rotation, recipe.smoothing)
        assert rotated.record is not None  # a recipe that changes nothing is refused
        team.on_rank0(link_files, rotated.model.checkpoint.directory, run.checkpoint)
        team.on_rank0(label_rotated, run.checkpoint, recipe, original, rotated.record)
        team.on_rank0(link_rotation, rotated, run)
        team.on_rank0(lambda: write_manifest(context, run, recipe, original, tokens, hash_results(context, run)))
        console.show(rotate_summary(rotated.record, run.path))
        return rotated.record


def evaluate(
    recipe: EvaluateRecipe, run: RunDirectory, console: Console, team: Team = SINGLE_PROCESS
) -> EvaluationReport:
    """Perplexity of a checkpoint and, with a reference, how far its predictions are from the reference's."""
    if recipe.engine is not None:
        require_installed(recipe.engine)
    with open_context(recipe.store, recipe.runtime, console, team) as context:
        loaded = fetch_tasks(context, recipe.evaluation)
        model = _open_model(context, recipe.model, packed=True)
        reference = model
        if recipe.reference is not None:
            code = recipe.model.trust_remote_code
            source = ModelSource(recipe.reference, revision=None, trust_remote_code=code)
            with _named("reference"):
                reference = _open_model(context, source, packed=True)
        tokenizer = load_tokenizer(model.checkpoint.directory, recipe.model.trust_remote_code)
        windows = load_evaluation(context, recipe.evaluation, tokenizer)
        described = protocol(recipe.evaluation, windows, model.dtype)
        console.header([("model", recipe.model.path), ("protocol", described.line())])
        tasks = size_tasks(loaded, model, tokenizer, recipe.runtime)
        warnings = evaluation_warnings(recipe, model, reference, described.scored_tokens)
        for warning in [*warnings, *task_warnings(tasks)]:
            console.warn(warning)
        if recipe.engine is None:
            scores, engine, problems = score_model(context, model, reference, windows), None, []
        else:
            path = engine_path(recipe.model.path, model.checkpoint)
            expected = reference if recipe.reference else None
            measured = score_in_engine(context, recipe.engine, path, expected, tokenizer, windows)
            scores, engine, problems = measured.scores, measured.engine, measured.problems
        first = [
            task_stage(task, reference, with_tokenizer(reference), "reference") for task in tasks if recipe.reference
        ]
        second = [task_stage(task, model, with_tokenizer(model), "") for task in tasks]
        report = EvaluationReport(
            model=recipe.model.path,
            model_hash=model.checkpoint.content_hash,
            reference=recipe.reference,
            protocol=described,
            perplexity=perplexity(scores.quantized_nll, scores.tokens),
            comparison=compare(scores) if recipe.reference else None,
            tasks=run_tasks(context, tasks, second, first),
            stages=context.records,
            versions=versions(),
            warnings=list(console.warnings),
            engine=engine,
            problems=problems,
        )
        run.write(run.path / "evaluation.json", encode(report))
        console.show(evaluate_summary(report, run.path))
        return report


def export(directory: Path, exporters: list[Exporter], output: Path | None, console: Console) -> list[ExportRecord]:
    """Writes packed checkpoints of a finished run, by default into it; its report lists them then.

    output: the directory of the only export. Raises JointqError where one exists already.
    """
    finished = open_finished(directory, use_device(Runtime()))
    for warning in finished.check(exporters):
        console.warn(warning)
    places = [output or finished.run.exports / exporter.label for exporter in exporters]
    for place in places:
        refuse_existing(place)
    records = [
        export_finished(finished, exporter, place, console, listed=output is None)
        for exporter, place in zip(exporters, places, strict=True)
    ]
    console.show(export_summary(records, places))
    return records


def export_importance(directory: Path, output: Path | None, console: Console) -> None:
    """Writes llama.cpp's importance matrix of a finished run, by default into it. Raises JointqError where one exists
    already."""
    finished = open_finished(directory, use_device(Runtime()))
    place = output or finished.run.exports / IMATRIX
    refuse_existing(place)
    export_imatrix(finished, place, console)


def calibrate(recipe: CalibrateRecipe, console: Console, team: Team = SINGLE_PROCESS) -> Tokens:
    """Writes a recipe's calibration tokens into a file that `calibration.tokens` reads without a network."""
    with open_context(recipe.store, recipe.runtime, console, team) as context:
        original = _open_model(context, recipe.model)
        tokenizer = load_tokenizer(original.checkpoint.directory, recipe.model.trust_remote_code)
        tokens = load_calibration(context, recipe.calibration, original, tokenizer)
        team.on_rank0(save_tokens, Path(recipe.output), tokens)
        console.note(f"{tokens.describe()} -> {recipe.output}")
        return tokens


def plan(recipe: Recipe, console: Console) -> RunEstimate:
    """What `quantize` would do with this recipe, from configs and headers; writes nothing."""
    with torch.no_grad():
        inputs = find_inputs(recipe, use_device(recipe.runtime))
        layers = selected_layers(inputs.original, recipe.layers, recipe.quantizer, recipe.activations)
        lines = quantization_lines(recipe, layers, inputs.original, inputs.windows)
        console.header(header(recipe, inputs.original, inputs.tokens, lines))
        estimate = estimate_run(recipe, inputs)
        console.show(plan_document(estimate))
        return estimate


def _open_model(context: Context, source: ModelSource, *, packed: bool = False) -> StreamedModel:
    return context.open_model(fetch_model(context, source, packed=packed), source.trust_remote_code)


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Errors about the model of another key than model.path name that key."""
    try:
        yield
    except (ModelError, ResourceError) as error:
        raise type(error)(str(error).replace("model.path=", f"{key}=")) from error
