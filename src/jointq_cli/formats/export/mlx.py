"""MLX's affine layout, which mlx-lm runs on Apple machines.

Of a weight NAME.weight (out, in) on a uniform grid with b bits, w = scale * code + bias:
    NAME.weight  uint32 (out, in * b / 32)  codes from 0, packed along in
    NAME.scales  float16 (out, groups)
    NAME.biases  float16 (out, groups)      -scale * zero-point, which need not be an integer

The product of a bfloat16 scale with a zero-point of up to 8 bits has up to 16 significant bits, of which float16 keeps
11 and bfloat16 would keep 8.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from jointq_cli.errors import ConfigError
from jointq_cli.formats.export.base import (
    Exporter,
    QuantizedModel,
    float16_scales,
    refuse_permutation,
    refuse_wide_scales,
    relative_error,
    uniform_forms,
)
from jointq_cli.formats.export.bit_stream import pack, unpack
from jointq_cli.formats.export.shards import write_config, write_shards
from jointq_cli.formats.uniform import UniformWeight
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.setting_rules import check_settings, setting

MLX = "mlx"
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
ROUNDING = 2.0**-11  # of a number in float16, relative
# Causal language models that both transformers 5.23 and mlx-lm 0.32.2 know, as `model_type` names them.
MODEL_TYPES = """
afmoe apertus bailing_hybrid bitnet cohere cohere2 dbrx deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5
ernie4_5_moe exaone4 exaone_moe falcon_h1 falcon_mamba gemma gemma2 gemma3 gemma3_text gemma3n gemma4 gemma4_text
gemma4_unified glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite
granitemoe granitemoehybrid helium hunyuan_v1_dense internlm3 iquestcoder jamba kimi_linear laguna lfm2 lfm2_moe
llama llama4 llama4_text longcat_flash mamba mamba2 mellum mimo_v2_flash minicpm3 minimax minimax_m2 ministral3
mistral mixtral nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe phi phi3 phimoe qwen2 qwen2_moe
qwen3 qwen3_5 qwen3_5_moe qwen3_moe qwen3_next recurrent_gemma seed_oss smollm3 solar_open stablelm starcoder2
"""


@dataclass(frozen=True)
class MlxExporter(Exporter):
    """2, 3, 4, 5, 6 and 8 bits; several grids in one model.

    dtype: of embeddings, norms and the like. MLX computes in the dtype of activations and scales, which is float32
    where these are bfloat16 and float16; with all of them in float16 it computes in float16, which is faster.
    """

    format: ClassVar[str] = MLX
    engine: ClassVar[str] = "mlx"
    tolerance: ClassVar[float] = 255 * ROUNDING  # of a bias, which is at most 2^bits - 1 steps

    dtype: str = setting("float16", choices=("float16", "checkpoint"))

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def label(self) -> str:
        return MLX if self.dtype == "float16" else f"{MLX}-{self.dtype}"

    def check(self, model: QuantizedModel) -> list[str]:
        forms = _forms(model)
        refuse_permutation(forms, MLX)
        refuse_wide_scales(forms, MLX)
        for name, form in forms.items():
            if form.bits not in BITS:
                raise ConfigError(f"export={MLX}: {name} has {form.bits} bits, and MLX takes {_listed(BITS)}")
            if _group_size(form) is None:
                raise ConfigError(
                    f"export={MLX}: {name} has groups of {form.group_size} columns, and MLX takes {_listed(GROUPS)} or "
                    "what these divide"
                )
        kind = model.checkpoint.config.get("model_type")
        return [] if kind in MODEL_TYPES.split() else [f"export={MLX}: mlx-lm 0.32.2 has no model of type {kind}"]

    def write(self, model: QuantizedModel, directory: Path) -> None:
        plain = _read_float16 if self.dtype == "float16" else _read
        write_shards(
            model,
            directory,
            lambda name: pack_weight(name, model.load_uniform(name)),
            lambda name: {name: plain(model.checkpoint, name)},
        )
        config = _quantization_config(model)
        write_config(model, directory, {"quantization": config, "quantization_config": config})

    def reader(self, model: QuantizedModel, directory: Path) -> Callable[[str], Tensor]:
        written = Checkpoint(directory, packed=True)
        forms = _forms(model)

        def read(name: str) -> Tensor:
            if name not in forms:
                return _read(written, name)
            return unpack_weight(forms[name].bits, *written.read(_entries(name)).values())

        return read

    def plain_tolerance(self, model: QuantizedModel, name: str) -> float:
        return ROUNDING

    def stored_bits(self, model: QuantizedModel) -> int:
        total = 0
        for form in _forms(model).values():
            numbers = 2 * form.codes.numel() // (_group_size(form) or 1)
            total += form.bits * form.codes.numel() + 16 * numbers
        return total

    def commands(self, model: QuantizedModel, name: str) -> list[tuple[str, str]]:
        return [
            ("mlx-lm", f"mlx_lm.generate --model {name} --prompt 'Hello'"),
            ("mlx-lm, as a server", f"mlx_lm.server --model {name}"),
        ]


def _forms(model: QuantizedModel) -> dict[str, UniformWeight]:
    """Half-integer levels and real zero-points are held too."""
    return uniform_forms(model, MLX, offsets=True)


def pack_weight(name: str, weight: UniformWeight) -> dict[str, Tensor]:
    """The tensors of the module's docstring, by name. Raises ConfigError where a number is out of float16's range."""
    scales = float16_scales(weight, name, MLX)
    biases = (scales.to(torch.float32) * -weight.unsigned_zero_point().to(torch.float32)).to(torch.float16)
    if not torch.isfinite(biases).all():
        raise ConfigError(f"export={MLX}: a scale times zero-point of {name} is out of float16's range")
    repeats = weight.group_size // (_group_size(weight) or weight.group_size)
    words = pack(weight.unsigned_codes(), weight.bits).view(torch.uint32)
    repeated = (numbers.repeat_interleave(repeats, dim=1) for numbers in (scales, biases))
    return dict(zip(_entries(name), (words, *repeated), strict=True))


def unpack_weight(bits: int, words: Tensor, scales: Tensor, biases: Tensor) -> Tensor:
    """The weight (out, in) float32 of the tensors of the module's docstring."""
    rows, columns = words.shape[0], words.shape[1] * 32 // bits
    codes = unpack(words, bits, columns).to(torch.float32).reshape(rows, scales.shape[1], -1)
    codes.mul_(scales.to(torch.float32)[:, :, None]).add_(biases.to(torch.float32)[:, :, None])
    return codes.reshape(rows, columns)


