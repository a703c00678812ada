"""What measuring the candidates of a budget costs: a method of `Workload` in a file of its own."""

from dataclasses import replace

from jointq_cli.quantization.allocation import Budget
from jointq_cli.stages.plan.costs import FLOAT, KERNELS, KERNELS_SECONDS, Cost, Workload


def sensitivity_cost(load: Workload) -> Cost:
    """Every layer is solved once for each candidate, as if all Hessians were in the store. With sensitivity=fisher the
    gradient passes through the model besides, and the inputs of each layer through the errors of its candidates."""
    allocation = load.recipe.allocation
    assert isinstance(allocation, Budget)  # there is no such stage without one
    candidates = allocation.of(load.recipe.quantizer)
    seconds = KERNELS_SECONDS + 2 * load.first_batch()
    for quantizer in candidates:
        for one in load.shapes.inputs:
            seconds += load.solving_seconds(replace(one, quantizers=(quantizer,) * len(one.out_features)))
            seconds += sum(2.0 * rows * one.in_features * (rows + one.in_features) for rows in one.out_features) / (
                load.speeds.double
            )
    in_block = 2 * load.block + max(map(load.group_memory, load.shapes.inputs))
    memory = KERNELS + load.first_stream + max(load.outside_rotated, in_block)
    if allocation.sensitivity == "kfac":
        return Cost(seconds=seconds, memory=memory, disk=100.0)
    weights = sum(one.in_features * rows for one in load.shapes.inputs for rows in one.out_features)
    stored = sum(
        quantizer.storage(rows, one.in_features, load.dtype).file_bytes
        for quantizer in candidates
        for one in load.shapes.inputs
        for rows in one.out_features
    )
    gradients, errors = load.gradients(), FLOAT * len(candidates) * load.shapes.largest_block
    products = 2.0 * len(candidates) * load.calibration.tokens * weights / load.speeds.single
    return Cost(
        seconds=seconds + gradients.seconds + products,
        memory=max(memory, gradients.memory + errors),
        disk=100.0,
        scratch=gradients.scratch + stored,
    )
