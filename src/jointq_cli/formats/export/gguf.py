"""GGUF, the file of llama.cpp and Ollama: codes and scales in its blocks of 32, config and tokenizer as its keys."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
from torch import Tensor

from jointq_cli.errors import ConfigError, ModelError
from jointq_cli.formats.export import gguf_architectures as architectures
from jointq_cli.formats.export.base import (
    Exporter,
    QuantizedModel,
    refuse_permutation,
    refuse_wide_scales,
    uniform_forms,
)
from jointq_cli.formats.export.gguf_blocks import (
    TOLERANCE,
    BlockWeight,
    bits_of,
    check_kind,
    encode_blocks,
    encode_plain,
    natural_kind,
)
from jointq_cli.formats.export.gguf_tokenizer import read_tokenizer
from jointq_cli.formats.k_quant import K_GRIDS, SUPER_BLOCK, KQuantWeight
from jointq_cli.formats.uniform import UniformWeight
from jointq_cli.models.checkpoint import Checkpoint
from jointq_cli.models.k_mixes import MIXES
from jointq_cli.setting_rules import check_settings, setting

TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
EMBEDDINGS = ("q8_0", "q6_k", "f16", "bf16")
EMBEDDING_NAMES = ("token_embd.weight", "output.weight")
BLOCK = 32  # columns
ROWS = 4096  # of a tensor that are decoded at a time
FILE_TYPES = {
    GGMLQuantizationType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    GGMLQuantizationType.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    GGMLQuantizationType.Q5_0: LlamaFileType.MOSTLY_Q5_0,
    GGMLQuantizationType.Q5_1: LlamaFileType.MOSTLY_Q5_1,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
K_FILE_TYPES = {  # by the smallest K-quant of a file; of these, the first that the file has
    GGMLQuantizationType.Q2_K: {
        GGMLQuantizationType.Q3_K: LlamaFileType.MOSTLY_Q2_K,
        GGMLQuantizationType.Q2_K: LlamaFileType.MOSTLY_Q2_K_S,
    },
    GGMLQuantizationType.Q3_K: {
        GGMLQuantizationType.Q4_K: LlamaFileType.MOSTLY_Q3_K_M,
        GGMLQuantizationType.Q5_K: LlamaFileType.MOSTLY_Q3_K_L,
        GGMLQuantizationType.Q3_K: LlamaFileType.MOSTLY_Q3_K_S,
    },
    GGMLQuantizationType.Q4_K: {
        GGMLQuantizationType.Q6_K: LlamaFileType.MOSTLY_Q4_K_M,
        GGMLQuantizationType.Q4_K: LlamaFileType.MOSTLY_Q4_K_S,
    },
    GGMLQuantizationType.Q5_K: {
        GGMLQuantizationType.Q6_K: LlamaFileType.MOSTLY_Q5_K_M,
        GGMLQuantizationType.Q5_K: LlamaFileType.MOSTLY_Q5_K_S,
    },
    GGMLQuantizationType.Q6_K: {GGMLQuantizationType.Q6_K: LlamaFileType.MOSTLY_Q6_K},
}


@dataclass(frozen=True)
class GgufExporter(Exporter):
    """type: of the quantised layers, null for the smallest that holds the grid of each. embeddings: type of embeddings
    and head, which are not quantised by jointq; null for Q6_K beside K-quants, else for Q8_0. Q6_K needs a multiple of
    256 columns and Q8_0 one of 32; without, they are Q8_0, and as in the checkpoint."""

    format: ClassVar[str] = "gguf"
    engine: ClassVar[str] = "llama.cpp"
    # llama.cpp rounds activations to 8 bits inside its products, whatever the weights: with the same weights in float32
    # it differs by 4e-7 (SmolLM2-135M), in blocks by 3.4e-3, and by 3.7e-4 of the bundled model.
    engine_kl: ClassVar[float] = 1e-2
    engine_change: ClassVar[float] = 0.01
    tolerance: ClassVar[float] = max(TOLERANCE.values())

    type: str | None = setting(None, choices=TYPES, null="for the smallest that holds the grid")
    embeddings: str | None = setting(None, choices=EMBEDDINGS, null="for q6_k beside K-quants, else q8_0")

    def __post_init__(self) -> None:
        if self.type in MIXES or self.type in K_GRIDS:
            way_out = f"layers.mix={self.type}" if self.type in MIXES else f"quantizer.grid={self.type}"
            raise ConfigError(f"type={self.type}: is for a model that was quantised so: {way_out} export=gguf")
        check_settings(self)

    @property
    def label(self) -> str:
        return "gguf" if self.type is None else f"gguf-{self.type}"

    def check(self, model: QuantizedModel) -> list[str]:
        forms = uniform_forms(model, self.format, beside=(KQuantWeight,))
        refuse_permutation(forms, self.format)
        refuse_wide_scales(forms, self.format)
        for name, form in _forms(model).items():
            if reason := check_kind(form, self._kind(form)):
                raise ConfigError(f"export={self.format}: {name}: {reason}")
        described = Description(model.checkpoint)
        for name in _written(model):
            described.name(name)
        return [*_repeated(forms.values()), *_window(described.config)]

    def write(self, model: QuantizedModel, directory: Path) -> None:
        described = Description(model.checkpoint)
        kinds = self._kinds(model, described)
        file = self.file_name(model)
        writer = GGUFWriter(directory / file, gguf.MODEL_ARCH_NAMES[described.architecture.arch])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(self.file_type(model))
        architectures.write_config(writer, described.architecture, described.config)
        described.vocabulary.write(writer, described.tokenizer)
        further = architectures.further_tensors(described.config)
        for name, tensor in further.items():
            writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.nbytes)
        for name, kind in kinds.items():
            *rows, columns = model.checkpoint.shapes[name]
            block, size = gguf.GGML_QUANT_SIZES[kind]
            shape = (*rows, columns // block * size)  # in bytes
            writer.add_tensor_info(described.name(name), shape, np.dtype(np.uint8), math.prod(shape), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in further.values():
            writer.write_tensor_data(tensor.numpy())
        for name, kind in kinds.items():
            writer.write_tensor_data(_encoded(model, described, name, kind))
        writer.close()
        (directory / "Modelfile").write_text(f"FROM ./{file}\n", encoding="utf-8")

    def reader(self, model: QuantizedModel, directory: Path) -> Callable[[str], Tensor]:
        described = Description(model.checkpoint)
        written = {tensor.name: tensor for tensor in GGUFReader(directory / self.file_name(model)).tensors}
        names = set(_written(model))

        def read(name: str) -> Tensor:
            if name not in names:
                return model.checkpoint.read([name])[name]
            found = written[described.name(name)]
            shape = model.checkpoint.shapes[name]
            values = torch.empty(shape)
            for first in range(0, len(values), ROWS):  # numpy's temporaries are several times as large
                part = gguf.dequantize(found.data[first : first + ROWS], found.tensor_type)
                values[first : first + ROWS] = torch.tensor(part).reshape(-1, *shape[1:])
            if offset := described.offset(name):
                values -= offset
            order = described.row_order(name, len(values))
            return values if order is None else torch.empty_like(values).index_copy_(0, order, values)

        return read

    def plain_tolerance(self, model: QuantizedModel, name: str) -> float:
        # Q8_0 has 127 steps for the largest value of a block; Q6_K has 32, and the search of its steps may clip it.
        matrix = len(model.checkpoint.shapes[name]) == 2
        return 0.05 if matrix and self._embeddings(model) == "q6_k" else 0.005

    def stored_bits(self, model: QuantizedModel) -> int:
        forms = _forms(model).values()
        return round(sum(bits_of(self._kind(form)) * form.shape[0] * form.shape[1] for form in forms))

    def types(self, model: QuantizedModel, directory: Path) -> dict[str, int]:
        tensors = GGUFReader(directory / self.file_name(model)).tensors
        return dict(Counter(tensor.tensor_type.name for tensor in tensors).most_common())

    def commands(self, model: QuantizedModel, name: str) -> list[tuple[str, str]]:
        return [
            ("llama.cpp", f"llama-server -m {name}/{self.file_name(model)}"),
            ("Ollama", f"ollama create NAME -f {name}/Modelfile && ollama run NAME"),
        ]

    def file_name(self, model: QuantizedModel) -> str:
        """A mix of K-quants has its name in that of the file, where hubs and Ollama look for it."""
        kind = self.type
        if kind is None and _has_k_quants(model):
            kind = self.file_type(model).name.removeprefix("MOSTLY_").lower()
        return "model.gguf" if kind is None else f"model-{kind}.gguf"

    def file_type(self, model: QuantizedModel) -> LlamaFileType:
        """Of a mix, as llama-quantize calls it: all others of its types are wider than the one it is named after."""
        kinds = [self._kind(form) for form in _forms(model).values()]
        base = min((kind for kind in kinds if kind in K_FILE_TYPES), default=None)
        if base is None:
            return FILE_TYPES[max(FILE_TYPES, key=kinds.count)]
        return next(named for beside, named in K_FILE_TYPES[base].items() if beside in kinds)

    def _kind(self, form: BlockWeight) -> GGMLQuantizationType:
        return natural_kind(form) if self.type is None else GGMLQuantizationType[self.type.upper()]

    def _kinds(self, model: QuantizedModel, described: "Description") -> dict[str, GGMLQuantizationType]:
        """Of every tensor of the checkpoint that is written."""
        quantized = {name: self._kind(form) for name, form in _forms(model).items()}
        embeddings = self._embeddings(model)
        return {
            name: quantized[name] if name in quantized else _plain_kind(model, described, name, embeddings)
            for name in _written(model)
        }

    def _embeddings(self, model: QuantizedModel) -> str:
        return self.embeddings or ("q6_k" if _has_k_quants(model) else "q8_0")


class Description:
    """What a GGUF file says of a checkpoint. Raises ConfigError where llama.cpp does not know the like."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        from transformers import AutoConfig, AutoTokenizer  # takes more than a second to import

        self.config = AutoConfig.from_pretrained(checkpoint.directory)
        self.architecture = architectures.architecture_of(self.config)
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint.directory)
        self.vocabulary = read_tokenizer(self.tokenizer, self.config.vocab_size)

    def name(self, name: str) -> str:
        return architectures.tensor_name(self.architecture, self.config, name)

    def offset(self, name: str) -> float:
        return architectures.offset_of(self.architecture, name)

    def row_order(self, name: str, rows: int) -> Tensor | None:
        return architectures.row_order(self.architecture, self.config, name, rows)


