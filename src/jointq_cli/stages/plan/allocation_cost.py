"""What measuring the candidates of a budget costs: a method of `Workload` in a file of its own."""

from dataclasses import replace

from jointq_cli.quantization.allocation import Budget
from jointq_cli.stages.plan.costs import KERNELS, KERNELS_SECONDS, Cost, Workload


def sensitivity_cost(load: Workload) -> Cost:
    """Every layer is solved once for each candidate, as if all Hessians were in the store."""
    allocation = load.recipe.allocation
    assert isinstance(allocation, Budget)  # there is no such stage without one
    seconds = KERNELS_SECONDS + 2 * load._first_batch()
    for quantizer in allocation.of(load.recipe.quantizer):
        for one in load.shapes.inputs:
            seconds += load._solving_seconds(replace(one, quantizers=(quantizer,) * len(one.out_features)))
            seconds += sum(2.0 * rows * one.in_features * (rows + one.in_features) for rows in one.out_features) / (
                load.speeds.double
            )
    in_block = 2 * load._block + max(map(load._group_memory, load.shapes.inputs))
    return Cost(seconds=seconds, memory=KERNELS + load._first_stream + max(load._outside_rotated, in_block), disk=100.0)
