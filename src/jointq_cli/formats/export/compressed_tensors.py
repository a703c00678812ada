"""compressed-tensors, `pack-quantized`: the layout that vLLM serves best and that transformers reads.

Of a weight NAME.weight (out, in) on a uniform grid with b bits:
    NAME.weight_packed      int32 (out, words)     codes from 0, packed along in
    NAME.weight_scale       (out, groups)          in the checkpoint's dtype
    NAME.weight_shape       int64 (2,)
    NAME.weight_zero_point  int32 (words, groups)  asymmetric only, packed along out
Of turned weights these are W Q, and the inputs are turned at run time: `input_transforms`.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from jointq_cli.errors import ConfigError
from jointq_cli.formats.export.base import Exporter, QuantizedModel, refuse_permutation, uniform_forms
from jointq_cli.formats.export.bit_stream import pack, unpack
from jointq_cli.formats.export.input_transforms import StoredTransforms, WrittenTransforms, bits_of_matrix
from jointq_cli.formats.export.shards import write_config, write_shards
from jointq_cli.formats.turned import TurnedWeight
from jointq_cli.formats.uniform import UniformWeight
from jointq_cli.models.checkpoint import Checkpoint

WORD = "compressed-tensors"
VERSION = "0.20.0"  # of the library, whose layout this is
MARLIN_GROUPS = (32, 64, 128)
_EXPERT = re.compile(r"\.experts\.\d+\.")
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers that vLLM joins into one
STORED_FUSED = ("qkv_proj", "query_key_value", "gate_up_proj")  # the same, joined in the checkpoint


@dataclass(frozen=True, order=True)
class Scheme:
    """What `quantization_config` says of some layers. group_size: None for one scale per row."""

    bits: int
    symmetric: bool
    group_size: int | None

    def config(self, targets: list[str]) -> dict[str, Any]:
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "channel" if self.group_size is None else "group",
            "group_size": self.group_size,
            "dynamic": False,
        }
        return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}


@dataclass(frozen=True)
class CompressedTensorsExporter(Exporter):
    """2 to 8 bits, symmetric and asymmetric, in groups or per channel; several grids in one model; turned weights."""

    format: ClassVar[str] = WORD
    holds_turned: ClassVar[bool] = True
    engine: ClassVar[str] = "transformers"
    engine_needs: ClassVar[tuple[str, ...]] = ("compressed_tensors",)

    @property
    def label(self) -> str:
        return WORD

    def check(self, model: QuantizedModel) -> list[str]:
        forms = _forms(model)
        refuse_permutation(forms, WORD)
        _refuse_unturned(model)
        _refuse_different_signs(model)
        name = next((name for name, form in forms.items() if form.bits < 2), None)
        if name is not None:
            raise ConfigError(f"export={WORD}: {name} has 1 bit, and vLLM runs 2 to 8; quantizer.bits=2")
        expert = next((name for name, form in forms.items() if _EXPERT.search(name) and not form.symmetric), None)
        if expert is not None:
            raise ConfigError(
                f"export={WORD}: {expert} is asymmetric, and transformers and vLLM read experts with symmetric grids "
                "alone; quantizer.symmetric=true"
            )
        schemes = _schemes(forms)
        notes = [*_kernel_notes(schemes), *_mixed_notes(schemes), *_fused_notes(model, schemes)]
        return [*notes, *_turned_notes(_turned(model))]

    def engine_reads(self, model: QuantizedModel) -> bool:
        return not _turned(model) and not _mixed_notes(_schemes(_forms(model)))

    def stored_bits(self, model: QuantizedModel) -> int:
        signs = {form.signs.numpy().tobytes() for form in _turned(model).values()}  # int8: as many bytes as signs
        matrices = sum(bits_of_matrix(len(one)) for one in signs)
        return sum(form.stored_bits for form in _forms(model).values()) + matrices

    def write(self, model: QuantizedModel, directory: Path) -> None:
        transforms = WrittenTransforms()

        def packed(name: str) -> dict[str, Tensor]:
            weight, module = model.load(name), _module(name)
            if isinstance(weight, TurnedWeight):
                return pack_weight(module, weight.inner) | transforms.add(module, weight.signs)
            assert isinstance(weight, UniformWeight), f"{name}: {weight.kind}"
            return pack_weight(module, weight)

        write_shards(model, directory, packed)
        config = _quantization_config(model)
        if transforms.sizes:
            config["transform_config"] = transforms.config()
        write_config(model, directory, {"quantization_config": config})

    def reader(self, model: QuantizedModel, directory: Path) -> Callable[[str], Tensor]:
        written = Checkpoint(directory, packed=True)
        forms = _forms(model)
        transforms = StoredTransforms(written, written.config["quantization_config"])

        def read(name: str) -> Tensor:
            if name not in forms:
                return written.read([name])[name]
            form, module = forms[name], _module(name)
            entries = [entry for entry in _entries(module) if entry in written.tensors]
            return transforms.turned_back(module, unpack_weight(form.bits, *written.read(entries).values()))

        return read

    def commands(self, model: QuantizedModel, name: str) -> list[tuple[str, str]]:
        vllm = ("vLLM", f"vllm serve {name}")
        return [vllm] if _turned(model) else [vllm, ("transformers", "pip install compressed-tensors")]


def pack_weight(module: str, weight: UniformWeight) -> dict[str, Tensor]:
    """The tensors of the module's docstring, by name."""
    packed, scale, shape, zero_point = _entries(module)
    tensors = {
        packed: pack(weight.unsigned_codes(), weight.bits),
        scale: weight.scale,
        shape: torch.tensor(weight.shape),
    }
    if not weight.symmetric:
        tensors[zero_point] = pack(weight.unsigned_zero_point().T, weight.bits).T
    return tensors


