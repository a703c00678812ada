"""A decoder-only language model that is never whole in memory: a skeleton, and one block of weights at a time.

The model's own forward provides masks, positions and rotary embeddings: it runs once with every block standing aside
and noting how it was called, and from then on each block is called in the same way. So nothing here knows an
architecture; it asks only that the decoder blocks sit in one ModuleList and that their other inputs do not depend on
the tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from jointq_cli.errors import ModelError
from jointq_cli.models import online_rotation as online
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.system.machine import release_freed_memory

SKELETON_ERRORS = (ValueError, KeyError, TypeError, AttributeError, ImportError, OSError, RuntimeError)


@dataclass(frozen=True)
class BlockCall:
    """How the model calls one of its blocks, its hidden states apart."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class StreamedModel:
    """The skeleton of a checkpoint's model: parameters on the meta device, buffers real.

    Raises ModelError when transformers cannot build the architecture, when no ModuleList of decoder blocks is found,
    or when the checkpoint's tensors do not fit the skeleton.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        trust_remote_code: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self._runs_code = trust_remote_code
        self.device = device
        self.dtype = dtype
        self.module = _skeleton(checkpoint, dtype, trust_remote_code)
        self.name, blocks = _find_blocks(self.module)
        self.blocks: list[nn.Module] = list(blocks)
        if online.needs_online(checkpoint.config):
            online.attach(self.blocks, checkpoint.config)
        self._calls: dict[tuple[int, ...], list[BlockCall]] = {}
        self._wraps_output = False  # whether blocks return a tuple around the hidden states
        self._module_names = _module_names(self.module, checkpoint)
        self._stored_names = {known: stored for stored, known in self._module_names.items()}
        _buffers_to(self.module, device)
        self._check_tensors()

    @property
    def identity(self) -> list[str]:
        """Hashes of all that decides what it computes: config, weights, and the code that it brings if that is run."""
        code = [self.checkpoint.code_hash] if self._runs_code else []
        return [self.checkpoint.content_hash, *code]

    def __len__(self) -> int:
        return len(self.blocks)

    def prefix(self, index: int) -> str:
        """What the names of block `index`'s tensors start with, such as "model.layers.3."."""
        return f"{self.name}.{index}."

    def stored_name(self, name: str) -> str:
        """The checkpoint's name of a tensor that the module calls `name`: some architectures were renamed."""
        return self._stored_names[name]

    def stores(self, name: str) -> bool:
        """Whether the checkpoint holds a tensor that the module calls `name`, or only one that is tied to it."""
        return name in self._stored_names

    def module_name(self, stored: str) -> str:
        """The module's name of a tensor that the checkpoint calls `stored`."""
        return self._module_names[stored]

    def block_tensors(self, index: int) -> dict[str, Tensor]:
        """The tensors of one block under their stored names, as stored."""
        prefix = self.prefix(index)
        return self.checkpoint.read(stored for stored, name in self._module_names.items() if name.startswith(prefix))

    def outer_tensors(self) -> dict[str, Tensor]:
        """Every tensor that belongs to no block: embeddings, final norm, head, and what the model does not use."""
        return self.checkpoint.read(
            stored for stored, name in self._module_names.items() if self.block_of(name) is None
        )

    def linear_layers(self) -> dict[str, nn.Linear]:
        """Every linear layer by its full name, lm_head included."""
        return {name: module for name, module in self.module.named_modules() if isinstance(module, nn.Linear)}

    @contextmanager
    def outer(self) -> Iterator[None]:
        """Inside, the embeddings, the final norm and the head are loaded: `embed` and `logits` work."""
        names = [name for name, _ in _state(self.module) if self.block_of(name) is None]
        try:
            self._load(
                "",
                self.checkpoint.read(self._stored_names[name] for name in names if name in self._stored_names),
            )
            self.module.tie_weights()
            self._untie()
            yield
        finally:
            _unload(self.module, keep=self.blocks)

    @contextmanager
    def block(self, index: int, tensors: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """Inside, block `index` carries `tensors` (stored names) in the compute dtype and can be run."""
        try:
            self._load(self.prefix(index), tensors)
            yield self.blocks[index]
        finally:
            _unload(self.blocks[index])
            release_freed_memory()

    def embed_all(self, windows: Tensor, batch: int, own: slice = slice(None)) -> Tensor:
        """Hidden states (windows, tokens, hidden) that enter the first block, `batch` windows at a time.

        own: those that are wanted, whole batches of them or none. The shape of the first batch is noted in any case.
        """
        with self.outer():
            first = self.embed(windows[:batch])
            start, stop, _ = own.indices(len(windows))
            hidden = first.new_empty((stop - start, *first.shape[1:]))
            for done in range(start, stop, batch):
                part = windows[done : min(done + batch, stop)]
                hidden[done - start : done - start + len(part)] = self.embed(part) if done else first
            return hidden

    def record_calls(self, windows: Tensor, batch: int) -> None:
        """What `embed_all` notes of how blocks are called, without the hidden states."""
        with self.outer():
            for part in {len(part): part for part in windows.split(batch)}.values():
                self.embed(part)

    def run_all(self, index: int, hidden: Tensor, batch: int, pause: Callable[[], None] = lambda: None) -> Tensor:
        """Block `index` over all hidden states (windows, tokens, hidden), in place; calls `pause` between batches."""
        for part in hidden.split(batch) if len(hidden) else ():
            part.copy_(self.run(index, part))
            pause()
        return hidden

    def embed(self, windows: Tensor) -> Tensor:
        """Hidden states (batch, tokens, hidden) that enter the first block; notes how the blocks are called.

        windows: (batch, tokens) int64. Needs `outer`.
        """
        shape = tuple(windows.shape)
        hidden, calls = self._note_calls(windows.to(self.device))
        if shape in self._calls and not _same_calls(self._calls[shape], calls):
            raise ModelError(
                f"{self.checkpoint.directory}: {type(self.module).__name__} hands its blocks tensors that depend on "
                "the tokens; the block-wise engine cannot walk it"
            )
        self._calls[shape] = calls
        return hidden

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Block `index` over hidden states (batch, tokens, hidden) of a shape that `embed` has seen."""
        call = self._calls[tuple(hidden.shape[:2])][index]
        output = self.blocks[index](hidden, *call.args, **call.kwargs)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (batch, tokens, vocabulary) of final hidden states (batch, tokens, hidden). Needs `outer`."""
        if not self._calls:  # only a walk tells how the blocks hand on their output
            self.embed(torch.zeros(1, 2, dtype=torch.long))

        def stand_aside(index: int, given: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
            return hidden if index == len(self) - 1 else given

        with self._replaced_blocks(stand_aside):
            ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
            output: Tensor = self.module(input_ids=ids, use_cache=False).logits
            return output

    def _note_calls(self, windows: Tensor) -> tuple[Tensor, list[BlockCall]]:
        seen: list[Tensor] = []
        calls: list[BlockCall] = []

        def note(index: int, given: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
            seen.append(given)
            calls.append(BlockCall(args, kwargs))
            return given

        trouble: Exception | None = None
        with self._replaced_blocks(note):
            try:
                self.module.base_model(input_ids=windows, use_cache=False)
            except (RuntimeError, IndexError, TypeError, ValueError) as error:
                trouble = error
        sound = trouble is None and len(calls) == len(self) and all(given.shape == seen[0].shape for given in seen)
        if not sound and len(seen) > 1 and not self._wraps_output:
            # The model unpacks what its blocks return: it took element 0 of our tensor. Give it tuples.
            self._wraps_output = True
            return self._note_calls(windows)
        if trouble is not None:
            raise ModelError(
                f"{self.checkpoint.directory}: {type(self.module).__name__} cannot take windows of {windows.shape[1]} "
                f"tokens with ids up to {int(windows.max())}: {' '.join(str(trouble).split())[:200]}"
            ) from trouble
        if not sound:
            raise ModelError(
                f"{self.checkpoint.directory}: {type(self.module).__name__} does not call its {len(self)} blocks one "
                "after the other; the block-wise engine cannot walk it"
            )
        return seen[0], calls

    @contextmanager
    def _replaced_blocks(self, forward: Callable[..., Tensor]) -> Iterator[None]:
        def stand_in(index: int) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                given, args, kwargs = _split_hidden(args, kwargs)
                output = forward(index, given, args, kwargs)
                return (output,) if self._wraps_output else output

            return call

        try:
            for index, block in enumerate(self.blocks):
                block.forward = stand_in(index)
            yield
        finally:
            for block in self.blocks:
                block.__dict__.pop("forward", None)

    def _untie(self) -> None:
        """Where the config ties tensors of which the file has two different ones, transformers believes the file."""
        for name in getattr(self.module, "all_tied_weights_keys", None) or ():
            if name in self._stored_names:
                stored = self._stored_names[name]
                tensor = self.checkpoint.read([stored])[stored].to(self.device, self.dtype)
                if not torch.equal(tensor, self.module.get_parameter(name)):
                    self._load("", {stored: tensor})

    def _load(self, prefix: str, tensors: Mapping[str, Tensor]) -> None:
        module = self.module.get_submodule(prefix.removesuffix("."))
        known = {name for name, _ in _state(module)}
        ready = {}
        for stored, tensor in tensors.items():
            name = self._module_names[stored].removeprefix(prefix)
            if name in known:
                ready[name] = tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)
        module.load_state_dict(ready, strict=False, assign=True)

    def block_of(self, name: str) -> int | None:
        """The number of the block that a module or tensor belongs to, None if it is outside all of them."""
        head, _, rest = name.removeprefix(f"{self.name}.").partition(".")
        inside = name.startswith(f"{self.name}.") and rest and head.isdigit() and int(head) < len(self)
        return int(head) if inside else None

    def _check_tensors(self) -> None:
        tied = set(getattr(self.module, "all_tied_weights_keys", None) or ())
        state = dict(_state(self.module))
        missing = [name for name in state if name not in self._stored_names and name not in tied]
        if missing:
            raise ModelError(
                f"{self.checkpoint.directory}: lacks {len(missing)} of the {len(state)} tensors of "
                f"{type(self.module).__name__}, {missing[0]} first"
            )
        for name, tensor in state.items():
            info = self.checkpoint.tensors.get(self._stored_names.get(name, ""))
            if info and tuple(tensor.shape) != info.shape:
                shapes = f"has shape {list(info.shape)}, but config.json asks for {list(tensor.shape)}"
                raise ModelError(f"{info.file}: tensor {name} {shapes}")


def _skeleton(checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    try:
        config = _config(checkpoint, trust_remote_code)
        with init_empty_weights(include_buffers=False):
            module = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except SKELETON_ERRORS as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{checkpoint.directory}: transformers cannot build this model: {reason[:300]}") from error
    return module.eval().requires_grad_(False)


def _config(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    if online.needs_online(checkpoint.config):
        return AutoConfig.for_model(**online.without_online(checkpoint.config))
    return AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=trust_remote_code)


def _module_names(module: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """Stored name -> the module's name for every tensor of the checkpoint, by transformers' own table of renamings.

    Raises ModelError where that table would also reshape or merge tensors: such a layer is not stored as it is run.
    """
    transforms = get_model_conversion_mapping(module)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    state = dict(_state(module))
    names = {}
    for stored in checkpoint.tensors:
        name, converter = rename_source_key(stored, renamings, converters, module.base_model_prefix, state)
        if converter is not None:
            raise ModelError(
                f"{checkpoint.directory}: {type(module).__name__} stores {stored} in another layout than it runs; "
                "such architectures cannot be walked"
            )
        names[stored] = name
    return names


def _find_blocks(module: nn.Module) -> tuple[str, nn.ModuleList]:
    """The ModuleList that holds the decoder blocks: the one with the most parameters."""
    lists = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
    if not lists:
        raise ModelError(f"{type(module).__name__} keeps its decoder blocks in no ModuleList; it cannot be walked")
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.state_dict(keep_vars=True).items()


def _buffers_to(module: nn.Module, device: torch.device) -> None:
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))


def _unload(module: nn.Module, keep: list[nn.Module] | None = None) -> None:
    """Back to meta parameters, those of `keep` excepted."""
    kept = {id(part) for block in keep or () for part in block.modules()}
    for part in module.modules():
        if id(part) not in kept:
            for name, parameter in part.named_parameters(recurse=False):
                setattr(part, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


def _split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden states apart from the rest of a block's arguments."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def _same_calls(one: list[BlockCall], other: list[BlockCall]) -> bool:
    return all(_same(a.args, b.args) and _same(a.kwargs, b.kwargs) for a, b in zip(one, other, strict=True))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor)
