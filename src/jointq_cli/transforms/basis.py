"""A change of basis, and the tensors of a model in it: fused, smoothed and rotated in float64, one tensor at a time.

Activations are row vectors x, a weight is W (out, in), y = x W^T. In the new basis the residual stream is x R1 and the
values of KV head j are v Q_j (R2):

    embedding E -> E R1          readers W -> W diag(gain) R1, and the norm's gain becomes 1
    writers W -> R1^T W          lm_head W -> W diag(gain of the final norm) R1
    values  W_v[j] -> Q_j^T diag(1/s_j) W_v[j]     o_proj, head i of KV head j: W_o[:, i] -> W_o[:, i] diag(s_j) Q_j
    up_proj W -> diag(1/t) W     down_proj W -> W diag(t) H, where H (R4) is applied online to its inputs

s and t are the smoothing scales; the biases of the layers that produce rotated or smoothed outputs change likewise. An
RMSNorm commutes with R1, so the model computes the same function (SliceGPT, arXiv 2401.15024, theorem 1). All but R4 is
absorbed into the weights, and plain transformers runs the result; `models.online_rotation` handles R4. R1, R2 and R4
are SpinQuant's names (arXiv 2405.16406). How R1, R2, s and t are found is no concern of this module.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jointq_cli.kernels.hadamard import hadamard_transform
from jointq_cli.models.checkpoint import DTYPES, copy_companions, require_finite
from jointq_cli.models.online_rotation import with_online
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.transforms.architectures import ArchitectureLayout

EMBEDDING_ROWS = 8192  # of an embedding that are in float64 at the same time


@dataclass(frozen=True)
class Basis:
    """The parts of a change of basis, float64 tensors; None where nothing changes."""

    r1: Tensor | None = None  # (hidden, hidden), orthogonal
    r2: Tensor | None = None  # Q: (blocks, num_kv_heads, head_dim, head_dim), orthogonal
    value_scales: Tensor | None = None  # s: (blocks, num_kv_heads, head_dim)
    mlp_scales: Tensor | None = None  # t: (blocks, intermediate_size)
    r4: bool = False  # whether a Hadamard rotation is applied online to the inputs of down_proj

    @property
    def orthogonality_error(self) -> float:
        """The largest |R R^T - I| over R1 and all Q, NaN where one of them holds NaN."""
        errors = [_distance_from_orthogonal(rotation) for rotation in (self.r1, self.r2) if rotation is not None]
        return max(errors, key=lambda error: math.inf if math.isnan(error) else error, default=0.0)

    def smooth_values(self, inputs: Tensor, block: int) -> Tensor:
        """Inputs of a block's o_proj (tokens, num_heads x head_dim) with the values divided by their scales."""
        if self.value_scales is None:
            return inputs
        kv_heads, head_dim = self.value_scales[block].shape
        by_head = inputs.reshape(len(inputs), kv_heads, -1, head_dim)
        return (by_head / self.value_scales[block][:, None].to(inputs)).reshape(inputs.shape)

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in vars(self).items() if isinstance(tensor, Tensor)}


