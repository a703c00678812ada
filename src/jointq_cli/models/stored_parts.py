"""Where a checkpoint holds a parameter: in a tensor of its own, in parts of others, or in several.

transformers merges and splits tensors when it loads some architectures: the experts of Mixtral are stored one by one
(experts.3.w1.weight) and run as one parameter (experts.gate_up_proj). Its conversions are followed here on views of
tensors without memory, so that a parameter is read from, and written to, where the checkpoint has it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from jointq_cli.errors import ModelError
from jointq_cli.models.tensor_source import TensorSource


@dataclass(frozen=True)
class StoredPart:
    """Elements of a stored tensor, in the orientation of the parameter: a view of it."""

    tensor: str  # stored name
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    is_whole: bool  # all of the tensor, as it is stored

    def of(self, stored: Tensor) -> Tensor:
        """The view of `stored`, which must be contiguous unless the part is all of it."""
        return stored if self.is_whole else stored.as_strided(self.shape, self.stride, self.offset)


@dataclass(frozen=True)
class Location:
    """Where a checkpoint has a parameter: in one part, or in several that follow each other along the first dimension
    (the outer tuple) and the second."""

    parts: tuple[tuple[StoredPart, ...], ...]

    @property
    def tensors(self) -> list[str]:
        """Their stored names."""
        return [part.tensor for row in self.parts for part in row]

    @property
    def whole(self) -> str | None:
        """The stored tensor that is the parameter, None where there is no such."""
        part = self.parts[0][0]
        return part.tensor if part.is_whole and len(self.tensors) == 1 else None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        first = self.parts[0][0].shape
        long, wide = (row[0].shape[0] for row in self.parts), (part.shape[1] for part in self.parts[0][1:])
        return (*(first and [sum(long)]), *(first[1:2] and [first[1] + sum(wide)]), *first[2:])

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The parameter, from stored tensors by name; a view of one where that has it in one part."""
        return _joined([_joined([part.of(tensors[part.tensor]) for part in row], 1) for row in self.parts], 0)

    def write(self, value: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Changes stored tensors in place, so that `read` returns `value`."""
        for row, values in zip(self.parts, value.split([row[0].shape[0] for row in self.parts]), strict=True):
            if len(row) == 1:
                row[0].of(tensors[row[0].tensor]).copy_(values)
            else:
                for part, each in zip(row, values.split([part.shape[1] for part in row], dim=1), strict=True):
                    part.of(tensors[part.tensor]).copy_(each)


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


@dataclass(frozen=True)
class View:
    """A view of a stored tensor's stand-in on the meta device."""

    tensor: str  # stored name
    base: Tensor
    view: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "View":
        return View(self.tensor, self.base, change(self.view))

    def part(self) -> StoredPart:
        shape, stride, offset = tuple(self.view.shape), self.view.stride(), int(self.view.storage_offset())
        is_whole = (shape, stride, offset) == (tuple(self.base.shape), self.base.stride(), 0)
        return StoredPart(self.tensor, shape, stride, offset, is_whole)


Pieces = list[list[View]]  # of a tensor: the outer list along its first dimension, the inner ones along the second


@dataclass(frozen=True)
class FusedSlice:
    """Where a fused parameter of all experts has the weight (out, in) or bias (out,) of one expert's layer."""

    parameter: str  # such as gate_up_proj
    expert: int
    is_transposed: bool  # the parameter is (experts, in, out)
    rows: slice  # of the output features, counted over all layers of an expert that are fused

    def of(self, fused: Tensor) -> Tensor:
        """The slice of the parameter."""
        return self._turned(fused[self.expert])[self.rows]

    def of_pieces(self, fused: Pieces) -> Pieces:
        """The slice of a parameter in pieces. Raises ModelError where it is no view of them."""
        row, expert = (fused[0], self.expert) if len(fused) == 1 else (fused[self.expert], 0)
        turned = [view.map(lambda view: self._turned(view[expert])) for view in row]
        if len(turned) == 1:
            return [[turned[0].map(lambda view: view[self.rows])]]
        if self.is_transposed or self.rows.step is not None:
            raise ModelError(f"{row[0].tensor}: is fused with {row[1].tensor} in a way that is not supported")
        return [[part] for part in _rows(turned, self.rows)]

    def _turned(self, matrix: Tensor) -> Tensor:
        return matrix.T if self.is_transposed else matrix


def _rows(pieces: Sequence[View], chosen: slice) -> list[View]:
    """Of a matrix whose pieces follow each other along the first dimension."""
    start, found = 0, []
    first, last, _ = chosen.indices(sum(len(piece.view) for piece in pieces))
    for piece in pieces:
        inside = slice(max(0, first - start), max(0, last - start))
        if len(piece.view[inside]):
            found.append(piece.map(lambda view, inside=inside: view[inside]))  # type: ignore[misc]
        start += len(piece.view)
    return found


@dataclass(frozen=True)
class StoredTensors:
    """The tensors of a source, and the pieces of each parameter that transformers would make of them."""

    names: dict[str, str]  # stored name -> name in the module that transformers builds
    pieces: dict[str, Pieces]  # name in that module -> pieces

    def locations(self, split: Mapping[str, tuple[str, FusedSlice]]) -> dict[str, Location]:
        """Of each parameter. split: name of a parameter that transformers does not have -> name of the fused one, and
        the slice of it."""
        fused = {name for name, _ in split.values()}
        pieces = {name: each for name, each in self.pieces.items() if name not in fused}
        for name, (parameter, part) in split.items():
            with suppress(KeyError, IndexError):  # it is missing, as its name will be
                pieces[name] = part.of_pieces(self.pieces[parameter])
        return {
            name: Location(tuple(tuple(view.part() for view in row) for row in each)) for name, each in pieces.items()
        }


def stored_tensors(module: Any, source: TensorSource, used: Iterable[str]) -> StoredTensors:
    """module: as transformers builds it. used: names of its tensors that must be read.

    Raises ModelError where a conversion of transformers makes them with more than views of stored tensors.
    """
    transforms = get_model_conversion_mapping(module)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, needed = module.state_dict(keep_vars=True), set(used)
    names: dict[str, str] = {}
    pieces: dict[str, Pieces] = {}
    to_convert: dict[str, dict[str, list[View]]] = {}
    for stored in sorted(source.shapes, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, module.base_model_prefix, state)
        if name not in state and stored in state:  # has the name that the module uses already, as transformers says
            name, pattern = stored, None
        names[stored] = name
        base = torch.empty(source.shapes[stored], device="meta")
        if pattern is None:
            pieces[name] = [[View(stored, base, base)]]
        else:
            to_convert.setdefault(name, {}).setdefault(pattern, []).append(View(stored, base, base))
    for name, sources in to_convert.items():
        converter = by_pattern[next(iter(sources))]
        targets = [name.replace(converter.target_patterns[0], target, 1) for target in converter.target_patterns]
        if needed.intersection(targets):
            try:
                converted = _converted(converter, sources, state[name].shape)
            except _UnknownConversionError as error:
                raise ModelError(
                    f"{source.directory}: {type(module).__name__} stores {sources[error.args[0]][0].tensor} in another "
                    f"layout than it runs ({error.args[1]}), which is not supported"
                ) from error
            pieces |= dict(zip(targets, converted, strict=True))
    return StoredTensors(names, pieces)


class _UnknownConversionError(Exception):
    """The pattern of the stored tensors, and the operation."""


def _converted(converter: WeightConverter, sources: Mapping[str, list[View]], shape: torch.Size) -> list[Pieces]:
    """What each target of the converter is made of. sources: pattern -> the tensors that match it, in order."""
    first = next(iter(sources))
    found = [[[view] for view in sources[pattern]] for pattern in converter.source_patterns if pattern in sources]
    for operation in converter.operations:
        alone = found[0][0][0] if len(found) == len(found[0]) == len(found[0][0]) == 1 else None
        match operation:
            case MergeModulelist(dim=0):
                found = [[[view.map(lambda tensor: tensor[None]) for view in row] for row in each] for each in found]
            case Concatenate(dim=0):
                found = [[row for each in found for row in each]]
            case Concatenate(dim=1):
                found = [[[view for row in together for view in row] for together in zip(*found, strict=False)]]
            case Transpose() if alone:
                if not operation.check_dims or alone.view.shape != shape:
                    found = [[[alone.map(partial(torch.transpose, dim0=operation.dim0, dim1=operation.dim1))]]]
            case Interleave(dim=1, inverse=False) if alone:
                found = [[[alone.map(lambda tensor: tensor[:, ::2]), alone.map(lambda tensor: tensor[:, 1::2])]]]
            case Chunk(dim=0, num_shards_attribute=None) if alone:
                views = alone.view.chunk(len(converter.target_patterns))
                found = [[[View(alone.tensor, alone.base, view)]] for view in views]
            case _:
                raise _UnknownConversionError(first, str(operation))
    if len(found) != len(converter.target_patterns):
        raise _UnknownConversionError(first, f"into {len(found)} tensors")
    return found