def _forms(model: QuantizedModel) -> dict[str, BlockWeight]:
    """Of all quantised weights. Raises ConfigError where one is neither uniform nor a K-quant."""
    uniform = uniform_forms(model, GgufExporter.format, beside=(KQuantWeight,))
    return {name: form for name, form in model.forms.items() if isinstance(form, KQuantWeight)} | uniform


def _has_k_quants(model: QuantizedModel) -> bool:
    return any(isinstance(form, KQuantWeight) for form in model.forms.values())


def _plain_kind(model: QuantizedModel, described: Description, name: str, embeddings: str) -> GGMLQuantizationType:
    """Of a tensor that is not quantised."""
    info = model.checkpoint.tensors[name]
    if len(info.shape) == 1:
        return GGMLQuantizationType.F32
    stored = GGMLQuantizationType[info.dtype]  # safetensors and GGUF call F32, F16 and BF16 alike
    if described.name(name) not in EMBEDDING_NAMES:
        return stored
    if embeddings == "q6_k" and info.shape[-1] % SUPER_BLOCK:
        embeddings = "q8_0"
    if embeddings == "q8_0" and info.shape[-1] % BLOCK:
        return stored
    return GGMLQuantizationType[embeddings.upper()]


def _written(model: QuantizedModel) -> list[str]:
    """The tensors of the checkpoint that the file holds; llama.cpp computes rotary tables by itself."""
    return [name for name in model.checkpoint.tensors if not name.endswith("rotary_emb.inv_freq")]