@dataclass(frozen=True)
class RotatedTensors:
    """The tensors of a model in another basis, each computed from the original's when it is read: a `TensorSource`.

    With R1 only the output embedding absorbs the final norm's gain: tied embeddings become two tensors.
    """

    model: StreamedModel  # the original
    layout: ArchitectureLayout
    basis: Basis
    directory: Path  # see `write_companions`

    @cached_property
    def config(self) -> dict[str, Any]:
        config = dict(self.model.checkpoint.config)
        if self._unties_embeddings:
            config["tie_word_embeddings"] = False
        return with_online(config, self.layout.family.down_proj) if self.basis.r4 else config

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.model.checkpoint.shapes[original] for name, original in self._originals.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Floating-point tensors in float32, rounded once, whatever dtype the original has."""
        return {name: self._compute(name) for name in names}

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype in which the original stores a tensor."""
        return DTYPES[self.model.checkpoint.tensors[self._originals[name]].dtype]

    def gains(self, block: int) -> list[Tensor]:
        """Of the original's norms before attention and MLP, (hidden,) float64 each; empty where there are none."""
        norms = [norm for norm in self.layout.family.readers if norm]
        return [self._norm_gain(f"{self.model.prefix(block)}{norm}") for norm in norms]

    def write_companions(self) -> None:
        """Writes config.json, the tokenizer and the like to `directory`; transformers builds the model from them."""
        copy_companions(self.model.checkpoint, self.directory, code=self.model.trust_remote_code)
        text = json.dumps(self.config, indent=2, ensure_ascii=False) + "\n"
        (self.directory / "config.json").write_text(text, encoding="utf-8")

    @property
    def _unties_embeddings(self) -> bool:
        return self.basis.r1 is not None

    @cached_property
    def _originals(self) -> dict[str, str]:
        """Name of a tensor -> name of the original's tensor that it is computed from."""
        names = {name: name for name in self.model.checkpoint.tensors}
        lm_head = f"{self.layout.lm_head}.weight"
        if self._unties_embeddings and not self.model.stores(lm_head):
            names[lm_head] = self.model.stored_name(f"{self.layout.embedding}.weight")
        return names

    def _compute(self, stored: str) -> Tensor:
        original = self._originals[stored]
        tensor = self._read_original(original)
        require_finite(original, tensor, self.model.checkpoint.directory)
        if not tensor.is_floating_point():
            return tensor
        name = self.model.module_name(stored) if stored == original else stored
        index = self.model.block_of(name)
        if index is None:
            return self._outer_tensor(name, tensor)
        layer, _, kind = name.removeprefix(self.model.prefix(index)).rpartition(".")
        return self._block_tensor(index, layer, kind, tensor.to(self.model.device, torch.float64)).float()

    def _outer_tensor(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor that belongs to no block. Embeddings are the largest of a model: converted a few rows at a time."""
        if self.basis.r1 is None:
            return tensor.float()
        if name == f"{self.layout.final_norm}.weight":
            return self._unit_gain(tensor.float())
        if name == f"{self.layout.embedding}.weight":
            return torch.cat([self._rotate_rows(rows).float().cpu() for rows in tensor.split(EMBEDDING_ROWS)])
        if name == f"{self.layout.lm_head}.weight":
            gain = self._norm_gain(self.layout.final_norm)
            return torch.cat([self._rotate_rows(rows, gain).float().cpu() for rows in tensor.split(EMBEDDING_ROWS)])
        return tensor.float()

    def _rotate_rows(self, rows: Tensor, gain: Tensor | None = None) -> Tensor:
        """Rows (n, hidden) that are vectors of the residual stream, or are multiplied with them after a norm's gain."""
        assert self.basis.r1 is not None  # the caller has checked it
        rows = rows.to(self.model.device, torch.float64)
        return (rows if gain is None else rows * gain) @ self.basis.r1.to(rows.device)

    def _block_tensor(self, index: int, layer: str, kind: str, tensor: Tensor) -> Tensor:
        """One tensor of block `index`, float64; kind: weight or bias."""
        layout = self.layout
        if layer == layout.value_layer:
            tensor = self._change_values(index, tensor)
        if layer == layout.up_layer and self.basis.mlp_scales is not None:
            tensor = tensor.clone()
            tensor[layout.up_rows] /= _as_column(self.basis.mlp_scales[index], tensor)
        if kind == "weight" and layer == layout.family.o_proj:
            tensor = self._read_changed_values(index, tensor)
        if kind == "weight" and layer == layout.family.down_proj:
            tensor = self._read_changed_mlp(index, tensor)
        return self._apply_r1(index, layer, kind, tensor)

    def _change_values(self, index: int, tensor: Tensor) -> Tensor:
        """Weight (out, in) or bias (out,) of the layer that produces the values."""
        layout = self.layout
        tensor = tensor.clone()
        values = tensor[layout.value_rows].reshape(layout.num_kv_heads, layout.head_dim, -1)
        if self.basis.value_scales is not None:
            values = values / self.basis.value_scales[index].to(tensor.device)[..., None]
        if self.basis.r2 is not None:
            values = self.basis.r2[index].to(tensor.device).mT @ values
        tensor[layout.value_rows] = values.reshape(tensor[layout.value_rows].shape)
        return tensor

    def _read_changed_values(self, index: int, weight: Tensor) -> Tensor:
        """o_proj's weight: its columns are the query heads, `group` of them for each KV head."""
        layout = self.layout
        group = layout.num_heads // layout.num_kv_heads
        columns = weight.reshape(len(weight), layout.num_kv_heads, group, layout.head_dim)
        if self.basis.value_scales is not None:
            columns = columns * self.basis.value_scales[index].to(weight.device)[:, None]
        if self.basis.r2 is not None:
            columns = columns @ self.basis.r2[index].to(weight.device)
        return columns.reshape(weight.shape)

    def _read_changed_mlp(self, index: int, weight: Tensor) -> Tensor:
        """down_proj's weight."""
        if self.basis.mlp_scales is not None:
            weight = weight * self.basis.mlp_scales[index].to(weight.device)
        return hadamard_transform(weight) if self.basis.r4 else weight

    def _apply_r1(self, index: int, layer: str, kind: str, tensor: Tensor) -> Tensor:
        if self.basis.r1 is None:
            return tensor
        r1 = self.basis.r1.to(tensor.device)
        family = self.layout.family
        if layer in (family.o_proj, family.down_proj):
            return r1.T @ tensor if kind == "weight" else tensor @ r1
        if layer in family.readers:  # a norm
            return self._unit_gain(tensor)
        norm = self.layout.norm_before(layer)
        if norm is None or kind != "weight":
            return tensor
        return self._rotate_rows(tensor, self._norm_gain(f"{self.model.prefix(index)}{norm}"))

    def _norm_gain(self, norm: str) -> Tensor:
        weight = self._read_original(self.model.stored_name(f"{norm}.weight"))
        return weight.to(self.model.device, torch.float64) + self.layout.family.gain_offset

    def _unit_gain(self, weight: Tensor) -> Tensor:
        """The weight of a norm whose gain has been fused into the layers after it."""
        return torch.full_like(weight, 1.0 - self.layout.family.gain_offset)

    def _read_original(self, stored: str) -> Tensor:
        return self.model.checkpoint.read([stored])[stored]


def _as_column(scales: Tensor, like: Tensor) -> Tensor:
    """Scales (out,) for the rows of a weight (out, in) or the entries of a bias (out,)."""
    scales = scales.to(like.device)
    return scales[:, None] if like.dim() == 2 else scales


def _distance_from_orthogonal(rotation: Tensor) -> float:
    eye = torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
    return float((rotation @ rotation.mT - eye).abs().max())
