"""Solves one layer in all processes of a team: each solves some of its rows, and all receive the complete layer.

Where a step needs all rows (a lambda chosen per layer, for instance), process 0 solves the layer alone.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jointq_cli.quantization.curvature import Coupling
from jointq_cli.quantization.qep import Correction
from jointq_cli.quantization.quantizers.base import ROWS, Prepared, Quantizer, Solution
from jointq_cli.quantization.quantizers.statistics import Energies, ExpertTokens
from jointq_cli.system.distributed import Team


@dataclass(frozen=True)
class LayerSolution:
    """Some rows of a layer, or all of them."""

    solution: Solution
    notes: dict[str, float]  # of the correction
    energies: Energies
    dequantized: Tensor | None  # (rows, in) in the dtype of the checkpoint; None if this process has not computed it

    def weight(self, dtype: torch.dtype) -> Tensor:
        """(rows, in), dequantised to the dtype of the checkpoint."""
        return self.solution.quantized.dequantize(dtype) if self.dequantized is None else self.dequantized

    def to_cpu(self) -> "LayerSolution":
        """The same to be sent to other processes."""
        solution = replace(self.solution, quantized=self.solution.quantized.to("cpu"))
        return replace(self, solution=solution, dequantized=None)


@dataclass(frozen=True)
class Solver:
    """Solves the layers of a group. Its fields but the team's depend on their common input alone."""

    quantizer: Quantizer
    prepared: Prepared
    correction: Correction
    hessian: Tensor
    team: Team
    preparation_seconds: float  # divided by the number of layers
    tokens: ExpertTokens | None  # where the layers are those of experts
    coupling: Coupling | None = None  # of one layer's outputs

    def solve(self, weight: Tensor, dtype: torch.dtype) -> LayerSolution:
        """weight: (out, in) float32, of a checkpoint in `dtype`."""
        if self.coupling or not (self.quantizer.row_separable and self.correction.row_separable):
            return self._solve_on_rank0(weight, dtype)
        own = self.team.part(len(weight), ROWS)
        part = self._solve_rows(weight, own, dtype) if own.start < own.stop else None
        parts = [part for part in self._gather(part) if part is not None]
        if len({part.solution.verdict for part in parts}) > 1:  # a part failed, and with it the layer
            return self._solve_on_rank0(weight, dtype)
        return LayerSolution(
            solution=self.quantizer.join([part.solution for part in parts]),
            notes=parts[0].notes,
            energies=sum((part.energies for part in parts[1:]), parts[0].energies),
            dequantized=parts[0].dequantized if len(parts) == 1 else None,
        )

    def _solve_on_rank0(self, weight: Tensor, dtype: torch.dtype) -> LayerSolution:
        solved = self.team.on_rank0(self._solve_rows, weight, slice(0, len(weight)), dtype)
        [solution] = [found for found in self._gather(solved) if found is not None]
        return solution

    def _solve_rows(self, weight: Tensor, rows: slice, dtype: torch.dtype) -> LayerSolution:
        corrected = self.correction.of_rows(rows).apply(weight[rows])
        solution = self._quantize(corrected.weight, dtype)
        dequantized = solution.quantized.dequantize(dtype)
        energies = Energies.of(corrected.weight, dequantized.float(), self.hessian)
        return LayerSolution(solution, corrected.notes, energies, dequantized)

    def _quantize(self, weight: Tensor, dtype: torch.dtype) -> Solution:
        def solve(rows: Tensor) -> Solution:
            return self.quantizer.quantize(rows, self.prepared, dtype)

        if self.coupling is None:
            return solve(weight)
        parts = list(self.coupling.solve(weight, self._metric(), solve, dtype))
        if len({part.verdict for part in parts}) > 1:  # some rows could not be solved, and with them the layer
            alone = solve(weight)
            return replace(alone, notes={**alone.notes, "uncoupled": 1.0})
        joined = self.quantizer.join(parts)
        error, signal = (
            self.coupling.error(each, self.hessian)
            for each in (weight - joined.quantized.dequantize(dtype).float(), weight)
        )
        return replace(joined, notes={**joined.notes, "loss_error": error / signal if signal > 0 else 0.0})

    def _metric(self) -> Tensor:
        """What the quantizer minimises the errors of rows in."""
        ridge = self.quantizer.ridge(self.hessian)
        return self.hessian if ridge is None else self.hessian + torch.diag(ridge)

    def _gather(self, found: LayerSolution | None) -> list[LayerSolution | None]:
        if self.team.size == 1:
            return [found]
        return self.team.gather(None if found is None else found.to_cpu())
