"""llama.cpp's own quantiser of tensors, `ggml_quantize_chunk`, as the package xllamacpp has it. For the benchmarks.

It is what llama-quantize calls for each tensor: per block, the scales and codes of least sum of

    importance_j sqrt(sigma^2 + w_j^2) (w_j - q_j)^2,    importance = the diagonal of X^T X / tokens.
"""

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

PACKAGE = "xllamacpp"


@cache
def _library() -> Any:
    found = importlib.util.find_spec(PACKAGE)
    folders = (found.submodule_search_locations if found else None) or ()
    files = [file for folder in folders for file in sorted(Path(folder).glob(f"{PACKAGE}*.so"))]
    if not files:
        raise SystemExit(f"llama.cpp's quantiser is in the package {PACKAGE}: pip install -c constraints.txt {PACKAGE}")
    library = ctypes.CDLL(str(files[0]))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def kind_of(name: str) -> GGMLQuantizationType:
    """Of a name such as "q4_k"."""
    return GGMLQuantizationType[name.upper()]


def bits_per_weight(kind: GGMLQuantizationType) -> float:
    columns, size = GGML_QUANT_SIZES[kind]
    return 8 * size / columns


def quantized_bytes(weight: Tensor, kind: GGMLQuantizationType, importance: Tensor | None) -> np.ndarray[Any, Any]:
    """(out, bytes of a row) uint8. weight: (out, in) of any dtype; importance: (in,), None: all columns alike."""
    rows, columns = weight.shape
    block, size = GGML_QUANT_SIZES[kind]
    assert columns % block == 0, f"{columns} columns, blocks of {block}"
    source = weight.float().contiguous().numpy()
    target = np.empty((rows, columns // block * size), np.uint8)
    matters = None if importance is None else importance.float().contiguous().numpy()
    pointer = None if matters is None else matters.ctypes.data
    written = _library().ggml_quantize_chunk(
        int(kind), source.ctypes.data, target.ctypes.data, 0, rows, columns, pointer
    )
    assert written == target.nbytes, (written, target.nbytes)
    return target


def dequantized(blocks: np.ndarray[Any, Any], kind: GGMLQuantizationType) -> Tensor:
    """(out, in) float32, by the Python package gguf."""
    return torch.from_numpy(gguf.dequantize(blocks, kind))
