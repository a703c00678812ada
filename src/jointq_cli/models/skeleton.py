"""A model's modules without its weights, and whether the stored tensors fit them.

Everything that asks transformers how an architecture is built and stored is here; nothing here runs a model.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedModel,
)

from jointq_cli.errors import ModelError
from jointq_cli.models import online_rotation as online
from jointq_cli.models.checkpoint import Checkpoint, require_finite
from jointq_cli.models.stored_parts import Location, stored_tensors
from jointq_cli.models.tensor_source import TensorSource

_LARGE_LIST = 0.1  # of the parameters of the blocks: a list outside of them with more is a part of the model's depth
PLAIN_DTYPES = ("F64", "F32", "BF16", "F16")  # safetensors' names; 8 bits would be rounded again when written
# What transformers raises for a config or remote code that it cannot build.
BUILD_ERRORS = (ValueError, KeyError, TypeError, AttributeError, ImportError, OSError, RuntimeError)


def build_skeleton(source: TensorSource, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The source's model in eval mode: parameters on the meta device, buffers real, on the CPU.

    It is an AutoModelForCausalLM, or a wrapper that takes images or sound as well. Raises ModelError when transformers
    cannot build it.
    """
    try:
        config = _config(source, trust_remote_code)
        _require_decoder(config, source)
        _request_plain_outputs(config)
        with init_empty_weights(include_buffers=False):
            module: Any = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        _compute_buffers(module)
    except BUILD_ERRORS as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{source.directory}: transformers cannot build this model: {reason[:300]}") from error
    return module.eval().requires_grad_(False)


def auto_class(config: Any) -> Any:
    """The AutoModel with the class that config.json names. That for multimodal models has all the classes of
    AutoModelForImageTextToText; where no class is named, it takes what is no causal language model."""
    if type(config) not in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return AutoModelForCausalLM
    multimodal: Any = MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)]
    is_named = multimodal.__name__ in (config.architectures or ())
    is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not is_named
    return AutoModelForCausalLM if is_causal else AutoModelForMultimodalLM


def find_blocks(module: Any) -> tuple[str, nn.ModuleList]:
    """Name and ModuleList of the decoder blocks: in the language model, the list with the most parameters.

    Raises ModelError without any, and where text passes through another list of layers as well.
    """
    lists = _lists(module)
    if not lists:
        where = "outside of the models that it consists of; it cannot be run block by block"
        raise ModelError(f"{type(module).__name__} has no ModuleList of blocks {where}")
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in lists.items()}
    largest = max(sizes, key=sizes.__getitem__)
    for name, size in sizes.items():
        is_apart = not f"{name}.".startswith(f"{largest}.") and not f"{largest}.".startswith(f"{name}.")
        if is_apart and size > _LARGE_LIST * sizes[largest]:
            raise ModelError(
                f"{type(module).__name__} has layers in {largest} and in {name}, not in one list of blocks; it cannot "
                "be run block by block"
            )
    return largest, lists[largest]


def _lists(module: Any) -> dict[str, nn.ModuleList]:
    """The lists of modules that text may pass through: those of the language model, without the parts that have a
    config of their own, such as an image encoder."""
    prefix = find_language_model(module)
    own = (module.config, module.config.get_text_config())
    parts = dict(module.get_submodule(prefix).named_modules(prefix=prefix))
    others = tuple(
        f"{name}." for name, part in parts.items() if isinstance(part, PreTrainedModel) and part.config not in own
    )
    return {
        name: part
        for name, part in parts.items()
        if isinstance(part, nn.ModuleList) and len(part) and not name.startswith(others)
    }


def find_language_model(module: Any) -> str:
    """Name of the language model inside a wrapper that takes images or sound as well; "" for a model of text alone."""
    if type(module.config) not in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return ""
    names: dict[nn.Module, str] = {part: name for name, part in module.named_modules()}
    return names[module.get_decoder()]


def text_state(module: Any) -> dict[str, Tensor]:
    """Parameters and persistent buffers that text passes through, by name: those of the language model and the head,
    not those of a vision tower or a projector."""
    if not find_language_model(module):
        return dict(named_state(module))
    used = (module.get_decoder(), module.get_input_embeddings(), module.get_output_embeddings())
    prefixes = tuple(f"{name}." for name, part in module.named_modules() if any(part is one for one in used))
    return {name: tensor for name, tensor in named_state(module) if name.startswith(prefixes)}


