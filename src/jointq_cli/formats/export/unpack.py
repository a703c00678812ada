"""A packed checkpoint as an ordinary one: compressed-tensors `pack-quantized`, GPTQ v1 and v2, MLX affine, MXFP4.

Reads what jointq exports and what others write in these layouts, with nothing but torch. Weights are computed in
float32 and rounded once.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jointq_cli.errors import ModelError
from jointq_cli.formats import mxfp4
from jointq_cli.formats.export import compressed_tensors, gptq, mlx
from jointq_cli.formats.export.bit_stream import WORD, packed_words
from jointq_cli.formats.export.input_transforms import StoredTransforms, is_meant
from jointq_cli.formats.export.shards import CONFIG
from jointq_cli.models.checkpoint import PACKED_KEYS, Checkpoint, copy_companions, write_index
from jointq_cli.models.identity import KEY, SOURCE_LAYOUT
from jointq_cli.system.tensor_files import save_tensors

SHARD_BYTES = 1 << 30  # of a file that is written; the last tensor may exceed it
WEIGHT = ".weight"
DEQUANTIZED = (torch.bfloat16, torch.float16, torch.float32)
UNREAD = ("kv_cache_scheme", "sparsity_config")  # of compressed-tensors


@dataclass(frozen=True)
class PackedCheckpoint(ABC):
    """A checkpoint in one layout. config: what its config.json says of the quantisation."""

    checkpoint: Checkpoint
    config: Mapping[str, Any]

    @abstractmethod
    def check(self) -> None:
        """Raises ModelError where the config names something that is not read here."""

    @abstractmethod
    def parts(self, name: str) -> list[str]:
        """The tensors of which the one of this name is the first: itself alone where it is not quantised, none where it
        belongs to another."""

    @abstractmethod
    def decode(self, module: str, parts: list[Tensor]) -> Tensor:
        """The weight (out, in) of `parts`, rounded. Raises ModelError where they do not fit together."""

    def module(self, name: str) -> str:
        """The module of a packed tensor."""
        return name.rpartition(".")[0]

    def weight(self, module: str) -> str:
        """The name of what `decode` returns."""
        return module + WEIGHT

    def refuse(self, reason: str) -> ModelError:
        return ModelError(f"{self.checkpoint.directory}: is quantised, and is not read: {reason}")

    def require(self, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            wanted = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
            raise self.refuse(f"{name} is {found}, and the layout has {wanted}")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that config.json states; bfloat16 without any."""
        named = self.checkpoint.config.get("dtype") or self.checkpoint.config.get("torch_dtype") or "bfloat16"
        found = next((dtype for dtype in DEQUANTIZED if str(dtype) == f"torch.{named}"), None)
        if found is None:
            raise self.refuse(f"dtype={named} in its {CONFIG}")
        return found

    def _grouped(self, name: str, parts: tuple[str, ...], optional: tuple[str, ...] = ()) -> list[str]:
        """As `parts`, of a layer whose tensors end in this way."""
        tensors, anchor = self.checkpoint.tensors, parts[0]
        module = next((name.removesuffix(part) for part in (*parts, *optional) if name.endswith(part)), None)
        if module is None or module + anchor not in tensors:
            return [name]
        if name != module + anchor:
            return []
        if missing := [part for part in parts if module + part not in tensors]:
            raise self.refuse(f"holds {name} and no {module}{missing[0]}")
        return [*(module + part for part in parts), *(module + part for part in optional if module + part in tensors)]


