"""Gradients of the loss with respect to the outputs of linear layers, block by block from the top.

The loss is the sum over tokens of the cross entropy with labels that are sampled from the model's own distribution, so
that second moments of its gradients g are the Fisher information (Martens, "New insights and perspectives on the
natural gradient method", JMLR 2020). Kept of each layer are G = mean g g^T over the tokens, which weighs its outputs
against each other (K-FAC: Martens, Grosse, ICML 2015), and |g|^2 of every token.

    entering-00003.safetensors   the hidden states that enter block 3, until its gradients are known
    gradient.safetensors         of the loss, for the hidden states that leave the last unfinished block, and how many
                                 blocks are finished; without a gradient in the end
    00003.safetensors            G and energies of the layers of block 3

They are those of the model as it is, on its own hidden states: no quantizer changes them.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from jointq_cli.models.layer_ref import LayerRef, layer_refs
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.quantization.accumulator import Accumulator, packed, unpacked
from jointq_cli.quantization.resumable_forward import first_tensor
from jointq_cli.system.distributed import SINGLE_PROCESS, Team
from jointq_cli.system.files import write_atomically
from jointq_cli.system.tensor_files import read_rows, save_tensors

MOST_OUTPUTS = 4096  # of one diagonal block of G: wider layers have several
LOGITS_AT_ONCE = 1 << 24  # elements

_HIDDEN, _GRADIENT, _BLOCKS = "hidden", "gradient", "blocks"


def output_groups(out_features: int) -> list[slice]:
    """The outputs of each diagonal block of G, as equal as can be."""
    count = -(-out_features // MOST_OUTPUTS)
    stops = [out_features * number // count for number in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(stops)]


class Gradients:
    """The directory of one pass, finished or not."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._gradient = directory / "gradient.safetensors"

    def outputs(self, block: int, layer: LayerRef, device: torch.device) -> list[Tensor]:
        """The diagonal blocks of G (outputs, outputs) float64; none where no token reaches the layer."""
        with safe_open(self._path(block), framework="pt") as file:
            names = set(file.keys())
            spans = enumerate(output_groups(layer.out_features))
            return [
                unpacked(file.get_tensor(f"{layer.name}.{number}").to(device).double(), span.stop - span.start)
                for number, span in spans
                if f"{layer.name}.{number}" in names
            ]

    def energies(self, block: int, layer: str) -> Tensor | None:
        """|g|^2 (windows, tokens) float32 on the CPU; None where not every token reaches the layer."""
        name = f"{layer}.energy"
        with safe_open(self._path(block), framework="pt") as file:
            return file.get_tensor(name) if name in set(file.keys()) else None

    def finished_blocks(self) -> int:
        """From the last block on."""
        if not self._gradient.exists():
            return 0
        with safe_open(self._gradient, framework="pt") as file:
            return int(file.metadata()[_BLOCKS])

    def read_gradient(self, windows: slice) -> Tensor:
        return read_rows(self._gradient, _GRADIENT, windows)

    def write_gradient(self, finished: int, gradient: Tensor | None) -> None:
        """The last step of a block."""
        tensors = {} if gradient is None else {_GRADIENT: gradient}
        write_atomically(self._gradient, lambda path: save_tensors(path, tensors, {_BLOCKS: str(finished)}))

    def write_block(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        write_atomically(self._path(block), lambda path: save_tensors(path, tensors))

    def entered(self) -> int:
        """How many blocks have the hidden states that enter them on disk; one more where those that leave the last
        are."""
        return len(list(self.directory.glob("entering-*.safetensors")))

    def entering(self, block: int, windows: slice) -> Tensor:
        """(windows, tokens, hidden) in the compute dtype."""
        return read_rows(self._entering(block), _HIDDEN, windows)

    def write_entering(self, block: int, hidden: Tensor) -> None:
        write_atomically(self._entering(block), lambda path: save_tensors(path, {_HIDDEN: hidden}))

    def remove_entering(self, block: int) -> None:
        self._entering(block).unlink(missing_ok=True)

    def _entering(self, block: int) -> Path:
        return self.directory / f"entering-{block:05d}.safetensors"

    def _path(self, block: int) -> Path:
        return self.directory / f"{block:05d}.safetensors"


class LayerSums(ABC):
    """What is added up over the tokens while the gradient passes through one block."""

    @abstractmethod
    def watch(self, layer: LayerRef, inputs: Tensor) -> Callable[[Tensor], None] | None:
        """What takes the gradient (..., out) of a layer's output once it is known; None for a layer that is left out.
        inputs: (..., in) of this call."""

    @abstractmethod
    def tensors(self, windows: Sequence[int], team: Team) -> Iterator[tuple[str, Tensor]]:
        """What is kept, by name, over all processes. windows: the shape of this process's."""


def collect_gradients(
    model: StreamedModel,
    windows: Tensor,
    seed: int,
    batch: int,
    gradients: Gradients,
    on_block: Callable[[], None],
    pause: Callable[[], None],
    team: Team = SINGLE_PROCESS,
    sums: Callable[[int, Mapping[str, Tensor]], LayerSums] | None = None,
) -> None:
    """Fills `gradients` for the linear layers of all blocks, from its last unfinished block down.

    sums: what is kept of a block in place of G and energies, from its index and its tensors by stored name.

    windows: (windows, tokens) int64, `batch` of them per pass. seed: of the labels. on_block is called after each
    block, pause after each batch, where it may raise. The processes of a team share the windows, and process 0 writes.
    Raises ResourceError where they find different numbers of finished blocks, NumericsError for gradients with NaN or
    Inf.
    """
    finished = team.require_equal(gradients.directory, "finished blocks", gradients.finished_blocks())
    if finished == len(model):
        return
    own = team.part(len(windows), batch)
    if finished:
        model.record_calls(windows, batch)
        gradient = gradients.read_gradient(own).to(model.device)
    else:
        hidden = _run_forward(model, windows, batch, own, gradients, pause, team)
        gradient = _of_sampled_labels(model, hidden, _draws(windows, seed)[own], pause)
        del hidden
    for index in reversed(range(len(model) - finished)):
        block = _BlockGradients(model, index, gradients, batch, sums or partial(_output_sums, model))
        tensors = block.collect(gradient, own, pause, team)
        team.on_rank0(gradients.write_block, index, tensors)
        complete = team.gather_rows(gradient) if index else None
        team.on_rank0(gradients.write_gradient, len(model) - index, complete)
        team.on_rank0(gradients.remove_entering, index)
        on_block()
    team.on_rank0(gradients.remove_entering, len(model))


def _run_forward(
    model: StreamedModel,
    windows: Tensor,
    batch: int,
    own: slice,
    gradients: Gradients,
    pause: Callable[[], None],
    team: Team,
) -> Tensor:
    """Keeps what enters each block; returns what leaves the last one, on this process's windows."""
    entered = team.require_equal(gradients.directory, "blocks entered", gradients.entered())
    if entered:
        model.record_calls(windows, batch)
        hidden = gradients.entering(entered - 1, own).to(model.device)
    else:
        hidden = model.embed_all(windows, batch, own)
        team.on_rank0(gradients.write_entering, 0, team.gather_rows(hidden))
    for index in range(max(0, entered - 1), len(model)):
        with model.block(index, model.block_tensors(index)):
            model.run_all(index, hidden, batch, pause)
        team.on_rank0(gradients.write_entering, index + 1, team.gather_rows(hidden))
    team.barrier()
    return hidden


def _draws(windows: Tensor, seed: int) -> Tensor:
    """A number in [0, 1) for every token: which label is sampled depends on no batch, process or device."""
    return torch.rand(windows.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _of_sampled_labels(model: StreamedModel, hidden: Tensor, draws: Tensor, pause: Callable[[], None]) -> Tensor:
    """The gradient of the loss (windows, tokens, hidden) for hidden states that leave the last block."""
    gradient = torch.empty_like(hidden)
    with model.outer():
        for states, drawn, result in zip(hidden, draws, gradient, strict=True):
            vocabulary = model.module.get_input_embeddings().num_embeddings
            for part in torch.arange(len(states)).split(max(1, LOGITS_AT_ONCE // vocabulary)):
                rows = slice(int(part[0]), int(part[-1]) + 1)
                result[rows] = _at_head(model, states[rows], drawn[rows].to(model.device))
            pause()
    return gradient


def _at_head(model: StreamedModel, states: Tensor, draws: Tensor) -> Tensor:
    """(tokens, hidden) of hidden states (tokens, hidden); draws (tokens,): the label is the quantile of this order."""
    leaf = states.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = model.logits(leaf[None])[0].float()
        with torch.no_grad():
            cumulated = logits.double().softmax(dim=-1).cumsum(dim=-1)  # in float32 ties would be decided by rounding
            labels = torch.searchsorted(cumulated, draws[:, None]).clamp_max_(logits.shape[-1] - 1)
        loss = logits.logsumexp(dim=-1).sum() - logits.gather(-1, labels).sum()
        return torch.autograd.grad(loss, leaf)[0]


class _BlockGradients:
    """The gradient's way through one block."""

    def __init__(
        self,
        model: StreamedModel,
        index: int,
        gradients: Gradients,
        batch: int,
        sums: Callable[[int, Mapping[str, Tensor]], LayerSums],
    ) -> None:
        self.model, self.index, self.gradients, self.batch, self._sums = model, index, gradients, batch, sums
        self.layers = layer_refs(model.blocks[index], model.prefix(index))

    def collect(self, gradient: Tensor, own: slice, pause: Callable[[], None], team: Team) -> dict[str, Tensor]:
        """Overwrites the gradient (windows, tokens, hidden) with that of the hidden states that enter the block, and
        returns what is kept of the layers."""
        model, start, tensors = self.model, own.start, self.model.block_tensors(self.index)
        sums = self._sums(self.index, tensors)
        with model.block(self.index, tensors), self._watched(sums):
            for part in gradient.split(self.batch) if len(gradient) else ():
                entering = self.gradients.entering(self.index, slice(start, start + len(part)))
                leaf = entering.to(model.device).requires_grad_()
                with torch.enable_grad():
                    output = model.run(self.index, leaf)
                part.copy_(torch.autograd.grad(output, leaf, part)[0])
                model.require_finite_activations(f"the gradients before block {self.index}", part)
                start += len(part)
                pause()
        return dict(sums.tensors(gradient.shape, team))

    @contextmanager
    def _watched(self, sums: LayerSums) -> Iterator[None]:
        """Inside, gradients of the layers' outputs are added up when they are computed."""

        def watch(layer: LayerRef, module: object, args: tuple[Tensor, ...], output: object) -> None:
            tensor = first_tensor(output)
            take = sums.watch(layer, args[0]) if tensor.requires_grad else None
            if take is not None:
                tensor.register_hook(take)

        handles = [layer.module.register_forward_hook(partial(watch, layer)) for layer in self.layers.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _OutputSums(LayerSums):
    """G and the energies of the tokens of each call."""

    def __init__(self, layers: Mapping[str, LayerRef], device: torch.device) -> None:
        self._device = device
        self._sums = {
            name: [Accumulator(span.stop - span.start, device) for span in output_groups(ref.out_features)]
            for name, ref in layers.items()
        }
        self._energies: dict[str, list[Tensor]] = {name: [] for name in layers}

    def watch(self, layer: LayerRef, inputs: Tensor) -> Callable[[Tensor], None]:
        return partial(self._add, layer.name)

    def _add(self, name: str, gradient: Tensor) -> None:
        flat = gradient.reshape(-1, gradient.shape[-1]).float()
        for accumulator, span in zip(self._sums[name], output_groups(flat.shape[-1]), strict=True):
            accumulator.add(flat[:, span])
        self._energies[name].append(flat.square().sum(dim=-1))

    def tensors(self, windows: Sequence[int], team: Team) -> Iterator[tuple[str, Tensor]]:
        for name, sums in self._sums.items():
            for number, accumulator in enumerate(sums):
                accumulator.sum_over(team.all_reduce_sum)
                if accumulator.rows:
                    yield f"{name}.{number}", packed(accumulator.hessian()).float()
            found = self._energies[name]
            complete = sum(map(len, found)) == windows[0] * windows[1]
            if all(team.gather(complete)):
                own = torch.cat(found) if found else torch.empty(0, device=self._device)
                yield f"{name}.energy", team.gather_rows(own.view(windows[0], windows[1]))


def _output_sums(model: StreamedModel, index: int, tensors: Mapping[str, Tensor]) -> LayerSums:
    return _OutputSums(layer_refs(model.blocks[index], model.prefix(index)), model.device)