def _entries(name: str) -> list[str]:
    module = name.removesuffix(".weight")
    return [name, f"{module}.scales", f"{module}.biases"]


def _group_size(form: UniformWeight) -> int | None:
    """The columns that share a scale in the file: those of the grid, or a part of them; None where MLX has no such."""
    if form.group_size in GROUPS:
        return form.group_size
    return next((size for size in (64, 32) if form.group_size % size == 0), None)


def _listed(numbers: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"


def _read(checkpoint: Checkpoint, name: str) -> Tensor:
    return checkpoint.read([name])[name]


def _read_float16(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor that is not quantised, floating-point ones in float16. Raises ConfigError where that loses more than
    rounding."""
    tensor = _read(checkpoint, name)
    if not tensor.is_floating_point():
        return tensor
    rounded = tensor.to(torch.float16)
    if not relative_error(rounded, tensor) <= ROUNDING:
        raise ConfigError(f"export={MLX}: {name} has numbers out of float16's range; dtype=checkpoint")
    return rounded


def _quantization_config(model: QuantizedModel) -> Mapping[str, Any]:
    """The grid of most layers, those of the others by name, and false for all other linear layers and embeddings."""
    grids = {name: (_group_size(form), form.bits) for name, form in _forms(model).items()}
    usual = Counter(grids.values()).most_common(1)[0][0]
    shapes = model.checkpoint.shapes
    others = {name: _grid_config(*grid) for name, grid in grids.items() if grid != usual}
    left = {name: False for name in model.plain if name.endswith(".weight") and len(shapes[name]) == 2}
    return {**_grid_config(*usual), **{name.removesuffix(".weight"): value for name, value in (others | left).items()}}


def _grid_config(group_size: int | None, bits: int) -> dict[str, Any]:
    return {"group_size": group_size, "bits": bits, "mode": "affine"}