class PackedCompressedTensors(PackedCheckpoint):
    """`quantization_config` of compressed-tensors, `pack-quantized`."""

    def check(self) -> None:
        if (found := self.config.get("format")) != "pack-quantized":
            raise self.refuse(f"format={found} of compressed-tensors; pack-quantized is")
        if key := next((key for key in UNREAD if self.config.get(key)), None):
            raise self.refuse(f"it has a {key}")
        if ordered := next((name for name in self.checkpoint.tensors if name.endswith(".weight_g_idx")), None):
            raise self.refuse(f"it holds {ordered}, columns in another order")
        _ = self._transforms.matrices
        for group in self._groups:
            weights = group.get("weights") or {}
            for key, read in (
                ("type", ("int",)),
                ("strategy", ("group", "channel")),
                ("actorder", (None, False, "weight", "static")),
            ):
                if weights.get(key) not in read:
                    raise self.refuse(f"{key}={weights.get(key)} of its weights")
            if found := next((key for key in ("input_activations", "output_activations") if group.get(key)), None):
                raise self.refuse(f"it has {found}")

    @cached_property
    def _transforms(self) -> StoredTransforms:
        return StoredTransforms(self.checkpoint, self.config)

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return list((self.config.get("config_groups") or {}).values())

    def parts(self, name: str) -> list[str]:
        if name in self._transforms.matrices.values():
            return []
        required = (".weight_packed", ".weight_scale", ".weight_shape")
        return self._grouped(name, required, (".weight_zero_point",))

    def decode(self, module: str, parts: list[Tensor]) -> Tensor:
        weights = self._scheme(module)
        bits, symmetric = weights["num_bits"], bool(weights.get("symmetric", True))
        if len(parts) != (3 if symmetric else 4):
            raise self.refuse(f"symmetric={symmetric} in its config, and {module} has {len(parts) - 3} zero-points")
        packed, scale, shape, *zero_point = parts
        rows, columns = shape.tolist()
        groups = scale.shape[1] if scale.dim() == 2 else 0
        if not groups or columns % groups:
            raise self.refuse(f"{module}.weight_scale is {list(scale.shape)} for {columns} columns")
        self.require(f"{module}.weight_packed", packed, torch.int32, (rows, packed_words(columns, bits)))
        for tensor in zero_point:
            self.require(f"{module}.weight_zero_point", tensor, torch.int32, (packed_words(rows, bits), groups))
        weight = compressed_tensors.unpack_weight(bits, *parts)
        return self._transforms.turned_back(module, weight).to(scale.dtype)

    def _scheme(self, module: str) -> dict[str, Any]:
        for group in self._groups:
            if any(is_meant(target, module) for target in group.get("targets") or ()):
                return dict(group["weights"])
        raise self.refuse(f"no group of its config names {module}")


class PackedGptq(PackedCheckpoint):
    """`quantization_config` of GPTQ, in words along the columns."""

    @property
    def _version(self) -> str:
        found = self.config.get("checkpoint_format") or self.config.get("format") or gptq.FORMATS["v1"]
        version = next((version for version, word in gptq.FORMATS.items() if word == found), None)
        if version is None:
            raise self.refuse(f"checkpoint_format={found}; {' and '.join(gptq.FORMATS.values())} are")
        return version

    def check(self) -> None:
        _ = self._version
        if self.config.get("bits") not in gptq.BITS:
            raise self.refuse(f"bits={self.config.get('bits')}")
        if other := next((key for key, value in (self.config.get("dynamic") or {}).items() if value), None):
            raise self.refuse(f"it has layers on another grid, dynamic={other}")

    def parts(self, name: str) -> list[str]:
        return self._grouped(name, tuple(f".{part}" for part in gptq.PARTS))

    def decode(self, module: str, parts: list[Tensor]) -> Tensor:
        bits = self.config["bits"]
        words, zeros, scales, g_idx = parts
        (groups, rows), columns = scales.shape, len(g_idx)
        self.require(f"{module}.qweight", words, torch.int32, (packed_words(columns, bits), rows))
        self.require(f"{module}.qzeros", zeros, torch.int32, (groups, packed_words(rows, bits)))
        if not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
            raise self.refuse(f"{module}.g_idx names groups that {module}.scales lacks")
        return gptq.unpack_weight(bits, self._version, *parts).to(self.dtype)


