"""Solving layers for the loss: their outputs are weighed against each other, and tokens by what they do to the loss.

With the error E = W - W_q of a layer, inputs x and the gradients g of the loss with respect to its outputs, the loss
rises by about tr(G E H E^T) / 2, where H = mean x x^T and G = mean g g^T are Kronecker factors of the Fisher
information (K-FAC: Martens, Grosse, ICML 2015). A quantizer minimises e H e^T for every row alone, as if G were the
identity. Here rows are solved in blocks, one after the other, and later ones compensate the errors of those before, as
columns do in GPTQ: the target of the rows s is

    W_s - strength P_sd P_dd^-1 E_d,     P = (G + damping mean diag(G) I)^-1,

with d the rows before (Tseng et al., "Model-preserving adaptive rounding", 2025, factorise both sides so). In each of
the `rounds` that follow every block is solved once more, against the errors of all others,

    W_s + strength G_ss^-1 G_sr E_r      with G damped and r all rows but s,

and replaces the block where tr(G E H E^T) falls. docs/curvature.md has what was measured.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jointq_cli.errors import ConfigError
from jointq_cli.quantization.quantizers.base import Quantizer, Solution
from jointq_cli.quantization.quantizers.cholesky import damped, factorize
from jointq_cli.setting_rules import check_settings, setting

Solve = Callable[[Tensor], Solution]  # of some rows (rows, in) float32


@dataclass(frozen=True)
class Coupling:
    """The outputs of one layer weighed against each other. outputs: G (rows, rows) float64 of consecutive rows, which
    are not coupled to those of another G."""

    outputs: Sequence[Tensor]
    strength: float
    damping: float
    row_blocks: int
    rounds: int = 0

    def solve(self, weight: Tensor, hessian: Tensor, solve: Solve, dtype: torch.dtype) -> Iterator[Solution]:
        """The solutions of consecutive rows. weight: (out, in) float32. hessian: (in, in) float64, in which `solve`
        minimises the errors of rows, with scales stored as `dtype`. Raises NumericsError where G cannot be
        factorised."""
        for outputs, rows in zip(self.outputs, weight.double().split([*map(len, self.outputs)]), strict=True):
            coupled = _CoupledRows(self, outputs, rows, solve, dtype)
            for _ in range(self.rounds):
                coupled.solve_again(hessian)
            yield from coupled.solutions

    def error(self, error: Tensor, hessian: Tensor) -> float:
        """As `loss_error`."""
        return loss_error(self.outputs, error, hessian)


class _CoupledRows:
    """The rows (rows, in) float64 of one G, solved block after block."""

    def __init__(self, coupling: Coupling, outputs: Tensor, weight: Tensor, solve: Solve, dtype: torch.dtype) -> None:
        self.coupling, self.weight, self.dtype = coupling, weight, dtype
        self._solve = solve
        order = torch.arange(len(weight), device=weight.device)
        self.blocks = [slice(int(rows[0]), int(rows[-1]) + 1) for rows in order.chunk(coupling.row_blocks)]
        factor = factorize(outputs, order, coupling.damping, None, torch.float64, key="curvature.damping")
        self.outputs = damped(outputs, factor.damping)
        self.error = torch.empty_like(weight)
        self.solutions = list(self._in_turn(factor.upper))

    def _in_turn(self, upper: Tensor) -> Iterator[Solution]:
        """Each block for what it and the later ones can do about the errors of those before."""
        target = self.weight.clone()
        for rows in self.blocks:
            solution, represented = self._solved(target[rows])
            square, later = upper[rows, rows], upper[rows, rows.stop :]
            left = torch.linalg.solve_triangular(square, later, upper=True).T @ (target[rows] - represented)
            target[rows.stop :] -= self.coupling.strength * left
            self.error[rows] = self.weight[rows] - represented
            yield solution

    def solve_again(self, hessian: Tensor) -> None:
        """Each block for the errors that all others have now; what does not lower tr(G E H E^T) is not kept."""
        for number, rows in enumerate(self.blocks):
            square, error = self.outputs[rows, rows], self.error[rows]
            others = self.outputs[rows] @ self.error - square @ error
            best = -torch.linalg.solve(square, others)  # where the loss is least, given the other errors
            solution, represented = self._solved(self.weight[rows] - self.coupling.strength * best)
            found = self.weight[rows] - represented
            if loss_error([square], found - best, hessian) < loss_error([square], error - best, hessian):
                self.error[rows], self.solutions[number] = found, solution

    def _solved(self, target: Tensor) -> tuple[Solution, Tensor]:
        """With the weights that the solution represents."""
        solution = self._solve(target.float())
        return solution, solution.quantized.dequantize(self.dtype).double()


def loss_error(outputs: Sequence[Tensor], error: Tensor, hessian: Tensor) -> float:
    """tr(G E H E^T). outputs: the diagonal blocks of G (out, out); error: E (out, in) float32; hessian: H (in, in)
    float64."""
    parts = zip(outputs, error.double().split([*map(len, outputs)]), strict=True)
    return sum(float(((block @ part) * (part @ hessian)).sum()) for block, part in parts)


@dataclass(frozen=True)
class Curvature(ABC):
    """Base of the settings under `curvature`."""

    @property
    def tokens_by_energy(self) -> float:
        """The share in the weights of tokens of what the loss says; 0: none."""
        return 0.0

    @property
    def solves(self) -> int:
        """How often each row is solved."""
        return 1

    @property
    def seeds(self) -> Mapping[str, int]:
        """The seeds of all random choices, by the key of the recipe."""
        return {}

    @abstractmethod
    def describe(self) -> str:
        """A few words for the report, "" where layers are solved for their own outputs."""


@dataclass(frozen=True)
class NoCurvature(Curvature):
    """All outputs of a layer, and all tokens, count alike."""

    def describe(self) -> str:
        return ""


@dataclass(frozen=True)
class Kfac(Curvature):
    """The fields are described in configs/curvature/kfac.yaml, the method at the top of this module."""

    seed: int = setting(0, least=0, most=2**63 - 1)
    token_mix: float = setting(0.0, least=0, most=1)
    strength: float = setting(1.0, least=0, most=1)
    damping: float = setting(1.0, least=0)
    row_blocks: int = setting(48, least=1)
    rounds: int = setting(2, least=0)

    def __post_init__(self) -> None:
        check_settings(self, "curvature")

    @property
    def tokens_by_energy(self) -> float:
        return self.token_mix

    @property
    def solves(self) -> int:
        return 1 + self.rounds if self.strength else 1

    @property
    def seeds(self) -> Mapping[str, int]:
        return {"curvature.seed": self.seed}

    def describe(self) -> str:
        mix = f" token_mix={self.token_mix:g}" if self.token_mix else ""
        return f"K-FAC strength={self.strength:g}{mix}"

    def check_quantizers(self, quantizers: Sequence[Quantizer]) -> None:
        """Raises ConfigError for one that needs all rows of a layer at once."""
        whole = [quantizer.describe() for quantizer in quantizers if not quantizer.row_separable]
        if self.strength and whole:
            raise ConfigError(
                f"curvature.strength={self.strength:g}: must be 0 with {whole[0]}, which needs all rows of a layer at "
                "once, while curvature=kfac solves them in turn"
            )

    def coupling(self, outputs: Sequence[Tensor], rounds: int = 0) -> Coupling | None:
        """None where the outputs are not coupled: by `strength`, or because the loss depends on none of them. rounds:
        none where solutions are only compared."""
        if not self.strength or not outputs or not all(bool(each.diagonal().any()) for each in outputs):
            return None
        return Coupling(outputs, self.strength, self.damping, self.row_blocks, rounds)


NO_CURVATURE = NoCurvature()
