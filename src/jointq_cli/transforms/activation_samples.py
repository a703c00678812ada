"""Activations to learn rotations from: a few random tokens of every site, instead of all of them.

    attention, mlp    what the block's two norms are given, brought to rms 1: what their readers see but for the gain,
                      in every basis of the residual stream (only where the norms stand before the layers)
    o_proj, down_proj what these layers are given, and the largest magnitude per channel over all tokens

Knows how to collect them in one walk over the original model, and how they are kept on disk, a file per block: memory
holds what somebody reads. Knows nothing of rotations.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from jointq_cli.models.streamed import StreamedModel
from jointq_cli.system.tensor_files import save_tensors
from jointq_cli.transforms.architectures import Anatomy

EPSILON = 1e-12  # below any norm's own: a token of zeros stays one


class Reservoir:
    """The samples in a directory. Rows (tokens, channels) in the dtype of the model's forward pass."""

    def __init__(self, directory: Path, blocks: int) -> None:
        self._directory = directory
        self.blocks = blocks

    def read(self, block: int) -> dict[str, Tensor]:
        """Of one block: attention, mlp (absent where no norm stands before the layers), o_proj, down_proj; and
        o_proj_max, down_proj_max (channels,)."""
        return load_file(self._directory / f"{block:05d}.safetensors")

    def write(self, block: int, samples: dict[str, Tensor]) -> None:
        save_tensors(self._directory / f"{block:05d}.safetensors", samples)

    def residual(self) -> Tensor:
        """(sites, tokens, hidden): what R1 turns, attention and mlp of all blocks."""
        parts = (self.read(block) for block in range(self.blocks))
        return torch.stack([part[site] for part in parts for site in ("attention", "mlp")])


def collect(
    model: StreamedModel,
    anatomy: Anatomy,
    windows: Tensor,
    batch: int,
    tokens: int,
    reservoir: Reservoir,
    on_block: Callable[[], None],
    pause: Callable[[], None],
) -> None:
    """Walks the original model over windows (windows, tokens) int64 and keeps `tokens` of every site.

    Which ones is decided by the site's number alone. on_block is called after each block, pause after each batch.
    """
    hidden = model.embed_all(windows, batch)
    for index in range(len(model)):
        samples = _Samples(index, windows.numel(), tokens)
        with model.block(index, model.block_tensors(index)) as block, samples.watching(block, anatomy):
            for part in hidden.split(batch):
                part.copy_(model.run(index, part))
                samples.next_batch(part.shape[0] * part.shape[1])
                pause()
        reservoir.write(index, samples.finished())
        on_block()


@dataclass(frozen=True)
class _Site:
    name: str
    module: nn.Module
    normalised: bool


class _Samples:
    """The chosen tokens of one block's sites."""

    def __init__(self, block: int, available: int, tokens: int) -> None:
        self._block = block
        self._available = available
        self._tokens = min(tokens, available)
        self._start = 0  # of the current batch
        self._rows: dict[str, list[Tensor]] = {}
        self._largest: dict[str, Tensor] = {}

    @contextmanager
    def watching(self, block: nn.Module, anatomy: Anatomy) -> Iterator[None]:
        sites = _sites(block, anatomy)
        chosen = {site.name: self._choose(number) for number, site in enumerate(sites)}
        handles = [
            site.module.register_forward_pre_hook(
                lambda _, given, site=site: self._take(site, given[0], chosen[site.name])
            )
            for site in sites
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def next_batch(self, tokens: int) -> None:
        self._start += tokens

    def finished(self) -> dict[str, Tensor]:
        rows = {name: torch.cat(parts) for name, parts in self._rows.items()}
        return rows | {f"{name}_max": largest for name, largest in self._largest.items()}

    def _choose(self, site: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self._block + site)
        return torch.randperm(self._available, generator=generator)[: self._tokens].sort().values

    def _take(self, site: _Site, given: Tensor, chosen: Tensor) -> None:
        flat = given.reshape(-1, given.shape[-1])
        here = chosen[(chosen >= self._start) & (chosen < self._start + len(flat))] - self._start
        rows = flat[here.to(flat.device)]
        self._rows.setdefault(site.name, []).append((normalised(rows) if site.normalised else rows).cpu())
        if not site.normalised:
            largest = flat.abs().amax(dim=0).float().cpu()
            self._largest[site.name] = torch.maximum(largest, self._largest.get(site.name, largest))


def normalised(rows: Tensor) -> Tensor:
    """Rows (..., channels) brought to rms 1, in their dtype."""
    wide = rows.float()
    return (wide * wide.square().mean(dim=-1, keepdim=True).add(EPSILON).rsqrt()).to(rows.dtype)


def _sites(block: nn.Module, anatomy: Anatomy) -> list[_Site]:
    norms = [norm for norm in anatomy.family.readers if norm]
    named = zip(("attention", "mlp"), norms, strict=False)
    return [
        *(_Site(name, block.get_submodule(norm), normalised=True) for name, norm in named),
        _Site("o_proj", block.get_submodule(anatomy.family.o_proj), normalised=False),
        _Site("down_proj", block.get_submodule(anatomy.family.down_proj), normalised=False),
    ]