class PackedMlx(PackedCheckpoint):
    """`quantization` of MLX, mode affine; embeddings may be quantised too."""

    def check(self) -> None:
        grids = [self.config, *(grid for grid in self.config.values() if isinstance(grid, dict))]
        mode = next((grid["mode"] for grid in grids if grid.get("mode", "affine") != "affine"), None)
        if mode:
            raise self.refuse(f"mode={mode} of MLX; affine is")

    def parts(self, name: str) -> list[str]:
        quantised = f"{name.rpartition('.')[0]}.scales" in self.checkpoint.tensors
        return self._grouped(name, (WEIGHT, ".scales", ".biases")) if quantised else [name]

    def decode(self, module: str, parts: list[Tensor]) -> Tensor:
        words, scales, biases = parts
        grid = self.config.get(module)
        grid = grid if isinstance(grid, dict) else self.config
        rows, columns = words.shape[0], scales.shape[-1] * int(grid.get("group_size", 64))
        bits = words.shape[1] * WORD // columns
        self.require(f"{module}.biases", biases, scales.dtype, tuple(scales.shape))
        if bits not in mlx.BITS or bits != grid.get("bits"):
            raise self.refuse(f"{module}.weight has {bits} bits for each of {columns} columns, not {grid.get('bits')}")
        self.require(f"{module}.weight", words, torch.uint32, (rows, packed_words(columns, bits)))
        return mlx.unpack_weight(bits, words, scales, biases).to(self.dtype)


class PackedMxfp4(PackedCheckpoint):
    """`quantization_config` of gpt-oss: its experts in FP4, with an exponent for each 32 of them."""

    def check(self) -> None:
        return None

    def module(self, name: str) -> str:
        return name.removesuffix(mxfp4.BLOCKS)

    def weight(self, module: str) -> str:
        return module  # such as experts.gate_up_proj, a parameter

    def parts(self, name: str) -> list[str]:
        return self._grouped(name, (mxfp4.BLOCKS, mxfp4.EXPONENTS))

    def decode(self, module: str, parts: list[Tensor]) -> Tensor:
        blocks, exponents = parts
        self.require(f"{module}{mxfp4.BLOCKS}", blocks, torch.uint8, (*exponents.shape, mxfp4.BYTES))
        return mxfp4.dequantized(blocks, exponents, self.dtype)


def unpack_checkpoint(directory: Path, target: Path) -> None:
    """Writes the checkpoint of `directory` as an ordinary one into `target`, an empty directory.

    Weights have the dtype of their scales (compressed-tensors) or of config.json, all other tensors their own. One
    shard of SHARD_BYTES is in memory at a time. Raises ModelError where the layout, or a part of it, is not read here.
    """
    packed = open_packed(directory)
    packed.check()
    shards: list[Path] = []
    for tensors in _shards(packed):
        shards.append(target / f"model-{len(shards) + 1:05d}.safetensors")
        save_tensors(shards[-1], tensors)
    copy_companions(packed.checkpoint, target, code=True)
    (target / gptq.CONFIG_FILE).unlink(missing_ok=True)
    config = {key: value for key, value in packed.checkpoint.config.items() if key not in PACKED_KEYS}
    if isinstance(packed, PackedMxfp4):  # a model that was trained for it, and has no other checkpoint
        config[KEY] = {SOURCE_LAYOUT: mxfp4.WORD}
    (target / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_index(target, shards)


def open_packed(directory: Path) -> PackedCheckpoint:
    """Raises ModelError for a checkpoint of another quantisation method."""
    checkpoint = Checkpoint(directory, packed=True)
    config = checkpoint.config.get("quantization_config") or {}
    method = config.get("quant_method")
    if method == compressed_tensors.WORD:
        return PackedCompressedTensors(checkpoint, config)
    if method == gptq.GPTQ:
        return PackedGptq(checkpoint, config)
    if method == mxfp4.WORD:
        return PackedMxfp4(checkpoint, config)
    if method is None and (affine := checkpoint.config.get("quantization") or config):
        return PackedMlx(checkpoint, affine)
    raise ModelError(
        f"{directory}: is quantised with quant_method={method}, and compressed-tensors, gptq, mxfp4 and MLX's layout "
        "are read"
    )


def _shards(packed: PackedCheckpoint) -> Iterator[dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    for name in packed.checkpoint.tensors:
        parts = packed.parts(name)
        found = list(packed.checkpoint.read(parts).values())
        if len(parts) == 1:
            tensors[name] = found[0]
        elif parts:
            module = packed.module(name)
            tensors[packed.weight(module)] = packed.decode(module, found)
        if sum(tensor.nbytes for tensor in tensors.values()) >= SHARD_BYTES:
            yield tensors
            tensors = {}
    if tensors:
        yield tensors
