"""Activations that rotations learn from: a few random tokens of every site, instead of all tokens.

    attention, mlp    the inputs of a block's two norms, scaled to RMS 1: up to the norm's gain what the layers after it
                      read, in any basis of the residual stream (only where norms precede the layers)
    o_proj, down_proj the inputs of these layers, and the largest magnitude of each channel over all tokens

They are collected in one forward pass over the original model and stored in one file per block, so that memory holds
only the blocks that are read. Independent of any rotation.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from jointq_cli.models.streamed import BlockwiseModel
from jointq_cli.system.tensor_files import save_tensors
from jointq_cli.transforms.architectures import ArchitectureLayout

NORM_SITES = ("attention", "mlp")
EPSILON = 1e-12  # below that of any model's norm; keeps a token of zeros at zero


@dataclass(frozen=True)
class ActivationSamples:
    """The samples in a directory. Rows are (tokens, channels) in the dtype of the model's forward pass."""

    directory: Path
    blocks: int

    def read(self, block: int) -> dict[str, Tensor]:
        """The rows of one block: attention, mlp (absent where no norm precedes the layers), o_proj and down_proj; and
        o_proj_max, down_proj_max (channels,) float32."""
        return load_file(self._file(block))

    def write(self, block: int, samples: dict[str, Tensor]) -> None:
        save_tensors(self._file(block), samples)

    def residual(self) -> Tensor:
        """(sites, tokens, hidden): what R1 rotates, attention and mlp of all blocks."""
        parts = (self.read(block) for block in range(self.blocks))
        return torch.stack([part[site] for part in parts for site in NORM_SITES])

    def _file(self, block: int) -> Path:
        return self.directory / f"{block:05d}.safetensors"


def collect_samples(
    model: BlockwiseModel,
    layout: ArchitectureLayout,
    windows: Tensor,
    batch: int,
    tokens: int,
    samples: ActivationSamples,
    on_block: Callable[[], None],
    pause: Callable[[], None],
) -> None:
    """Runs the original model on windows (windows, tokens) int64 and writes `tokens` rows of every site.

    The choice of tokens depends on the number of the site alone, not on the batch size. on_block is called after each
    block, pause after each batch; both may raise.
    """
    hidden = model.embed_all(windows, batch)
    for index in range(len(model)):
        sampler = _BlockSampler(index, windows.numel(), tokens)
        with model.block(index, model.block_tensors(index)) as block, sampler.hooked(block, layout):
            for part in hidden.split(batch):
                part.copy_(model.run(index, part))
                sampler.next_batch(part.shape[0] * part.shape[1])
                pause()
        samples.write(index, sampler.result())
        on_block()


def rms_normalize(rows: Tensor) -> Tensor:
    """Rows (..., channels) scaled to RMS 1, as by an RMSNorm without gain (Zhang and Sennrich, arXiv 1910.07467).

    Computed in float32, returned in the dtype of the input.
    """
    wide = rows.float()
    return (wide * wide.square().mean(dim=-1, keepdim=True).add(EPSILON).rsqrt()).to(rows.dtype)


class _BlockSampler:
    """Keeps the chosen tokens of one block's sites while the block runs."""

    def __init__(self, block: int, available: int, tokens: int) -> None:
        self._block = block
        self._available = available
        self._tokens = min(tokens, available)
        self._start = 0  # of the current batch, in tokens
        self._rows: dict[str, list[Tensor]] = {}
        self._largest: dict[str, Tensor] = {}

    @contextmanager
    def hooked(self, block: nn.Module, layout: ArchitectureLayout) -> Iterator[None]:
        """Inside, every forward pass of `block` adds to the samples."""
        sites = _sites(layout)
        chosen = {site: self._choose(number) for number, site in enumerate(sites)}
        handles = [
            block.get_submodule(module).register_forward_pre_hook(
                lambda _, args, site=site: self._record(site, args[0], chosen[site])
            )
            for site, module in sites.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def next_batch(self, tokens: int) -> None:
        self._start += tokens

    def result(self) -> dict[str, Tensor]:
        rows = {site: torch.cat(parts) for site, parts in self._rows.items()}
        return rows | {f"{site}_max": largest for site, largest in self._largest.items()}

    def _choose(self, site: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self._block + site)
        return torch.randperm(self._available, generator=generator)[: self._tokens].sort().values

    def _record(self, site: str, inputs: Tensor, chosen: Tensor) -> None:
        flat = inputs.reshape(-1, inputs.shape[-1])
        in_batch = chosen[(chosen >= self._start) & (chosen < self._start + len(flat))] - self._start
        rows = flat[in_batch.to(flat.device)]
        self._rows.setdefault(site, []).append((rms_normalize(rows) if site in NORM_SITES else rows).cpu())
        if site not in NORM_SITES:
            largest = flat.abs().amax(dim=0).float().cpu()
            self._largest[site] = torch.maximum(largest, self._largest.get(site, largest))


def _sites(layout: ArchitectureLayout) -> dict[str, str]:
    """Site -> the module of a block whose inputs are sampled there."""
    norms = [norm for norm in layout.family.readers if norm]
    return {
        **dict(zip(NORM_SITES, norms, strict=False)),
        "o_proj": layout.family.o_proj,
        "down_proj": layout.family.down_proj,
    }
