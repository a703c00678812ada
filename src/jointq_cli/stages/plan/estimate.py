"""What a run takes and whether the machine has it: the dry run's stages with their costs, and warnings."""

from dataclasses import replace
from pathlib import Path

import torch

from jointq_cli.quantization.refinement.settings import ModelRefinement
from jointq_cli.recipe import Recipe
from jointq_cli.records import RunEstimate, StageEstimate
from jointq_cli.stages.plan.costs import Cost, Workload, total
from jointq_cli.stages.plan.dry_run import EVERY_RUN, TO_FETCH, UNKNOWN, DryRun, RunInputs, StageStatus, dry_run
from jointq_cli.stages.plan.model_sizes import shapes_of
from jointq_cli.stages.plan.preflight import export_warnings, preflight_warnings, shared_text
from jointq_cli.stages.plan.throughput import measure_speeds
from jointq_cli.stages.refine import REFINE
from jointq_cli.stages.tasks import TASKS, task_warnings
from jointq_cli.system import machine
from jointq_cli.system.files import nearest_existing

RUN_DIRECTORY = "run directory"
TASKS_SECONDS = 3.0  # to load lm-eval and a few hundred samples

Row = tuple[str, StageStatus, Cost]  # a stage, how far it is, and what the rest of it costs


def estimate_run(recipe: Recipe, inputs: RunInputs) -> RunEstimate:
    """Every stage of the run, what is left of it and what that costs, and what should be known before starting it.

    Raises what the run would raise before it computes.
    """
    found = dry_run(recipe, inputs)
    process = float(machine.peak_memory())  # before anything large: what a run's process takes besides its stages
    load = workload(recipe, inputs, found)
    rows = _rows(recipe, inputs, found, load)
    sum_of_all = total([cost for _, _, cost in rows])
    device = inputs.original.device
    on_gpu = device.type == "cuda"
    in_process = 0.0 if on_gpu else process
    scored = None if inputs.windows is None else int(inputs.windows.scored.sum())
    estimate = RunEstimate(
        stages=[
            StageEstimate(name, status.state, cost.seconds, cost.memory + in_process, cost.disk)
            for name, status, cost in rows
        ],
        seconds=sum_of_all.seconds,
        memory=sum_of_all.memory + in_process,
        memory_available=torch.cuda.mem_get_info(device)[0] if on_gpu else machine.available_memory(),
        disk=sum_of_all.disk,
        scratch=sum_of_all.scratch,
        disk_free=machine.free_disk(Path(recipe.store)),
        warnings=[
            *([inputs.tokens.warning] if inputs.tokens and inputs.tokens.warning else []),
            *shared_text(recipe, inputs.tokens, inputs.windows),
            *preflight_warnings(recipe, inputs.original, load.shapes, load.calibration.tokens, scored),
            *export_warnings(recipe, inputs.original, found.layers),
            *task_warnings(inputs.tasks or [], recipe.activations),
        ],
        notes=_notes(recipe, inputs, found),
    )
    return replace(estimate, warnings=[*estimate.warnings, *_shortages(estimate, recipe)])


def workload(recipe: Recipe, inputs: RunInputs, found: DryRun) -> Workload:
    """What the costs are computed from. Measures the machine for a fraction of a second."""
    model = inputs.original
    shapes = shapes_of(model, found.layers)
    return Workload(
        shapes=shapes,
        recipe=recipe,
        calibration=found.calibration,
        evaluation=found.evaluation,
        shares_hessians=found.shares_hessians,
        element=model.dtype.itemsize,
        dtype=model.checkpoint.dtype,
        speeds=measure_speeds(model.device, model.dtype, shapes.hidden, shapes.widest),
    )


def _rows(recipe: Recipe, inputs: RunInputs, found: DryRun, load: Workload) -> list[Row]:
    """In the order of the run."""
    windows_status = TO_FETCH if inputs.windows is None else EVERY_RUN
    tasks_status = TO_FETCH if inputs.tasks is None else EVERY_RUN
    return [
        *([(TASKS, tasks_status, Cost(seconds=TASKS_SECONDS))] if recipe.evaluation.tasks else []),
        ("model", EVERY_RUN, load.model()),
        *((stage.name, status, stage.cost(load).remaining(status.share)) for stage, status in inputs.tokens_stages),
        ("evaluation tokens", windows_status, load.text(load.evaluation)),
        *((stage.name, status, stage.cost(load).remaining(status.share)) for stage, status in found.stages),
        ("file hashes", EVERY_RUN, load.file_hashes()),
        ("audit", EVERY_RUN, load.audit()),
        (RUN_DIRECTORY, EVERY_RUN, load.run_directory(linked=_one_disk(recipe))),
    ]


def _one_disk(recipe: Recipe) -> bool:
    """Whether run directories can be hard links to the store."""
    places = [nearest_existing(Path(place)) for place in (recipe.store, recipe.output_dir)]
    return len({place.stat().st_dev for place in places}) == 1


def _notes(recipe: Recipe, inputs: RunInputs, found: DryRun) -> list[str]:
    notes = list(found.notes)
    if any(status == UNKNOWN for _, status in found.stages):
        if found.unread is not None:
            notes.append(f"unknown until a run has read the weights once: what the store has of {found.unread}")
        if inputs.windows is None:
            text = f"evaluation.dataset={recipe.evaluation.dataset}"
            notes.append(f"unknown, since a plan does not contact the hub: what the store has of {text}")
    if inputs.tasks is None:
        tasks = ",".join(recipe.evaluation.tasks)
        notes.append(f"not estimated: evaluation.tasks=[{tasks}], whose samples are yet to be downloaded from the hub")
    if recipe.evaluation.tasks:
        notes.append("evaluation.tasks hold the complete model in memory, all other stages one block at a time")
    if inputs.original.device.type == "cuda":
        notes.append("memory is that of the GPU; the memory of the process is not estimated")
    return notes


def _shortages(estimate: RunEstimate, recipe: Recipe) -> list[str]:
    found = []
    if estimate.memory > estimate.memory_available:
        stage = max(estimate.stages, key=lambda stage: stage.memory).name
        runtime = recipe.runtime
        suspended = f"runtime.suspended_activations_gb={runtime.suspended_activations_gb:g}"
        keys = f"{suspended}, runtime.batch_tokens={runtime.batch_tokens}"
        way_out = "lower these, or calibration.num_samples"
        if stage.partition(" ")[0] in recipe.evaluation.tasks:
            keys, way_out = (
                f"evaluation.tasks=[{','.join(recipe.evaluation.tasks)}]",
                "measure them where there is more",
            )
        elif stage == REFINE and isinstance(recipe.refinement, ModelRefinement):
            keys, way_out = "refinement=model", "refinement=block takes that of one block"
        found.append(
            f"{keys}: stage {stage} takes about {estimate.memory / 1e9:.3g} GB of memory, and "
            f"{estimate.memory_available / 1e9:.3g} GB are free; {way_out}"
        )
    copied = 0.0 if _one_disk(recipe) else next(stage.disk for stage in estimate.stages if stage.name == RUN_DIRECTORY)
    places = (
        ("store", recipe.store, estimate.disk - copied + estimate.scratch, estimate.disk_free),
        ("output_dir", recipe.output_dir, copied, machine.free_disk(Path(recipe.output_dir))),
    )
    for key, place, written, free in places:
        if written > free:
            found.append(
                f"{key}={place}: the run writes about {written / 1e9:.3g} GB there, and {free / 1e9:.3g} GB are free; "
                f"give {key}=DIR on another disk"
            )
    return found
