"""The importance matrix of llama.cpp, with which its llama-quantize rounds: a GGUF file with, for each weight, the sums
of squares of its inputs (NAME.in_sum2) and the number of tokens (NAME.counts). Source: tools/imatrix of llama.cpp."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGUFWriter
from torch import Tensor

from jointq_cli.formats.export import gguf_architectures as architectures

FORMAT = "imatrix"
FILE = "imatrix.gguf"


def write_imatrix(
    file: Path, checkpoint: Path, mean_squares: Mapping[str, Tensor], text: str, windows: int, seqlen: int
) -> None:
    """checkpoint: the directory of the model. mean_squares: (in,) by the name of a weight in it. text: what was
    calibrated on.

    A weight whose inputs are all zero counts no token, and llama-quantize takes all its columns as equal. Raises
    ConfigError where llama.cpp does not know the architecture.
    """
    from transformers import AutoConfig  # takes more than a second to import

    config = AutoConfig.from_pretrained(checkpoint)
    architecture = architectures.architecture_of(config)
    names = {architectures.tensor_name(architecture, config, name): name for name in mean_squares}
    writer = GGUFWriter(file, MODEL_ARCH_NAMES[architecture.arch])
    writer.add_type(FORMAT)
    writer.add_array("imatrix.datasets", [text])
    writer.add_uint32("imatrix.chunk_count", windows)
    writer.add_uint32("imatrix.chunk_size", seqlen)
    for name in sorted(names):
        means = mean_squares[names[name]].double().numpy()
        tokens = windows * seqlen if means.any() else 0
        writer.add_tensor(f"{name}.in_sum2", (means * tokens).astype(np.float32)[None])
        writer.add_tensor(f"{name}.counts", np.full((1, 1), tokens, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
