"""What a run would do, stage by stage: the run's own stages, looked up in the store by their keys.

Reads configs, headers and local texts; computes nothing, writes nothing, and does not contact the hub. A stage whose
inputs cannot be known without reading weights or downloading a text has no key.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from jointq_cli.data.calibration import Calibration, calibration_tokens
from jointq_cli.data.token_file import Tokens
from jointq_cli.data.tokenizer import load_tokenizer
from jointq_cli.errors import ResourceError
from jointq_cli.evaluation.generation import why_not
from jointq_cli.evaluation.tasks import LoadedTask, NotDownloaded, load_tasks
from jointq_cli.evaluation.windows import Evaluation, ScoredWindows
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.sources import fetch
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.curvature import Kfac
from jointq_cli.quantization.quantizers.base import Quantizer
from jointq_cli.quantization.refinement.settings import GradientRefinement
from jointq_cli.recipe import Recipe
from jointq_cli.stages.allocation import allocation_stage, describe, expected_layers, find_problem, open_allocation
from jointq_cli.stages.base import Stage, open_model, windows_per_pass
from jointq_cli.stages.engine_check import check_stage, is_checked
from jointq_cli.stages.export import export_stage, model_to_quantize
from jointq_cli.stages.generated_tokens import check_memory, generated_stage, read_generated
from jointq_cli.stages.generation import generation_stages
from jointq_cli.stages.gradients import gradients_stage
from jointq_cli.stages.hessians import can_share, hessians_stage, layers_in
from jointq_cli.stages.hidden import hidden_stage
from jointq_cli.stages.loop_settings import loop_settings, selected_layers
from jointq_cli.stages.model import conversion
from jointq_cli.stages.plan.costs import Windows
from jointq_cli.stages.quantize import quantize_stage
from jointq_cli.stages.quantized_scores import quantized_scores_stage
from jointq_cli.stages.refine import check_refinable, further_windows, refine_stage
from jointq_cli.stages.rotate import rotated_checkpoint, rotation_stages
from jointq_cli.stages.sensitivity import sensitivity_stage
from jointq_cli.stages.tasks import SizedTask, size_tasks, task_stage, with_tokenizer
from jointq_cli.stages.text_tokens import is_stored, read_stored, tokens_stage
from jointq_cli.stages.tokens import evaluation_windows, with_generated
from jointq_cli.system.hash_cache import cached_hash
from jointq_cli.system.integrity import has_expected_sizes
from jointq_cli.system.inventory import partial_path
from jointq_cli.system.store import artifact_name
from jointq_cli.transforms import changes_basis

LEAST_SHARE = 0.02  # of a stage whose blocks are all finished: the checkpoint is yet to be written
HUB_TOKENS = 300_000  # of an evaluation text that is not on this machine: about WikiText-2's test split


@dataclass(frozen=True)
class StageStatus:
    """How far a stage is. share: of its work that is left."""

    state: str
    share: float = 1.0


TO_MAKE, TO_FETCH, REUSED = StageStatus("to make"), StageStatus("to fetch"), StageStatus("reused", 0.0)
UNKNOWN, EVERY_RUN = StageStatus("unknown"), StageStatus("every run")


@dataclass(frozen=True)
class RunInputs:
    """What a run starts from. tokens, windows, tasks: None where a run would have to fetch them first."""

    original: StreamedModel
    tokens: Tokens | None
    tokens_stages: list[tuple[Stage, StageStatus]]
    windows: ScoredWindows | None
    tokenizer: PreTrainedTokenizerBase
    tasks: list[SizedTask] | None


@dataclass(frozen=True)
class DryRun:
    """The stored stages of a run, in their order, and what they work on."""

    stages: list[tuple[Stage, StageStatus]]
    layers: dict[str, Quantizer]  # those to quantise
    calibration: Windows
    evaluation: Windows
    shares_hessians: bool
    unread: Path | None  # a model whose weights no run has hashed yet
    notes: list[str]


@dataclass(frozen=True)
class _Distribution:
    """What a budget makes of the layers. stages: those that lead there. is_known: whether the store has the result."""

    layers: dict[str, Quantizer]
    stages: list[Stage]
    is_known: bool
    notes: list[str]


def find_inputs(recipe: Recipe, device: torch.device) -> RunInputs:
    """Raises what the run would raise for its model and texts, and ResourceError where the model is not on this machine
    or not converted yet."""
    store, code = Path(recipe.store), recipe.model.trust_remote_code
    tasks = _find_tasks(recipe.evaluation)

    def converted(file: Path) -> Path:
        digest = cached_hash(store, file, [file])
        directory = _find(conversion(file, digest), store) if digest else None
        if directory is None:
            raise ResourceError(
                f"model.path={recipe.model.path}: has to be converted first; nothing more can be said before a run has "
                "done it"
            )
        return directory

    original = open_model(_hashed(fetch(recipe.model, converted, offline=True), store), recipe.runtime, device, code)
    tokenizer = load_tokenizer(original.checkpoint.directory, code)
    tokens, stages = _find_tokens(recipe.calibration, original, tokenizer, store)
    on_hub = recipe.evaluation.is_on_hub
    windows = None if on_hub else evaluation_windows(recipe.evaluation, tokenizer)
    sized = None if tasks is None else size_tasks(tasks, original, tokenizer, recipe.runtime)
    return RunInputs(original, tokens, stages, windows, tokenizer, sized)


def dry_run(recipe: Recipe, inputs: RunInputs) -> DryRun:
    """Raises what the run would raise before it computes."""
    original, store, runtime = inputs.original, Path(recipe.store), recipe.runtime
    layers = selected_layers(original, recipe.layers, recipe.quantizer, recipe.activations)
    tokens = inputs.tokens or _stand_in_tokens(recipe.calibration)
    windows = inputs.windows or _stand_in_windows(recipe.evaluation)

    rotation: list[Stage] = []
    model: StreamedModel | None = original  # the one to quantise; None where it is yet to be rotated
    if changes_basis(recipe.rotation, recipe.smoothing):
        pair = rotation_stages(
            original, tokens, recipe.rotation, recipe.smoothing, windows_per_pass(runtime, tokens.windows)
        )
        rotation = [_known(stage, inputs.tokens) for stage in pair]
        model = _find_rotated(rotation[-1], recipe, original)

    # A model that is yet to be rotated has the shapes of the original, so what the run would refuse is refused now.
    shaped = original if model is None else model
    distribution = _distribute(recipe, shaped, layers, tokens, [model, inputs.tokens])
    layers = distribution.layers
    loop = loop_settings(layers, recipe, tokens)
    quantize = _known(quantize_stage(shaped, tokens, loop), model, inputs.tokens, distribution.is_known or None)
    hessians = _known(hessians_stage(shaped, tokens, loop), model, inputs.tokens)
    batch = windows_per_pass(runtime, windows.ids)
    hidden = _known(hidden_stage(original, windows, batch), inputs.windows)
    check_refinable(original, layers, recipe.refinement, len(tokens.windows))
    result, refining = quantize, []
    if isinstance(recipe.refinement, GradientRefinement):
        further = further_windows(original, inputs.tokenizer, tokens, recipe.refinement)
        names, settings = layers_in(shaped, loop), recipe.refinement
        result = _known(refine_stage(shaped, quantize, names, tokens, settings, loop.batch, further), quantize.key)
        refining = [*([_known(further, inputs.tokens)] if further else []), result]
    scores = quantized_scores_stage(original, hidden, result, loop, tokens, windows, batch, recipe.activations)

    checkpoints = (original.checkpoint, shaped.checkpoint)
    unread = next((one.directory for one in checkpoints if one.known_hash is None), None)
    shares_hessians = can_share(shaped, loop, runtime.hessians_gb * 1e9)

    def status(stage: Stage, text: object = True) -> StageStatus:
        return _status(stage, store, len(original), could_exist=unread is not None or text is None)

    needed = [hessians] if shares_hessians and status(quantize) != REUSED else []
    if isinstance(loop.curvature, Kfac) and status(quantize) != REUSED:
        needed = [_known(gradients_stage(shaped, tokens, loop), model, inputs.tokens), *needed]
    steps = _once([*rotation, *distribution.stages, *needed, quantize, *refining])
    computing = [(stage, status(stage)) for stage in steps]
    exporting, planned = [], model_to_quantize(original, layers)
    for exporter in recipe.exporters:
        export = _known(export_stage(shaped, list(layers), result, exporter), model)
        exporting.append((export, status(export)))
        if recipe.check_exports and is_checked(exporter, planned):
            check = check_stage(export, result, shaped, list(layers), exporter, inputs.tokenizer, windows)
            check = _known(check, model, inputs.windows)
            exporting.append((check, status(check, inputs.windows)))
    evaluating = [(stage, status(stage, inputs.windows)) for stage in (hidden, scores)]
    if recipe.generate_tokens and not why_not(original):
        texts = generation_stages(original, result, list(layers), inputs.tokenizer, recipe.generate_tokens)
        evaluating += [(stage, status(stage)) for stage in texts]
    before = [task_stage(task, original, with_tokenizer(original), "original") for task in inputs.tasks or ()]
    after = [task_stage(task, original, [result.key], "quantized") for task in inputs.tasks or ()]
    evaluating += [(stage, status(stage)) for stage in (*before, *after)]
    return DryRun(
        stages=computing + exporting + evaluating,
        layers=layers,
        calibration=Windows(*tokens.windows.shape),
        evaluation=Windows(*windows.ids.shape),
        shares_hessians=shares_hessians,
        unread=unread,
        notes=distribution.notes,
    )


def _distribute(
    recipe: Recipe, model: StreamedModel, layers: dict[str, Quantizer], tokens: Tokens, inputs: list[object]
) -> _Distribution:
    """layers: as the recipe has them. inputs: of which one is None if the model or the tokens are yet to be made."""
    problem = find_problem(model, layers, recipe)
    if problem is None:
        return _Distribution(layers, [], True, [])
    store, loop = Path(recipe.store), problem.loop(recipe, tokens)
    measured = _known(sensitivity_stage(model, tokens, loop, problem.candidates, problem.sensitivity), *inputs)
    stage = allocation_stage(problem, measured)
    found = _find(stage, store)
    needed = []
    if _find(measured, store) is None:
        if isinstance(loop.curvature, Kfac):
            needed.append(_known(gradients_stage(model, tokens, loop), *inputs))
        if can_share(model, loop, recipe.runtime.hessians_gb * 1e9):
            needed.append(_known(hessians_stage(model, tokens, loop), *inputs))
    stages, budget = [*needed, measured, stage], problem.budget_line()
    if found is None:
        return _Distribution(expected_layers(model, layers, recipe), stages, False, [budget])
    allocated = open_allocation(problem, found)
    return _Distribution(allocated.layers, stages, True, [budget, describe(allocated)])


def _once(stages: list[Stage]) -> list[Stage]:
    """Without stages that two others need."""
    found: list[Stage] = []
    for stage in stages:
        if not any((stage.kind, stage.spec, stage.inputs) == (one.kind, one.spec, one.inputs) for one in found):
            found.append(stage)
    return found


def _find_tasks(evaluation: Evaluation) -> list[LoadedTask] | None:
    """None where a part of them is on the hub and not on this machine."""
    try:
        return load_tasks(evaluation, offline=True)
    except NotDownloaded:
        return None


def _find_tokens(
    calibration: Calibration, model: StreamedModel, tokenizer: PreTrainedTokenizerBase, store: Path
) -> tuple[Tokens | None, list[tuple[Stage, StageStatus]]]:
    """The windows, if all are on this machine, and the steps that a run takes to them."""
    tokens, stages = None, []
    if not calibration.is_generated:
        cut = tokens_stage(calibration, tokenizer)
        directory = _find(cut, store) if is_stored(calibration) else None
        if directory is not None:
            tokens, status = read_stored(directory, tokenizer), REUSED
        elif is_stored(calibration):
            status = TO_FETCH
        else:
            tokens, status = calibration_tokens(calibration, tokenizer), EVERY_RUN
        stages.append((cut, status))
    if calibration.generated:
        count, seqlen = calibration.generated, calibration.seqlen
        text = None if calibration.is_generated else tokens or _stand_in_tokens(calibration)
        write = generated_stage(model, tokenizer, count, seqlen, calibration.seed, text)
        write = write if calibration.is_generated else _known(write, tokens)
        stages.append((write, _status(write, store, len(model), could_exist=True)))
        directory = _find(write, store)
        if directory is None:
            check_memory(model, count, seqlen)
            return None, stages
        tokens = with_generated(tokens, read_generated(directory), calibration, model, tokenizer)
    return tokens, stages


def _find_rotated(stage: Stage, recipe: Recipe, original: StreamedModel) -> StreamedModel | None:
    store = Path(recipe.store)
    directory = _find(stage, store)
    if directory is None:
        return None
    checkpoint = _hashed(rotated_checkpoint(directory), store)
    return open_model(checkpoint, recipe.runtime, original.device, original.trust_remote_code)


def _hashed(checkpoint: Checkpoint, store: Path) -> Checkpoint:
    """With the content hash that a run has noted for these files, if any has."""
    return Checkpoint(checkpoint.directory, cached_hash(store, checkpoint.directory, checkpoint.hashed_files))


def _stand_in_tokens(calibration: Calibration) -> Tokens:
    """As many as requested."""
    return Tokens(torch.zeros(calibration.windows, calibration.seqlen, dtype=torch.int64), {})


def _stand_in_windows(evaluation: Evaluation) -> ScoredWindows:
    """As many as requested, or as a usual text has."""
    most = max(1, HUB_TOKENS // evaluation.seqlen)
    ids = torch.zeros(min(evaluation.max_windows or most, most), evaluation.seqlen, dtype=torch.int64)
    return ScoredWindows(ids, ids == 0, evaluation.seqlen)


def _known(stage: Stage, *inputs: object) -> Stage:
    """The stage; without a key if an input is None."""
    return replace(stage, inputs=(None,)) if any(one is None for one in inputs) else stage


def _find(stage: Stage, store: Path) -> Path | None:
    """The result of a stage, if the store has it with files of the right sizes."""
    if stage.key is None:
        return None
    path = store / artifact_name(stage.kind, stage.key)
    return path if path.is_dir() and has_expected_sizes(path) else None


def _status(stage: Stage, store: Path, blocks: int, *, could_exist: bool) -> StageStatus:
    """could_exist: whether a stage without a key may have been run before; one that depends on a result which does not
    exist has not."""
    if stage.key is None:
        return UNKNOWN if could_exist and _has_any(store, stage.kind) else TO_MAKE
    scratch = partial_path(store, artifact_name(stage.kind, stage.key))
    if _find(stage, store):
        return REUSED
    if not stage.resumable or not scratch.is_dir():
        return TO_MAKE
    finished = stage.finished_blocks(scratch)
    position = f" at block {finished + 1} of {blocks}" if 0 < finished < blocks else " after all blocks"
    return StageStatus(f"continues{position if finished else ''}", max(1.0 - finished / blocks, LEAST_SHARE))


def _has_any(store: Path, kind: str) -> bool:
    """Whether the store has an artifact of this kind, finished or begun."""
    return any(store.glob(f"{kind}-*")) or any(store.glob(f"partial/{kind}-*"))