def tied_names(module: Any) -> list[str]:
    """Parameters that the config ties to another one, so that a checkpoint need not hold them."""
    return list(getattr(module, "all_tied_weights_keys", None) or ())


def check_tensors(module: nn.Module, source: TensorSource, locations: Mapping[str, Location]) -> None:
    """Raises ModelError for a tensor of `text_state` that the source lacks or has in another shape. locations: of
    the source's parameters, by name in the module."""
    tied = set(tied_names(module))
    state = text_state(module)
    missing = [name for name in state if name not in locations and name not in tied]
    if missing:
        raise ModelError(
            f"{source.directory}: lacks {len(missing)} of the {len(state)} tensors of "
            f"{type(module).__name__}, {missing[0]} first"
        )
    for name in [name for name in state if name in locations]:
        shape, asked = locations[name].shape, tuple(state[name].shape)
        if shape != asked:
            shapes = f"has shape {list(shape)}, but config.json asks for {list(asked)}"
            raise ModelError(f"{source.directory}: tensor {name} {shapes}")


def check_dtypes(checkpoint: Checkpoint, used: Iterable[str]) -> None:
    """Raises ModelError for a stored tensor with a parameter that is not a plain floating-point tensor."""
    for name in used:
        info = checkpoint.tensors[name]
        if info.dtype not in PLAIN_DTYPES:
            raise ModelError(
                f"{info.file}: tensor {name} has dtype {info.dtype}, which cannot be quantised; "
                "convert the checkpoint to bfloat16 or float32 first"
            )


def check_finite(checkpoint: Checkpoint, trust_remote_code: bool) -> None:
    """Reads every tensor that the model uses. Raises NumericsError for the first with NaN or Inf.

    Others may hold anything: GPT-NeoX checkpoints have a `masked_bias` of -1e9, which is -inf in float16.
    """
    module = build_skeleton(checkpoint, checkpoint.dtype, trust_remote_code)
    stored = stored_tensors(module, checkpoint, text_state(module))
    parameters, used = dict(module.named_parameters()), dict(named_state(module))
    check_dtypes(checkpoint, [each for each, name in stored.names.items() if name in parameters])
    for each, name in stored.names.items():
        if name in used:
            require_finite(each, checkpoint.read([each])[each], checkpoint.tensors[each].file)


def named_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name."""
    yield from module.state_dict(keep_vars=True).items()


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Moves the buffers of all submodules; the parameters stay on the meta device."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))


def unload(module: nn.Module, keep: list[nn.Module] | None = None) -> None:
    """Puts all parameters back on the meta device, except those of the modules `keep`."""
    kept = {id(part) for block in keep or () for part in block.modules()}
    for part in module.modules():
        if id(part) not in kept:
            for name, parameter in part.named_parameters(recurse=False):
                setattr(part, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


def _compute_buffers(module: Any) -> None:
    """Computes the buffers again as `from_pretrained` does, outside of the model's dtype: arithmetic in bfloat16 would
    leave GPT-J's rotary table wrong by 2 %. Parameters on the meta device are not touched."""
    for part in module.modules():
        part.__dict__.pop("_is_hf_initialized", None)
    module.initialize_weights()


def _request_plain_outputs(config: Any) -> None:
    """Lets the forward pass return an object with logits and no more, whatever the config says: router logits would
    need outputs of experts that only run inside the blocks."""
    for part in (config, config.get_text_config()):
        part.return_dict = True
        if hasattr(part, "output_router_logits"):
            part.output_router_logits = False


def _config(source: TensorSource, trust_remote_code: bool) -> Any:
    if online.needs_online(source.config):
        return AutoConfig.for_model(**online.without_online(source.config))
    return AutoConfig.from_pretrained(source.directory, trust_remote_code=trust_remote_code)


def _require_decoder(config: Any, source: TensorSource) -> None:
    """Raises ModelError for a model that is no decoder-only language model, nor a wrapper of one."""
    known = any(type(config) in mapping for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING))
    if not known and AutoModelForCausalLM.__name__ not in (getattr(config, "auto_map", None) or {}):
        raise ModelError(
            f"{source.directory}: transformers has no causal language model for model_type {config.model_type}"
        )
    if any(part.is_encoder_decoder for part in (config, config.get_text_config())):
        raise ModelError(
            f"{source.directory}: {config.model_type} has an encoder and a decoder; only decoders can be quantised"
        )
