"""GPTQ's layout: kept by gptqmodel, which transformers calls, by exllama and by older stacks.

Of a weight NAME.weight (out, in) on a uniform grid with b bits:
    NAME.qweight  int32 (in * b / 32, out)      codes from 0, packed along in
    NAME.qzeros   int32 (groups, out * b / 32)  zero-points of these codes, packed along out; version 1 stores them - 1
    NAME.scales   float16 (groups, out)
    NAME.g_idx    int32 (in,)                   the group of each column

The only layout here that holds columns in another order (act_order).
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from jointq_cli import __version__
from jointq_cli.errors import ConfigError
from jointq_cli.formats.export.base import (
    Exporter,
    QuantizedModel,
    float16_scales,
    refuse_wide_scales,
    uniform_forms,
)
from jointq_cli.formats.export.bit_stream import WORD, pack, unpack
from jointq_cli.formats.export.shards import write_config, write_shards
from jointq_cli.formats.uniform import UniformWeight
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.setting_rules import check_settings, setting

GPTQ = "gptq"
PARTS = ("qweight", "qzeros", "scales", "g_idx")
BITS = (2, 3, 4, 8)  # that transformers' GPTQConfig takes
CONFIG_FILE = "quantize_config.json"  # read by loaders from before config.json had the key
FORMATS = {"v1": "gptq", "v2": "gptq_v2"}  # as `checkpoint_format` names them
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class GptqExporter(Exporter):
    """2, 3, 4 and 8 bits, one grid for all layers."""

    format: ClassVar[str] = GPTQ
    engine: ClassVar[str] = "transformers"
    engine_needs: ClassVar[tuple[str, ...]] = ("gptqmodel", "optimum")

    version: str | None = setting(
        None, choices=tuple(FORMATS), null="for v1 where the grid is symmetric and v2 elsewhere"
    )

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def label(self) -> str:
        return GPTQ if self.version is None else f"{GPTQ}-{self.version}"

    def check(self, model: QuantizedModel) -> list[str]:
        forms = uniform_forms(model, GPTQ)
        refuse_wide_scales(forms, GPTQ)
        _refuse_several_grids(forms)
        for name, form in forms.items():
            _refuse_shape(name, form)
        return [f"export={GPTQ}: {note}" for note in [*_vllm_notes(forms), *_head_notes(model)]]

    def write(self, model: QuantizedModel, directory: Path) -> None:
        version = self._version(model)
        write_shards(model, directory, lambda name: pack_weight(name, model.load_uniform(name), version))
        config = _quantization_config(model, version)
        write_config(model, directory, {"quantization_config": config})
        (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def reader(self, model: QuantizedModel, directory: Path) -> Callable[[str], Tensor]:
        written = Checkpoint(directory, packed=True)
        forms, version = uniform_forms(model, GPTQ), self._version(model)

        def read(name: str) -> Tensor:
            if name not in forms:
                return written.read([name])[name]
            return unpack_weight(forms[name].bits, version, *written.read(_entries(name)).values())

        return read

    def stored_bits(self, model: QuantizedModel) -> int:
        """Codes, zero-points of symmetric grids too, scales, and the groups with 32 bits a column."""
        forms = uniform_forms(model, GPTQ).values()
        grids = sum(form.scale.numel() * (16 + form.bits) for form in forms)
        return grids + sum(form.bits * form.codes.numel() + 32 * form.shape[1] for form in forms)

    def commands(self, model: QuantizedModel, name: str) -> list[tuple[str, str]]:
        load = f"import gptqmodel; print(gptqmodel.GPTQModel.load('{name}').generate('Hello')[0])"
        vllm = [] if _vllm_notes(uniform_forms(model, GPTQ)) else [("vLLM", f"vllm serve {name}")]
        return [("transformers", "pip install gptqmodel optimum"), ("gptqmodel", f'python -c "{load}"'), *vllm]

    def _version(self, model: QuantizedModel) -> str:
        return self.version or ("v1" if all(form.symmetric for form in uniform_forms(model, GPTQ).values()) else "v2")


def pack_weight(name: str, weight: UniformWeight, version: str) -> dict[str, Tensor]:
    """The tensors of the module's docstring, by name. Raises ConfigError where a number does not fit."""
    zero_point = weight.unsigned_zero_point()
    if version == "v1":
        if zeros := int((zero_point == 0).sum()):
            raise ConfigError(
                f"export={GPTQ}: version=v1 has no place for zero-point 0 ({zeros} groups of {name}); version=v2"
            )
        zero_point = zero_point - 1
    tensors = (
        pack(weight.unsigned_codes(), weight.bits).T,
        pack(zero_point.T, weight.bits),
        float16_scales(weight, name, GPTQ).T,
        weight.column_groups().to(torch.int32),
    )
    return dict(zip(_entries(name), tensors, strict=True))


