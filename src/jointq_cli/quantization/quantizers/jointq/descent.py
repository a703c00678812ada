"""Descent by sweeps over the groups of a layer: what searches on uniform and on K grids share.

A solution of a tile of rows represents weights; a row with error e = w - represented costs e H_l e'. Rows are
independent: a row's result depends on its weights and the metric only.

In a matrix product the bits of a row are independent of the other rows only if their number is a multiple of PADDING
(measured with MKL on AVX-512, and asserted in the tests), so tiles are padded with rows of zeros.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from jointq_cli.quantization.quantizers.jointq.metric import Metric

PADDING = 16


@dataclass(frozen=True)
class RowState(ABC):
    """A solution of a tile: tensors (rows, ...), floating point, of which `levels` has a column for each weight."""

    levels: Tensor

    @abstractmethod
    def values(self, metric: Metric) -> Tensor:
        """The weights (rows, in) that it represents, in the metric's order."""

    def take(self, rows: Tensor) -> Self:
        return combined(lambda tensor: tensor[rows], self)

    def copy(self) -> Self:
        return combined(torch.clone, self)

    def put(self, rows: Tensor, other: Self) -> None:
        """Writes the other's rows to these."""
        for field in fields(self):
            getattr(self, field.name)[rows] = getattr(other, field.name)

    def padded(self, rows: int, like: Tensor) -> Self:
        """With further rows up to so many, which mean nothing, in the dtype of `like`."""

        def pad(tensor: Tensor, value: float) -> Tensor:
            return with_rows(tensor.to(like.dtype), rows, value)

        found = {field.name: pad(getattr(self, field.name), field.name != "levels") for field in fields(self)}
        return type(self)(**found)


S = TypeVar("S", bound=RowState)
T = TypeVar("T")


@dataclass(frozen=True)
class SearchResult(Generic[S]):
    """The end of a search, one entry per row; costs are e H_l e' in the unit of the metric, float64."""

    state: S
    start_cost: Tensor
    cost: Tensor
    sweeps: Tensor  # in which the row changed
    steps: Tensor  # of the kernel

    def head(self, rows: int) -> "SearchResult[S]":
        """The first `rows` rows."""
        return combined(lambda tensor: tensor[:rows], self)

    @classmethod
    def joined(cls, parts: "list[SearchResult[S]]") -> "SearchResult[S]":
        """Tiles concatenated."""
        return combined(lambda *tensors: torch.cat(tensors), *parts)

    def with_rows(self, rows: Tensor, other: "SearchResult[S]") -> "SearchResult[S]":
        """With `other` in place of these rows."""
        return combined(lambda mine, theirs: mine.index_copy(0, rows, theirs), self, other)

    def or_better(self, other: "SearchResult[S]") -> "SearchResult[S]":
        """For each row the result that costs less; this one where both cost the same."""
        wins = other.cost < self.cost
        return combined(
            lambda mine, theirs: torch.where(wins if mine.dim() == 1 else wins[:, None], theirs, mine), self, other
        )


def combined(function: Callable[..., Tensor], *values: T) -> T:
    """`function` applied to the corresponding tensors of dataclasses of tensors, which are (rows,) or (rows, n)."""
    first: Any = values[0]
    found: dict[str, Any] = {}
    for field in fields(first):
        parts = [getattr(value, field.name) for value in values]
        found[field.name] = function(*parts) if isinstance(parts[0], Tensor) else combined(function, *parts)
    return type(first)(**found)  # type: ignore[no-any-return]


class Descent(ABC, Generic[S]):
    """A search in one metric. Targets are weights (rows, in) in the metric's order and dtype."""

    metric: Metric

    @abstractmethod
    def _empty(self, target: Tensor) -> S:
        """A state for `target` with any content."""

    @abstractmethod
    def _start_group(self, state: S, t: int, wanted: Tensor, metric: Tensor) -> Tensor:
        """Solves group t for `wanted` (rows, columns) in `metric`, and writes it to `state`. Returns the error."""

    @abstractmethod
    def _sweep(self, target: Tensor, state: S) -> tuple[Tensor, Tensor]:
        """One sweep, in place, which raises no row's cost. Returns steps and decrease of the cost, both (rows,)."""

    def schur_start(self, target: Tensor) -> S:
        """Group after group in the metric S_t, in which all later groups compensate its error.

        GPTQ (Frantar et al. 2023) with groups in place of columns: after each group, the error times U_tt^-1 U_t,later
        is subtracted from the targets of the later ones.
        """
        work = target.clone()
        state = self._empty(target)
        for t in range(self.metric.groups):
            span = self.metric.span(t)
            error = self._start_group(state, t, work[:, span].contiguous(), self.metric.schur[span, span].contiguous())
            work[:, span.stop :].addmm_(error, self.metric.schur[span, span.stop :], alpha=-1.0)
        return state

    def descend(self, target: Tensor, start: S, sweeps: int) -> SearchResult[S]:
        """Sweeps over all groups with the full metric; a row is done after `sweeps`, or when one does not change it."""
        rows = torch.arange(len(target), device=target.device)
        state, result = start.copy(), start.copy()
        steps, moved = torch.zeros_like(rows), torch.zeros_like(rows)
        decrease = torch.zeros(len(rows), dtype=torch.float64, device=target.device)
        active = target
        for _ in range(sweeps):
            taken, gained = self._sweep(active, state)
            result.put(rows, state)
            steps[rows] += taken
            moved[rows] += taken > 0
            decrease[rows] += gained
            if not bool(taken.any()):
                break
            keep = _padded(torch.nonzero(taken)[:, 0], len(taken))
            rows, active, state = rows[keep], active[keep], state.take(keep)
        cost = self.cost(target, result)
        return SearchResult(result, cost + decrease, cost, moved, steps)

    def cost(self, target: Tensor, state: S) -> Tensor:
        """e H_l e' of each row, (rows,) float64, in the unit of the metric."""
        error = target - state.values(self.metric)
        return torch.sum((error @ self.metric.full).mul_(error), dim=1, dtype=torch.float64)


def with_rows(tensor: Tensor, rows: int, value: float) -> Tensor:
    if len(tensor) == rows:
        return tensor
    return torch.cat([tensor, tensor.new_full((rows - len(tensor), tensor.shape[1]), value)])


def _padded(rows: Tensor, available: int) -> Tensor:
    """`rows` (indices) of a tile, and other rows of it up to a multiple of PADDING."""
    missing = -len(rows) % PADDING
    if not missing:
        return rows
    others = torch.ones(available, dtype=torch.bool, device=rows.device)
    others[rows] = False
    return torch.cat([rows, torch.nonzero(others)[:missing, 0]])
