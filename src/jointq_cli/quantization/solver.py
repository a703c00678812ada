"""One layer on its way through a team: every process solves some of its rows, and all get the whole layer.

What needs to see the whole layer (a lambda that is chosen for it, say) is solved by the leader alone. Knows weights,
quantizers and corrections; no blocks, no files.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jointq_cli.quantization.qep import Corrected, Correction
from jointq_cli.quantization.quantizers.base import ROWS, Prepared, Quantizer, Solution
from jointq_cli.quantization.quantizers.statistics import Energies
from jointq_cli.system.distributed import Team


@dataclass(frozen=True)
class LayerSolution:
    """Some rows of a layer, or all of them: the solution, what the correction had to say, and the errors."""

    solution: Solution
    notes: dict[str, float]
    energies: Energies

    @property
    def portable(self) -> "LayerSolution":
        """The same in main memory."""
        return replace(self, solution=replace(self.solution, quantized=self.solution.quantized.to("cpu")))


@dataclass(frozen=True)
class Solver:
    """Solves the layers that share an input."""

    quantizer: Quantizer
    prepared: Prepared
    correction: Correction
    hessian: Tensor
    team: Team

    def solve(self, weight: Tensor, dtype: torch.dtype) -> LayerSolution:
        """weight: (out, in) float32, of a checkpoint in `dtype`."""
        if not (self.quantizer.row_separable and self.correction.row_separable):
            return self._alone(weight, dtype)
        own = self.team.part(len(weight), ROWS)
        part = self._rows(weight, own, dtype) if own.start < own.stop else None
        parts = [part for part in self._gathered(part) if part is not None]
        if len({part.solution.verdict for part in parts}) > 1:  # a part failed, and with it the layer
            return self._alone(weight, dtype)
        solution = self.quantizer.join([part.solution for part in parts])
        energies = sum((part.energies for part in parts[1:]), parts[0].energies)
        return LayerSolution(solution, parts[0].notes, energies)

    def _alone(self, weight: Tensor, dtype: torch.dtype) -> LayerSolution:
        """The leader's solution of all rows."""
        solved = self.team.on_rank0(self._rows, weight, slice(0, len(weight)), dtype)
        [whole] = [found for found in self._gathered(solved) if found is not None]
        return whole

    def _rows(self, weight: Tensor, rows: slice, dtype: torch.dtype) -> LayerSolution:
        wanted: Corrected = self.correction.of_rows(rows).apply(weight[rows])
        solution = self.quantizer.quantize(wanted.weight, self.prepared, dtype)
        as_stored = solution.quantized.dequantize(dtype).float()
        return LayerSolution(solution, wanted.notes, Energies.of(wanted.weight, as_stored, self.hessian))

    def _gathered(self, found: LayerSolution | None) -> list[LayerSolution | None]:
        if self.team.size == 1:
            return [found]
        return self.team.gather(None if found is None else found.portable)