def unpack_weight(bits: int, version: str, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor) -> Tensor:
    """The weight (out, in) float32 of the tensors of the module's docstring."""
    rows, columns = scales.shape[1], len(g_idx)
    zero_point = unpack(qzeros, bits, rows)
    if version == "v1":
        zero_point = (zero_point + 1) & ((1 << bits) - 1)
    weight = unpack(qweight.T.contiguous(), bits, columns).to(torch.float32)
    groups = g_idx.long()
    return weight.sub_(zero_point.T.to(torch.float32)[:, groups]).mul_(scales.T.to(torch.float32)[:, groups])


def _entries(name: str) -> list[str]:
    return [f"{name.removesuffix('weight')}{part}" for part in PARTS]


def _refuse_several_grids(forms: Mapping[str, UniformWeight]) -> None:
    first: dict[tuple[int, bool, int], str] = {}
    for name, form in forms.items():
        first.setdefault((form.bits, form.symmetric, _group_size(forms, form)), name)
    if len(first) > 1:
        one, two = list(first.values())[:2]
        raise ConfigError(
            f"export={GPTQ}: {one} is {forms[one].label} and {two} is {forms[two].label}; the format holds one grid "
            "for all layers; export=compressed-tensors"
        )


def _refuse_shape(name: str, form: UniformWeight) -> None:
    if form.bits not in BITS:
        raise ConfigError(
            f"export={GPTQ}: {name} has {form.bits} bits, and its runtimes load {', '.join(map(str, BITS))}; "
            "export=compressed-tensors"
        )
    for side, size in zip(("out", "in"), form.shape, strict=True):
        if size * form.bits % WORD:
            raise ConfigError(
                f"export={GPTQ}: {name} has {side}_features={size}, which with {form.bits} bits fill no whole 32-bit "
                "words; export=compressed-tensors"
            )


def _group_size(forms: Mapping[str, UniformWeight], form: UniformWeight) -> int:
    """Of this form; -1 where it has one scale per row, unless others have groups of this size."""
    sizes = {other.group_size for other in forms.values() if other.scale.shape[1] > 1}
    return form.group_size if form.scale.shape[1] > 1 or form.group_size in sizes else -1


def _permuted(forms: Mapping[str, UniformWeight]) -> bool:
    return any(form.permutation is not None for form in forms.values())


def _vllm_notes(forms: Mapping[str, UniformWeight]) -> list[str]:
    served = all(form.symmetric and form.bits in (4, 8) for form in forms.values()) and not _permuted(forms)
    rule = "vLLM takes this format with 4 or 8 bits, symmetric, without act_order; use export=compressed-tensors"
    return [] if served else [rule]


def _head_notes(model: QuantizedModel) -> list[str]:
    head = next((name for name in model.forms if name.endswith(HEAD)), None)
    return [f"{head} is quantised, and transformers loads the decoder blocks only; gptqmodel loads it"] if head else []


def _quantization_config(model: QuantizedModel, version: str) -> dict[str, Any]:
    forms = uniform_forms(model, GPTQ)
    form = next(iter(forms.values()))
    config = {
        "quant_method": GPTQ,
        "bits": form.bits,
        "group_size": _group_size(forms, form),
        "sym": form.symmetric,
        "desc_act": _permuted(forms),
        "lm_head": any(name.endswith(HEAD) for name in forms),
        "format": FORMATS[version],
        "checkpoint_format": FORMATS[version],
        "pack_dtype": "int32",
        "true_sequential": True,
        "damp_percent": 0.01,  # says nothing of these weights, but loaders demand a value
        "meta": {"quantizer": [f"jointq:{__version__}"]},
    }
    left = [name for name in model.linear if name not in forms and not name.endswith(HEAD)]
    if not left:
        return config
    # gptqmodel and vLLM skip layers by `dynamic`, transformers by a list of those that are quantised.
    modules = [name.removesuffix(".weight") for name in forms]
    skipped: dict[str, Any] = {f"-:^{re.escape(name.removesuffix('.weight'))}$": {} for name in left}
    return {**config, "dynamic": skipped, "modules_in_block_to_quantize": [modules]}