def unpack_weight(bits: int, packed: Tensor, scale: Tensor, shape: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """The weight (out, in) float32 of the tensors of the module's docstring."""
    rows, columns = shape.tolist()
    codes = unpack(packed, bits, columns).to(torch.float32).reshape(rows, scale.shape[1], -1)
    offset = torch.full_like(scale, 1 << (bits - 1), dtype=torch.float32)
    if zero_point is not None:
        offset = unpack(zero_point.T.contiguous(), bits, rows).T.to(torch.float32)
    return codes.sub_(offset[:, :, None]).mul_(scale.to(torch.float32)[:, :, None]).reshape(rows, columns)


def _forms(model: QuantizedModel) -> dict[str, UniformWeight]:
    return uniform_forms(model, WORD, turned=True)


def _turned(model: QuantizedModel) -> dict[str, TurnedWeight]:
    return {name: form for name, form in model.forms.items() if isinstance(form, TurnedWeight)}


def _sizes(turned: Mapping[str, TurnedWeight]) -> list[int]:
    """Of the matrices; those of the same size and other signs are not distinguished."""
    return sorted({len(form.signs) for form in turned.values()})


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _entries(module: str) -> list[str]:
    return [f"{module}.weight_{part}" for part in ("packed", "scale", "shape", "zero_point")]


def _schemes(forms: Mapping[str, UniformWeight]) -> dict[Scheme, list[str]]:
    """The names of the weights on each grid."""
    sizes = {form.group_size for form in forms.values() if form.scale.shape[1] > 1}
    found: dict[Scheme, list[str]] = defaultdict(list)
    for name, form in forms.items():
        grouped = form.scale.shape[1] > 1 or form.group_size in sizes  # one group of the size that others have
        found[Scheme(form.bits, form.symmetric, form.group_size if grouped else None)].append(name)
    return dict(found)


def _quantization_config(model: QuantizedModel) -> dict[str, Any]:
    schemes = _schemes(_forms(model))
    single = len(schemes) == 1
    groups = {
        f"group_{index}": scheme.config(["Linear"] if single else [_module(name) for name in names])
        for index, (scheme, names) in enumerate(schemes.items())
    }
    config = {
        "quant_method": WORD,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "version": VERSION,
        "config_groups": groups,
        "ignore": _ignored(model),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    # Read by transformers, which otherwise fails for asymmetric weights, and which with it takes the first scheme for
    # all layers. vLLM ignores it.
    return {**config, "dequantize": True} if single and not _turned(model) else config


def _ignored(model: QuantizedModel) -> list[str]:
    """Linear layers that are not quantised; a tied head has no tensor."""
    names = [_module(name) for name in model.linear if name not in model.forms]
    return names if any(name.endswith("lm_head") for name in names) else [*names, "lm_head"]


def _refuse_unturned(model: QuantizedModel) -> None:
    """Raises ConfigError for turned weights of layers whose inputs vLLM does not turn, as its source stands (0.32)."""
    for name in _turned(model):
        module = _module(name)
        reasons = {
            "is an expert": _EXPERT.search(name),
            "has a bias": f"{module}.bias" in model.checkpoint.tensors,
            "is several layers in one": module.endswith(STORED_FUSED),
            "is inside of a wrapper, under another name than there": "language_model." in name,
        }
        if reason := next((reason for reason, applies in reasons.items() if applies), None):
            raise ConfigError(
                f"export={WORD}: {name} is turned and {reason}, and vLLM does not turn inputs of these; "
                "quantizer.incoherence=none, for these alone by layers.overrides"
            )


def _refuse_different_signs(model: QuantizedModel) -> None:
    """Raises ConfigError where layers that vLLM joins have inputs turned by different signs."""
    signs = {_module(name): form.signs for name, form in _turned(model).items()}
    for module, ours in signs.items():
        for first, *others in FUSED:
            siblings = [module.replace(first, other) for other in others if module.endswith(first)]
            theirs = {each: signs[each] for each in siblings if each in signs}
            if other := next((each for each, found in theirs.items() if not torch.equal(found, ours)), None):
                raise ConfigError(
                    f"export={WORD}: {module} and {other} are turned by different signs, and vLLM joins both; one "
                    "quantizer.incoherence_seed and incoherence_block for them"
                )


def _turned_notes(turned: Mapping[str, TurnedWeight]) -> list[str]:
    if not turned:
        return []
    matrices = " and ".join(f"{size} x {size}" for size in _sizes(turned))
    later = tuple(f"{part}.weight" for parts in FUSED for part in parts[1:])  # which share the input of the first
    products = sum(len(form.signs) * form.shape[1] for name, form in turned.items() if not name.endswith(later))
    share = products / sum(form.shape[0] * form.shape[1] for form in turned.values())
    return [
        f"export={WORD}: the inputs of turned layers are multiplied at run time by matrices of {matrices} in the "
        f"model's dtype: {100 * share:.2g} % more multiplications. vLLM does so on one device (no tensor parallelism); "
        "transformers does not, and computes wrong outputs without an error"
    ]


def _kernel_notes(schemes: Mapping[Scheme, list[str]]) -> list[str]:
    notes = []
    if any(scheme.bits not in (4, 8) for scheme in schemes):
        notes.append("vLLM runs other widths than 4 and 8 bits by its Humming kernels only, on CUDA")
    if any(scheme.bits == 8 and not scheme.symmetric for scheme in schemes):
        notes.append("vLLM runs 8 bits asymmetric on Hopper (Machete) or by its Humming kernels; symmetric runs on all")
    odd = sorted({scheme.group_size for scheme in schemes if scheme.group_size} - set(MARLIN_GROUPS))
    if odd:
        notes.append(f"vLLM's Marlin kernels take groups of 32, 64 or 128, and not of {odd[0]}")
    return [f"export={WORD}: {note}" for note in notes]


def _mixed_notes(schemes: Mapping[Scheme, list[str]]) -> list[str]:
    if len(schemes) == 1 or all(scheme.symmetric for scheme in schemes):
        return []
    return [f"export={WORD}: layers on several grids, some asymmetric: transformers reads them wrongly, vLLM only"]


def _fused_notes(model: QuantizedModel, schemes: Mapping[Scheme, list[str]]) -> list[str]:
    """vLLM joins q, k and v, and gate and up; it refuses a model where one of them is stored in another way."""
    sizes = {name: len(form.signs) for name, form in _turned(model).items()}
    scheme_of = {name: (scheme, sizes.get(name)) for scheme, names in schemes.items() for name in names}
    for parts in FUSED:
        for name in model.linear:
            if name.endswith(f"{parts[0]}.weight"):
                siblings = [name.replace(parts[0], part) for part in parts]
                found = {scheme_of.get(sibling) for sibling in siblings if sibling in model.linear}
                if len(found) > 1:
                    joined = ", ".join(parts)
                    return [f"export={WORD}: {joined} of one block are not all on one grid, which vLLM refuses"]
    return []
