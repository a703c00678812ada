"""A change of basis and the tensors of a model in it: fuse, smooth and rotate in float64, one tensor at a time.

Activations are row vectors x, a torch weight is W (out, in), y = x W^T. In the new basis the residual stream is x R1
and the values of KV head j are v Q_j (R2):

    embedding E -> E R1          readers W -> W diag(gain) R1, and the norm's gain becomes 1
    writers W -> R1^T W          lm_head W -> W diag(gain of the final norm) R1
    values  W_v[j] -> Q_j^T diag(1/s_j) W_v[j]     o_proj, head i of KV head j: W_o[:, i] -> W_o[:, i] diag(s_j) Q_j
    up_proj W -> diag(1/t) W     down_proj W -> W diag(t) H, with H (R4) online in front of it

with s and t the smoothing scales; biases of what is produced follow. An RMS norm does not see R1, so it all leaves the
model's function alone (SliceGPT, arXiv 2401.15024, theorem 1). All but R4 is absorbed: plain transformers runs it;
`online` says what becomes of R4. Knows no calibration and nothing of how R1, R2, s and t were found.
"""

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from jointq_cli.kernels.hadamard import turned
from jointq_cli.models.checkpoint import DTYPES, Checkpoint, copy_companions, require_finite
from jointq_cli.models.online_rotation import with_online
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.transforms.architectures import Anatomy


@dataclass(frozen=True)
class Basis:
    """float64 each, None where nothing is changed.

    r1: (hidden, hidden); r2: (blocks, kv_heads, head_dim, head_dim), orthogonal. value_scales: s, (blocks, kv_heads,
    head_dim); mlp_scales: t, (blocks, width). r4: whether a Hadamard matrix stands in front of down_proj.
    """

    r1: Tensor | None = None
    r2: Tensor | None = None
    value_scales: Tensor | None = None
    mlp_scales: Tensor | None = None
    r4: bool = False

    @property
    def orthogonality_error(self) -> float:
        """The largest |R R^T - I| over R1 and all Q, NaN where one of them has any."""
        errors = [_distance_from_orthogonal(rotation) for rotation in (self.r1, self.r2) if rotation is not None]
        return max(errors, key=lambda error: math.inf if math.isnan(error) else error, default=0.0)

    def smoothed_values(self, rows: Tensor, block: int) -> Tensor:
        """What o_proj is given, (tokens, heads x head_dim), with smoothed values."""
        if self.value_scales is None:
            return rows
        kv_heads, head_dim = self.value_scales[block].shape
        apart = rows.reshape(len(rows), kv_heads, -1, head_dim)
        return (apart / self.value_scales[block][:, None].to(rows)).reshape(rows.shape)

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in vars(self).items() if isinstance(tensor, Tensor)}


ROWS = 8192  # of an embedding that are in float64 at once


