"""llama.cpp's importance matrix: names, sums and counts, as the package gguf and llama.cpp's C functions read them."""

import ctypes
import importlib.util
from pathlib import Path

import gguf
import pytest
import torch
from tiny_models import write_checkpoint

from jointq_cli.errors import ConfigError
from jointq_cli.formats.export.imatrix import write_imatrix

Q, DOWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", "llama")
    found = tmp_path / "imatrix.gguf"
    write_imatrix(found, tmp_path / "model", {DOWN: torch.zeros(4), Q: torch.tensor([1.0, 2, 0.5])}, "a text", 3, 10)
    return found


def test_sums_over_counts_are_the_mean_squares(file: Path) -> None:
    reader = gguf.GGUFReader(file)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["a text"]
    assert reader.fields["imatrix.chunk_count"].contents() == 3
    assert reader.fields["imatrix.chunk_size"].contents() == 10
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    sums, counts = tensors["blk.0.attn_q.weight.in_sum2"], tensors["blk.0.attn_q.weight.counts"]
    assert (sums.tensor_type, counts.tensor_type) == (gguf.GGMLQuantizationType.F32,) * 2
    assert (list(sums.shape), list(counts.shape)) == ([3, 1], [1, 1])
    assert counts.data.item() == 30
    assert (sums.data / counts.data).tolist() == [[1.0, 2, 0.5]]


def test_a_weight_that_no_token_reaches_counts_none(file: Path) -> None:
    """llama-quantize then takes all columns as equal; sums of 0 over a count would lose the weight."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert tensors["blk.1.ffn_down.weight.counts"].data.item() == 0


def test_llama_cpp_opens_it(file: Path) -> None:
    """With the functions that its loader of importance matrices calls; the loader itself is in no package."""
    package = importlib.util.find_spec("xllamacpp")
    if package is None:
        pytest.skip("xllamacpp is not installed")
    [folder] = package.submodule_search_locations or []
    library = ctypes.CDLL(str(next(Path(folder).glob("xllamacpp*.so"))))

    class Params(ctypes.Structure):
        _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]

    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_init_from_file.argtypes = [ctypes.c_char_p, Params]
    for name in ("gguf_find_key", "gguf_find_tensor"):
        function = getattr(library, name)
        function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_void_p, ctypes.c_char_p]
    library.gguf_get_n_tensors.restype, library.gguf_get_n_tensors.argtypes = ctypes.c_int64, [ctypes.c_void_p]
    opened = library.gguf_init_from_file(str(file).encode(), Params(no_alloc=True, ctx=None))
    assert opened
    assert library.gguf_get_n_tensors(opened) == 4
    for key in (b"imatrix.datasets", b"imatrix.chunk_count", b"imatrix.chunk_size"):
        assert library.gguf_find_key(opened, key) >= 0
    for tensor in (b"blk.0.attn_q.weight.in_sum2", b"blk.1.ffn_down.weight.counts"):
        assert library.gguf_find_tensor(opened, tensor) >= 0


def test_an_architecture_that_llama_cpp_does_not_know_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", "gpt2")
    with pytest.raises(ConfigError, match="gpt2"):
        write_imatrix(tmp_path / "x.gguf", tmp_path / "model", {}, "a text", 1, 1)
