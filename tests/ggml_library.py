"""llama.cpp's own C functions for blocks, from the library inside the package xllamacpp, as a reference."""

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind


@cache
def library() -> ctypes.CDLL:
    """Skips the test where xllamacpp is not installed."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None or found.origin is None:
        pytest.skip("xllamacpp is not installed")
    [file] = Path(found.origin).parent.glob("*.so")
    loaded = ctypes.CDLL(str(file))
    loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
    return loaded


def decoded(blocks: np.ndarray, kind: Kind) -> np.ndarray:
    """blocks (rows, bytes of a row) uint8 -> (rows, columns) float32."""
    columns, size = GGML_QUANT_SIZES[kind]
    values = np.empty((len(blocks), blocks.shape[1] // size * columns), np.float32)
    function = getattr(library(), f"dequantize_row_{kind.name.lower().replace('_k', '_K')}")
    blocks = np.ascontiguousarray(blocks)
    function(_pointer(blocks), _pointer(values), ctypes.c_int64(values.size))
    return values


def quantized(values: np.ndarray, kind: Kind) -> np.ndarray:
    """values (rows, columns) float32 -> (rows, bytes of a row), as llama-quantize does without an importance matrix."""
    rows, columns = values.shape
    block, size = GGML_QUANT_SIZES[kind]
    blocks = np.empty((rows, columns // block * size), np.uint8)
    counts = [ctypes.c_int64(count) for count in (0, rows, columns)]
    values = np.ascontiguousarray(values, np.float32)
    library().ggml_quantize_chunk(ctypes.c_int(kind), _pointer(values), _pointer(blocks), *counts, None)
    return blocks


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