class RotatedCheckpoint(Checkpoint):
    """A checkpoint seen in another basis: each tensor is made when it is read, and rounded once, to float32.

    `directory` gets the config, the tokenizer and the like, so that a skeleton can be built from it; with R1 input and
    output embeddings are two tensors from then on.
    """

    def __init__(self, model: StreamedModel, anatomy: Anatomy, basis: Basis, directory: Path, *, code: bool) -> None:
        self._model = model
        self._source = model.checkpoint
        self._anatomy = anatomy
        self._basis = basis
        self._kept: dict[str, Tensor] = {}
        self.directory = directory
        self.tensors = dict(self._source.tensors)
        self.config = dict(self._source.config)
        copy_companions(self._source, directory, code=code)
        if basis.r1 is not None:
            self._untie()
        if basis.r4:
            self.config = with_online(self.config, anatomy.family.down_proj)
        text = json.dumps(self.config, indent=2, ensure_ascii=False) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Floating tensors in float32, whatever they are stored in; see the module's docstring."""
        return {name: self._kept[name] if name in self._kept else self._rotated(name) for name in names}

    @contextmanager
    def keeping(self, tensors: dict[str, Tensor]) -> Iterator[None]:
        """Inside, these tensors, read before, are not made again."""
        self._kept = tensors
        try:
            yield
        finally:
            self._kept = {}

    @property
    def device(self) -> torch.device:
        """Where tensors are merged."""
        return self._model.device

    def gains(self, block: int) -> list[Tensor]:
        """Of the norms before attention and MLP, (hidden,) float64 each; none where no norm stands there."""
        norms = [norm for norm in self._anatomy.family.readers if norm]
        return [self._gain(f"{self._model.prefix(block)}{norm}") for norm in norms]

    def dtype_of(self, name: str) -> torch.dtype:
        """What the source stores a tensor in."""
        return DTYPES[self.tensors[name].dtype]

    def _untie(self) -> None:
        head, embedding = f"{self._anatomy.head}.weight", f"{self._anatomy.embedding}.weight"
        if not self._model.stores(head):
            self.tensors[head] = self._source.tensors[self._model.stored_name(embedding)]
        self.config["tie_word_embeddings"] = False

    def _source_name(self, name: str) -> str:
        tied = name not in self._source.tensors
        return self._model.stored_name(f"{self._anatomy.embedding}.weight") if tied else name

    def _rotated(self, stored: str) -> Tensor:
        source = self._source_name(stored)
        raw = self._source.read([source])[source]
        require_finite(source, raw, self._source.directory)
        if not raw.is_floating_point():
            return raw
        name = stored if source != stored else self._model.module_name(stored)
        index = self._model.block_of(name)
        if index is None:
            return self._outside(name, raw)
        layer, _, kind = name.removeprefix(self._model.prefix(index)).rpartition(".")
        return self._inside(index, layer, kind, raw.to(self._model.device, torch.float64)).float()

    def _outside(self, name: str, tensor: Tensor) -> Tensor:
        """An embedding is the largest tensor of a model: never whole in float64."""
        if self._basis.r1 is None:
            return tensor.float()
        if name == f"{self._anatomy.final_norm}.weight":
            return self._neutral(tensor.float())
        if name == f"{self._anatomy.embedding}.weight":
            return torch.cat([self._turned(rows).float().cpu() for rows in tensor.split(ROWS)])
        if name == f"{self._anatomy.head}.weight":
            gain = self._gain(self._anatomy.final_norm)
            return torch.cat([self._turned(rows, gain).float().cpu() for rows in tensor.split(ROWS)])
        return tensor.float()

    def _turned(self, rows: Tensor, gain: Tensor | None = None) -> Tensor:
        """Rows (n, hidden) that are, or read, vectors of the residual stream, behind a norm's gain."""
        assert self._basis.r1 is not None  # whoever turns has R1
        rows = rows.to(self._model.device, torch.float64)
        return (rows if gain is None else rows * gain) @ self._basis.r1.to(rows.device)

    def _inside(self, index: int, layer: str, kind: str, tensor: Tensor) -> Tensor:
        """One tensor of block `index`: `kind` is weight or bias."""
        anatomy = self._anatomy
        if layer == anatomy.value_layer:
            tensor = self._with_values_turned(index, tensor)
        if layer == anatomy.up_layer and self._basis.mlp_scales is not None:
            tensor = tensor.clone()
            tensor[anatomy.up_rows] /= _column(self._basis.mlp_scales[index], tensor)
        if kind == "weight" and layer == anatomy.family.o_proj:
            tensor = self._reading_turned_values(index, tensor)
        if kind == "weight" and layer == anatomy.family.down_proj:
            tensor = self._reading_the_mlp(index, tensor)
        return self._in_r1(index, layer, kind, tensor)

    def _reading_the_mlp(self, index: int, weight: Tensor) -> Tensor:
        if self._basis.mlp_scales is not None:
            weight = weight * self._basis.mlp_scales[index].to(weight.device)
        return turned(weight) if self._basis.r4 else weight

    def _in_r1(self, index: int, layer: str, kind: str, tensor: Tensor) -> Tensor:
        if self._basis.r1 is None:
            return tensor
        r1 = self._basis.r1.to(tensor.device)
        anatomy = self._anatomy
        if layer in (anatomy.family.o_proj, anatomy.family.down_proj):
            return r1.T @ tensor if kind == "weight" else tensor @ r1
        if layer in anatomy.family.readers:  # a norm
            return self._neutral(tensor)
        norm = anatomy.norm_of(layer)
        if norm is None or kind != "weight":
            return tensor
        return self._turned(tensor, self._gain(f"{self._model.prefix(index)}{norm}"))

    def _with_values_turned(self, index: int, tensor: Tensor) -> Tensor:
        """Weight (out, in) or bias (out,) of the layer that makes the values."""
        anatomy = self._anatomy
        tensor = tensor.clone()
        values = tensor[anatomy.value_rows].reshape(anatomy.kv_heads, anatomy.head_dim, -1)
        if self._basis.value_scales is not None:
            values = values / self._basis.value_scales[index].to(tensor.device)[..., None]
        if self._basis.r2 is not None:
            values = self._basis.r2[index].to(tensor.device).mT @ values
        tensor[anatomy.value_rows] = values.reshape(tensor[anatomy.value_rows].shape)
        return tensor

    def _reading_turned_values(self, index: int, weight: Tensor) -> Tensor:
        """o_proj's weight: its columns are the query heads, `group` of them to a KV head."""
        anatomy = self._anatomy
        group = anatomy.heads // anatomy.kv_heads
        columns = weight.reshape(len(weight), anatomy.kv_heads, group, anatomy.head_dim)
        if self._basis.value_scales is not None:
            columns = columns * self._basis.value_scales[index].to(weight.device)[:, None]
        if self._basis.r2 is not None:
            columns = columns @ self._basis.r2[index].to(weight.device)
        return columns.reshape(weight.shape)

    def _gain(self, norm: str) -> Tensor:
        stored = self._model.stored_name(f"{norm}.weight")
        weight = self._source.read([stored])[stored].to(self._model.device, torch.float64)
        return weight + self._anatomy.family.gain_offset

    def _neutral(self, gain: Tensor) -> Tensor:
        """The weight of a norm that only normalises."""
        return torch.full_like(gain, 1.0 - self._anatomy.family.gain_offset)


def _column(scales: Tensor, like: Tensor) -> Tensor:
    """Scales (out,) for the rows of a weight (out, in) or the entries of a bias (out,)."""
    scales = scales.to(like.device)
    return scales[:, None] if like.dim() == 2 else scales


def _distance_from_orthogonal(rotation: Tensor) -> float:
    eye = torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
    return float((rotation @ rotation.mT - eye).abs().max())
