"""A GGUF file as a Hugging Face directory: transformers dequantises its tensors, and here it is checked that none is
lost and that rotary embeddings keep their scaling, which transformers does not read."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from torch import Tensor

from jointq_cli.errors import ModelError

GGUF_DTYPE = torch.bfloat16  # GGUF's block formats carry no more than 8 bits a weight

_ROPE_FACTORS = "rope_freqs.weight"  # what each rotary frequency is divided by
_SCALING = {  # GGUF's key after "ARCHITECTURE.rope.scaling." -> transformers'
    "type": "rope_type",
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
_NEUTRAL = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0}  # values that change nothing
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # of all Llama 3.1, 3.2 and 3.3


def convert_gguf(file: Path, target: Path) -> None:
    """Dequantises a GGUF file into a Hugging Face directory in GGUF_DTYPE.

    Raises ModelError when it cannot be read, is one of several files, lacks tensors, or holds what the model class
    cannot represent.
    """
    from transformers.utils import logging  # transformers takes more than a second to import

    with _refusing_damage(file):
        reader = GGUFReader(file)
    count = _field(reader, "split.count", 1)
    if count > 1:
        number = _field(reader, "split.no", 0) + 1
        raise ModelError(
            f"{file}: is file {number} of {count} of a split GGUF; join them first: llama-gguf-split --merge"
        )
    logging.disable_progress_bar()  # transformers' bars would overwrite the caller's
    with _refusing_damage(file):
        tokenizer, model, found = _load(file)
    if missing := sorted(found["missing_keys"] | {name for name, *_ in found["mismatched_keys"]}):
        raise ModelError(f"{file}: lacks {len(missing)} tensors of {type(model).__name__}, {missing[0]} first")
    if lost := _lost_tensors(reader, model):
        raise ModelError(f"{file}: holds {lost[0]}, for which {type(model).__name__} has no place")
    scaling = _rope_scaling(reader, model.config, file)
    rope = model.config.rope_parameters if scaling else {}
    rope.get("full_attention", rope).update(scaling)  # Gemma 3 scales its global layers only
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


@contextmanager
def _refusing_damage(file: Path) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    # What a damaged file raises depends on where it is damaged: struct.error, KeyError, ValueError and more.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{file}: transformers cannot read this GGUF file: {reason}") from error


def _load(file: Path) -> tuple[Any, Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=GGUF_DTYPE,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    return tokenizer, *loaded


def _field(reader: GGUFReader, key: str, default: Any = None) -> Any:
    return reader.fields[key].contents() if key in reader.fields else default


def _lost_tensors(reader: GGUFReader, model: Any) -> list[str]:
    """The tensors of the file that transformers has not put into the model."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    architecture = _field(reader, "general.architecture")
    processor: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    known = set(get_gguf_hf_weights_map(model, processor(config=model.config.to_dict())))
    known |= {name.removesuffix(".weight") for name in known}
    names = (tensor.name for tensor in reader.tensors)
    # Processors put experts, all those of a block in one tensor, into parameters with other names.
    return [name for name in names if name not in known and "_exps." not in name and name != _ROPE_FACTORS]


def _rope_scaling(reader: GGUFReader, config: Any, file: Path) -> dict[str, Any]:
    """What the file says of its rotary embeddings, as transformers' `rope_parameters`; empty without any scaling."""
    rope = f"{_field(reader, 'general.architecture')}.rope."
    prefix, oldest = f"{rope}scaling.", f"{rope}scale_linear"
    stored = {key.removeprefix(prefix): _field(reader, key) for key in reader.fields if key.startswith(prefix)}
    stored.pop("finetuned", None)  # says where the scaling comes from
    if oldest in reader.fields:
        stored = {"type": "linear", "factor": _field(reader, oldest), **stored}
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == _ROPE_FACTORS), None)
    kind = stored.get("type", "none") if stored.get("factor") else "none"
    if kind == "none":
        return {} if factors is None else _llama3_scaling(torch.tensor(factors, dtype=torch.float64), config, file)
    unknown = [key for key, value in stored.items() if key not in _SCALING and _NEUTRAL.get(key) != value]
    if kind not in ("linear", "yarn") or unknown or factors is not None or not hasattr(config, "rope_parameters"):
        reason = f"rope.scaling.{unknown[0]}={stored[unknown[0]]}" if unknown else f"rope.scaling.type={kind}"
        raise ModelError(f"{file}: has {reason}, which cannot be carried over into config.json")
    return {_SCALING[key]: value for key, value in stored.items() if key in _SCALING}


def _llama3_scaling(factors: Tensor, config: Any, file: Path) -> dict[str, Any]:
    """The parameters of Llama 3.1's scaling that give these factors (head_dim / 2,) float64."""
    factor = float(factors.max())
    if factor == 1.0 == float(factors.min()):
        return {}
    theta = config.rope_parameters.get("rope_theta")
    for length in (2**power for power in range(9, 21)) if theta else ():
        scaling = {**_LLAMA3, "factor": factor, "original_max_position_embeddings": length}
        if torch.allclose(llama3_factors(scaling, theta, len(factors)), factors, rtol=1e-5):
            return scaling
    raise ModelError(f"{file}: holds {_ROPE_FACTORS}, which is not the scaling of a Llama 3 and cannot be carried over")


def llama3_factors(scaling: dict[str, Any], theta: float, count: int) -> Tensor:
    """As llama.cpp's convert_hf_to_gguf.py computes them, (count,) float64."""
    wavelengths = 2 * math.pi * theta ** (torch.arange(count, dtype=torch.float64) / count)
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    smooth = (scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    factors: Tensor = 1.0 / (1.0 / factor + (1.0 - 1.0 / factor) * smooth.clamp(0.0, 1.0))
    return factors
