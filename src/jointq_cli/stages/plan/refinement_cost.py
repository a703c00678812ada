"""What a refinement by gradients costs: a method of `Workload` in a file of its own."""

from jointq_cli.evaluation.perplexity import LOGITS_AT_ONCE
from jointq_cli.quantization.refinement.settings import GradientRefinement, ModelRefinement
from jointq_cli.stages.plan.costs import FLOAT, Cost, Windows, Workload

REFINE_OPERATIONS = 12  # pointwise, per code: to dequantise it, take its gradient or make a step


def refinement_cost(load: Workload) -> Cost:
    """Forward and backward passes, those of all windows held out for each measurement, and Adam's steps."""
    settings, shapes, calibration = load.recipe.refinement, load.shapes, load.calibration
    assert isinstance(settings, GradientRefinement)  # there is no such stage without one
    is_model = isinstance(settings, ModelRefinement)
    measured = (1 + settings.steps // settings.validate_every) * settings.heldout(calibration.count)
    passes = Windows(measured + 3 * settings.steps * settings.windows_per_step, calibration.length)
    updates = settings.steps * REFINE_OPERATIONS * (1 + settings.windows_per_step) * shapes.selected
    head = is_model * load.logits(passes.tokens, models=2)
    weights = load.loaded(shapes.in_blocks) + 2 * load.outside_rotated if is_model else 2 * load.block
    state = settings.state_bytes(shapes.selected if is_model else shapes.largest_block)
    activations = (shapes.blocks if is_model else 1) * trained_activations(load)
    logits = is_model * 6 * FLOAT * min(LOGITS_AT_ONCE, shapes.vocabulary * calibration.length)
    everything = Windows(calibration.count + settings.generated, calibration.length)
    stream = load.stream(everything)
    return Cost(
        seconds=load.forward(passes) + updates / load.speeds.pointwise + head + 3 * load.forward(everything),
        memory=weights + state + activations + logits + (1 if is_model else 3) * stream,
        disk=load.quantized_bytes + load.codes,
        scratch=state + 2 * stream,
    )


def trained_activations(load: Workload) -> float:
    """Bytes of what autograd keeps of one window in one block."""
    shapes, length = load.shapes, load.calibration.length
    return length * load.element * (8 * shapes.hidden + 4 * shapes.widest + shapes.heads * length / 8)
