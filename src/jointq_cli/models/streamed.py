"""A decoder-only language model of which only one block of weights is in memory at a time.

The model's own forward pass computes masks, positions and rotary embeddings: it runs once with every block replaced by
one that records its arguments, and from then on each block is called with these arguments. So nothing here depends on
an architecture, as long as the decoder blocks are one ModuleList and their arguments other than the hidden states do
not depend on the tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from jointq_cli.errors import ModelError, NumericsError
from jointq_cli.models import online_rotation as online
from jointq_cli.models.checkpoint import Checkpoint, require_finite
from jointq_cli.models.experts import split_experts
from jointq_cli.models.layer_ref import LayerRef, layer_refs
from jointq_cli.models.skeleton import (
    build_skeleton,
    check_dtypes,
    check_tensors,
    find_blocks,
    move_buffers,
    named_state,
    text_state,
    tied_names,
    unload,
)
from jointq_cli.models.stored_parts import Location, stored_tensors
from jointq_cli.models.tensor_source import TensorSource
from jointq_cli.system.machine import release_freed_memory

_MOST_OUTPUTS = 3  # RWKV's blocks return hidden states, a state and attention weights


@dataclass(frozen=True)
class BlockCall:
    """The arguments of a block other than its hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class BlockwiseModel:
    """A model whose weights are read block by block: parameters are on the meta device outside of `outer` and `block`.

    dtype: the compute dtype of the forward pass. Raises ModelError when transformers cannot build the architecture,
    when it has no ModuleList of decoder blocks, when the source's tensors do not fit it, or when it cannot be run block
    by block.
    """

    def __init__(
        self,
        source: TensorSource,
        device: torch.device,
        dtype: torch.dtype,
        trust_remote_code: bool = False,
    ) -> None:
        self.source = source
        self.device = device
        self.dtype = dtype
        self.module = build_skeleton(source, dtype, trust_remote_code)
        self._blocks_name, blocks = find_blocks(self.module)
        self.blocks: list[nn.Module] = list(blocks)
        if online.needs_online(source.config):
            online.attach(self.blocks, source.config)
        self._calls: dict[tuple[int, ...], list[BlockCall]] = {}
        self._outputs = 0  # the length of the tuple that blocks return, hidden states first; 0 for a plain tensor
        self._passed_on: list[int] = []  # positions in it of what the model passes to its next block
        stored = stored_tensors(self.module, source, text_state(self.module))
        fused, unsplit = split_experts(self.module)
        self.unsplit_experts = {name: why for name, why in unsplit.items() if self.block_of(name) is not None}
        self._module_names = stored.names
        self._locations = stored.locations(fused)
        check_tensors(self.module, source, self._locations)
        # The first parameter, of a vision tower perhaps, is where transformers takes a model's device from.
        names = dict.fromkeys([next(self.module.named_parameters())[0], *text_state(self.module)])
        self._outer_names = [name for name in names if self.block_of(name) is None]
        self._require_independent_blocks()
        move_buffers(self.module, device)

    def __len__(self) -> int:
        return len(self.blocks)

    def prefix(self, index: int) -> str:
        """The common prefix of the names of a block's tensors, such as "model.layers.3."."""
        return f"{self._blocks_name}.{index}."

    def stored_name(self, name: str) -> str:
        """The stored name of the module's tensor `name`; they differ where transformers renames on loading. The first
        of several that hold parts of it."""
        return self._locations[name].tensors[0]

    def location(self, name: str) -> Location:
        """Where the source has the module's tensor `name`."""
        return self._locations[name]

    def stores(self, name: str) -> bool:
        """Whether the source holds the module's tensor `name`; False where it holds only one that is tied to it."""
        return name in self._locations

    def module_name(self, stored: str) -> str:
        """The name in the module, as transformers builds it, of what the tensor `stored` is or is a part of."""
        return self._module_names[stored]

    def block_tensors(self, index: int) -> dict[str, Tensor]:
        """The tensors of one block by their stored names, as read from the source."""
        prefix = self.prefix(index)
        return self.source.read(stored for stored, name in self._module_names.items() if name.startswith(prefix))

    def outer_tensors(self) -> dict[str, Tensor]:
        """Every tensor outside the blocks: embeddings, final norm, head, and tensors that the model does not use."""
        return self.source.read(stored for stored, name in self._module_names.items() if self.block_of(name) is None)

    def linear_layers(self) -> dict[str, LayerRef]:
        """Every linear layer by its full name, lm_head included."""
        return layer_refs(self.module)

    @contextmanager
    def outer(self, tensors: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Inside, the parameters outside the blocks that text needs (embeddings, final norm, head) are loaded: `embed`
        and `logits` work.

        tensors: what `outer_tensors` returns, where the caller has read it already.
        """
        locations = [self._locations[name] for name in self._outer_names if name in self._locations]
        stored = [name for location in locations for name in location.tensors]
        try:
            self._load("", self.source.read(stored) if tensors is None else {name: tensors[name] for name in stored})
            self.module.tie_weights()
            self._untie()
            yield
        finally:
            unload(self.module, keep=self.blocks)

    @contextmanager
    def block(self, index: int, tensors: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """Inside, block `index` has the parameters `tensors` (by their names in the checkpoint), cast to the compute
        dtype, and can be run. Raises NumericsError for a parameter with NaN or Inf."""
        try:
            self._load(self.prefix(index), tensors)
            yield self.blocks[index]
        finally:
            unload(self.blocks[index])
            release_freed_memory()

    def embed_all(self, windows: Tensor, batch: int, own: slice = slice(None)) -> Tensor:
        """Inputs of the first block, (windows in own, tokens, hidden) in the compute dtype on the model's device.

        windows: (windows, tokens) int64, `batch` of them per forward pass. own: the windows to compute, in complete
        batches, possibly none. Records how the blocks are called, also where `own` is empty.
        """
        with self.outer():
            first = self.embed(windows[:batch])
            start, stop, _ = own.indices(len(windows))
            hidden = first.new_empty((stop - start, *first.shape[1:]))
            for begin in range(start, stop, batch):
                part = windows[begin : min(begin + batch, stop)]
                hidden[begin - start : begin - start + len(part)] = self.embed(part) if begin else first
            return hidden

    def record_calls(self, windows: Tensor, batch: int) -> None:
        """Records how the blocks are called, as `embed_all` does, without keeping hidden states."""
        with self.outer():
            for part in {len(part): part for part in windows.split(batch)}.values():
                self.embed(part)

    def run_all(self, index: int, hidden: Tensor, batch: int, pause: Callable[[], None] = lambda: None) -> Tensor:
        """Applies block `index` to hidden states (windows, tokens, hidden) in place; calls `pause` after each batch."""
        for part in hidden.split(batch) if len(hidden) else ():
            part.copy_(self.run(index, part))
            pause()
        return hidden

    def embed(self, windows: Tensor) -> Tensor:
        """Inputs (batch, tokens, hidden) of the first block; records how the blocks are called. Needs `outer`.

        windows: (batch, tokens) int64. Raises ModelError where the model cannot be run block by block, or cannot take
        these tokens; NumericsError for NaN or Inf.
        """
        shape = tuple(windows.shape)
        hidden, calls = self._record_calls(windows.to(self.device))
        self._require_same_calls(self._calls.get(shape, calls), calls)
        self._calls[shape] = calls
        self.require_finite_activations("the embeddings", hidden)
        return hidden

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Output (batch, tokens, hidden) of block `index` for an input of the same shape. Needs `block(index)`, and
        an earlier call of `embed` with the same shape of windows. Raises NumericsError for NaN or Inf in the output."""
        call = self._calls[tuple(hidden.shape[:2])][index]
        output = self.blocks[index](hidden, *call.args, **call.kwargs)
        states: Tensor = output[0] if isinstance(output, (tuple, list)) else output
        if any(output[position] is not None for position in self._passed_on):
            raise ModelError(
                f"{self.source.directory}: {type(self.module).__name__} passes to each block what the block before it "
                "returns beside the hidden states; it cannot be run block by block"
            )
        self.require_finite_activations(f"the hidden states after block {index} ({self.prefix(index)[:-1]})", states)
        return states

    def require_finite_activations(self, name: str, states: Tensor) -> None:
        """Raises NumericsError, with the setting to change, for activations with NaN or Inf."""
        if not bool(torch.isfinite(states).all()):
            dtype = str(self.dtype).removeprefix("torch.")
            key = {
                torch.float16: "its largest number is 65504; use runtime.dtype=bfloat16 or runtime.dtype=float32",
                torch.float32: "the weights themselves are at fault",
            }.get(self.dtype, "use runtime.dtype=float32")
            raise NumericsError(f"{self.source.directory}: {name} hold NaN or Inf in {dtype}: {key}")

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (batch, tokens, vocabulary) of hidden states (batch, tokens, hidden) after the last block. Needs
        `outer`."""

        def bypass(index: int, states: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
            return hidden if index == len(self) - 1 else states

        with self._replaced_blocks(bypass):
            ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
            output: Tensor = self.module(input_ids=ids, use_cache=False).logits
            return output

    def _require_independent_blocks(self) -> None:
        """Records calls for two texts of a few tokens, with made-up weights, on the CPU: a model that cannot be run
        block by block is refused before any weight is read."""
        state = dict(named_state(self.module))
        made_up = {name: _made_up(state[name]) for name in self._outer_names if state[name].is_meta}
        try:
            self.module.load_state_dict(made_up, strict=False, assign=True)
            one, other = (self._record_calls(torch.tensor([ids]))[1] for ids in ([3, 4, 5], [6, 7, 8]))
            self._require_same_calls(one, other)
            self._passed_on = self._find_passed_on()
        finally:
            unload(self.module)

    def _find_passed_on(self) -> list[int]:
        """Positions, in the tuples that blocks return, of what becomes an argument of another block: blocks are run
        with None in its place."""
        marks = [object() for _ in range(1, self._outputs)]
        found: set[int] = set()

        def record(index: int, states: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
            given = [*args, *kwargs.values()]
            found.update(1 + place for place, mark in enumerate(marks) if any(each is mark for each in given))
            return states

        with self._replaced_blocks(record, marks), suppress(Exception):  # the model may compute with a mark
            self.module.base_model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
        return sorted(found)

    def _require_same_calls(self, one: list[BlockCall], other: list[BlockCall]) -> None:
        """Raises ModelError where a block's arguments differ between two texts of the same length."""
        names = [
            name for block, *calls in zip(self.blocks, one, other, strict=True) for name in _different(block, *calls)
        ]
        if names:
            raise ModelError(
                f"{self.source.directory}: {type(self.module).__name__} passes its blocks {names[0]} beside the hidden "
                "states, which depends on the tokens; it cannot be run block by block"
            )

    def _record_calls(self, windows: Tensor) -> tuple[Tensor, list[BlockCall]]:
        inputs: list[Tensor] = []
        calls: list[BlockCall] = []

        def record(index: int, states: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
            inputs.append(states)
            calls.append(BlockCall(args, kwargs))
            return states

        failure: Exception | None = None
        outputs = self._outputs
        with self._replaced_blocks(record):
            try:
                self.module.base_model(input_ids=windows, use_cache=False)
            except (RuntimeError, IndexError, TypeError, ValueError, AttributeError) as error:
                failure = error
        is_complete = failure is None and len(calls) == len(self) and all(x.shape == inputs[0].shape for x in inputs)
        if not is_complete and inputs and outputs < _MOST_OUTPUTS:
            # The model unpacks the output of its blocks, and may have taken our tensor apart: return a longer tuple.
            self._outputs = outputs + 1
            try:
                return self._record_calls(windows)
            except ModelError:
                self._outputs = outputs  # what the first attempt found is the reason
        if not is_complete or inputs[0].shape[:-1] != windows.shape:
            reason = self._obstacle(windows, inputs, failure)
            raise ModelError(f"{self.source.directory}: {type(self.module).__name__} {reason}") from failure
        return inputs[0], calls

    def _obstacle(self, windows: Tensor, inputs: list[Tensor], failure: Exception | None) -> str:
        """Why the blocks cannot be run one by one. inputs: of the blocks that were called, until the failure if any."""
        found = " ".join(str(failure).split())[:200]
        if failure is not None and not inputs:
            return f"cannot take windows of {windows.shape[1]} tokens with ids up to {int(windows.max())}: {found}"
        if inputs and inputs[0].shape[:-1] != windows.shape:
            what = f"passes its blocks hidden states of shape {list(inputs[0].shape)}, not (batch, tokens, hidden)"
        elif failure is not None:
            what = f"expects more of its blocks than hidden states ({found})"
        elif len(inputs) != len(self):
            what = f"calls its {len(self)} blocks {len(inputs)} times for one text"
        else:
            what = "passes its blocks hidden states of several shapes"
        return f"{what}; it cannot be run block by block"

    @contextmanager
    def _replaced_blocks(self, forward: Callable[..., Tensor], others: Sequence[Any] = ()) -> Iterator[None]:
        """Inside, block i computes `forward(i, hidden states, other args, other kwargs)`. others: what it returns
        beside that, where blocks return tuples; None by default."""

        def replacement(index: int) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                states, args, kwargs = _split_hidden(args, kwargs)
                output = forward(index, states, args, kwargs)
                return (output, *(others or [None] * (self._outputs - 1))) if self._outputs else output

            return call

        try:
            for index, block in enumerate(self.blocks):
                block.forward = replacement(index)
            yield
        finally:
            for block in self.blocks:
                block.__dict__.pop("forward", None)

    def _untie(self) -> None:
        """Loads a head that differs from the embeddings it is declared tied to, as transformers does."""
        for name in tied_names(self.module):
            if name in self._locations:
                tensors = self.source.read(self._locations[name].tensors)
                tensor = self._locations[name].read(tensors).to(self.device, self.dtype)
                if not torch.equal(tensor, self.module.get_parameter(name)):
                    self._load("", tensors)

    def _load(self, prefix: str, tensors: Mapping[str, Tensor]) -> None:
        module = self.module.get_submodule(prefix.removesuffix("."))
        used, state = set[str](), {}
        for name, _ in named_state(module):
            location = self._locations.get(prefix + name)
            if location is not None and all(stored in tensors for stored in location.tensors):
                used.update(location.tensors)
                tensor = location.read(tensors)
                dtype = self.dtype if tensor.is_floating_point() else None
                state[name] = tensor.to(self.device, dtype).contiguous()
        for stored in sorted(used):
            require_finite(stored, tensors[stored], self.source.directory)
        module.load_state_dict(state, strict=False, assign=True)

    def block_of(self, name: str) -> int | None:
        """The index of the block that contains a module or tensor, None for one outside the blocks."""
        prefix = f"{self._blocks_name}."
        number, _, rest = name.removeprefix(prefix).partition(".")
        is_inside = name.startswith(prefix) and rest and number.isdigit() and int(number) < len(self)
        return int(number) if is_inside else None


class StreamedModel(BlockwiseModel):
    """A `BlockwiseModel` whose weights are those of a checkpoint on disk, which identifies it."""

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False
    ) -> None:
        super().__init__(checkpoint, device, dtype, trust_remote_code)
        parameters = [name for name, _ in self.module.named_parameters() if self.stores(name)]
        check_dtypes(checkpoint, dict.fromkeys(stored for name in parameters for stored in self.location(name).tensors))
        self.checkpoint = checkpoint
        self.trust_remote_code = trust_remote_code

    @property
    def identity(self) -> list[str | None]:
        """Hashes of what decides the model's outputs: config and weights (None if not known, see
        `Checkpoint.known_hash`), and its remote code if that is trusted."""
        code = [self.checkpoint.code_hash] if self.trust_remote_code else []
        return [self.checkpoint.known_hash, *code]


def _split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """A block's arguments as hidden states, other positional arguments, other keyword arguments."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def _made_up(parameter: Tensor) -> nn.Parameter:
    """Values of the parameter's shape and dtype, no two rows the same, in the memory of one row and one column."""
    values = (0.618 * torch.arange(sum(parameter.shape) + 1)).frac().to(parameter.dtype)
    return nn.Parameter(values.as_strided(parameter.shape, [1] * parameter.dim()), requires_grad=False)


def _different(block: nn.Module, one: BlockCall, other: BlockCall) -> list[str]:
    """Names of the arguments that differ."""
    names = [*signature(type(block).forward).parameters][2:]  # without self and hidden states
    names += [f"argument {position}" for position, _ in enumerate(one.args)]  # where they are *args
    ours, theirs = ({**dict(zip(names, call.args, strict=False)), **call.kwargs} for call in (one, other))
    return [name for name in {**ours, **theirs} if not _same(ours.get(name), theirs.get(name))]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor)