def _encoded(
    model: QuantizedModel, described: Description, name: str, kind: GGMLQuantizationType
) -> np.ndarray[Any, Any]:
    """The blocks of one tensor, uint8, rows in the order of llama.cpp. Raises ModelError, naming it."""
    order = described.row_order(name, model.checkpoint.shapes[name][0])
    try:
        if name in model.forms:
            weight = model.load(name)
            assert isinstance(weight, BlockWeight)
            return encode_blocks(weight if order is None else weight.take_rows(order), kind)
        tensor = model.checkpoint.read([name])[name]
        tensor = tensor if order is None else tensor[order]
        offset = described.offset(name)
        return encode_plain(tensor.float() + offset if offset else tensor, kind).view(np.uint8)
    except ModelError as error:
        raise ModelError(f"export=gguf: {name}: {error}") from error


def _repeated(forms: Iterable[UniformWeight]) -> list[str]:
    """Blocks have a scale for 32 columns: larger groups repeat theirs."""
    size = max((form.group_size for form in forms), default=BLOCK)
    if size == BLOCK:
        return []
    return [
        f"export=gguf: its blocks have a scale for {BLOCK} columns, so groups of {size} cost as much as "
        f"quantizer.group_size={BLOCK}, with which the model is better"
    ]


def _window(config: Any) -> list[str]:
    """Of these architectures llama.cpp ignores sliding windows; of Phi-3 even though the file has the key."""
    window = getattr(config, "sliding_window", None)
    if config.model_type not in ("mistral", "phi3") or not window or window >= config.max_position_embeddings:
        return []
    return [f"export=gguf: llama.cpp attends to all positions, the model to {window}: it differs in longer contexts"]
