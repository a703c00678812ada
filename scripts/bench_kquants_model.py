#!/usr/bin/env python
"""GGUF files of finished runs against those of llama.cpp's quantiser with an importance matrix: same types, same bytes.

    jointq quantize name=q4_k quantizer.grid=q4_k export=gguf hydra.run.dir=runs/q4_k
    jointq quantize name=q2_k quantizer.grid=q2_k export=gguf hydra.run.dir=runs/q2_k
    python scripts/bench_kquants_model.py runs/q4_k runs/q2_k

For each run its GGUF file is copied, and the weight of every quantised tensor replaced by the original's, as the
quantiser of llama.cpp rounds it to the type that the tensor has: that is what llama-quantize computes, and the mix of
types, what falls back and the size are the run's. The importance matrix is what llama-imatrix computes of the run's
calibration tokens: the mean squares of inputs in the original model, all tokens equal (--weighting: weighted as jointq
does). All files are scored in llama.cpp over the run's evaluation windows, against the original in a file of F16.

Runs are of one model, without rotation (of a rotated model, rotate first and quantise the result). Needs xllamacpp.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from bench_kquants import hessians
from ggml_quantizer import quantized_bytes
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.constants import GGUFValueType
from rich.console import Console
from rich.table import Table
from torch import Tensor

from jointq_cli.data.calibration import Calibration
from jointq_cli.data.tokenizer import load_tokenizer
from jointq_cli.evaluation.engine_model import EngineModel
from jointq_cli.evaluation.llama_cpp import LlamaCppModel
from jointq_cli.evaluation.perplexity import Predictions, Scores, compare, perplexity, score
from jointq_cli.evaluation.windows import Evaluation, ScoredWindows
from jointq_cli.formats.export.gguf import Description
from jointq_cli.models.sources import ModelSource, fetch
from jointq_cli.models.streamed import StreamedModel
from jointq_cli.stages.base import open_model
from jointq_cli.stages.tokens import evaluation_windows
from jointq_cli.system.settings import Runtime

PLAIN = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
ORIGINAL = "original, F16"
Rounded = Callable[[str, Tensor, GGMLQuantizationType], np.ndarray[Any, Any]]  # name, (rows, columns), type -> bytes


@dataclass(frozen=True)
class Run:
    """A finished run: its GGUF file, what it was calibrated and evaluated on, and the seconds that its layers took."""

    name: str
    file: Path
    model: str
    calibration: Calibration
    evaluation: Evaluation
    seconds: float


def read_run(directory: Path) -> Run:
    recipe = yaml.safe_load((directory / "recipe.yaml").read_text(encoding="utf-8"))
    report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    files = sorted((directory / "export").glob("gguf*/*.gguf"))
    if len(files) != 1:
        raise SystemExit(f"{directory}: has {len(files)} GGUF files; jointq export {directory} format=gguf writes one")
    if report["rotation"]:
        raise SystemExit(f"{directory}: is rotated, so that its tensors are not those of {recipe['model']['path']}")
    calibration, evaluation = Calibration(**recipe["calibration"]), Evaluation(**recipe["evaluation"])
    seconds = sum(layer["seconds"] for layer in report["layers"])
    return Run(directory.name, files[0], recipe["model"]["path"], calibration, evaluation, seconds)


class Original:
    """The weights of the model by their names in a GGUF file, rows in the order of llama.cpp."""

    def __init__(self, model: StreamedModel) -> None:
        self.model = model
        self.described = Description(model.checkpoint)
        self.stored = {
            self.described.name(name): name
            for name in model.checkpoint.tensors
            if not name.endswith("rotary_emb.inv_freq")
        }

    def weight(self, name: str) -> Tensor:
        """(rows, columns) in the checkpoint's dtype."""
        stored = self.stored[name]
        found = self.model.checkpoint.read([stored])[stored]
        order = self.described.row_order(stored, len(found))
        return found if order is None else found[order]

    def importance(self, quantized: set[str], calibration: Calibration) -> dict[str, Tensor]:
        """(columns,) by name, of those of these tensors that are in blocks."""
        inside = [layer for layer in self.model.linear_layers() if self.model.block_of(layer) is not None]
        names = {layer: self.described.name(self.model.stored_name(f"{layer}.weight")) for layer in inside}
        found = hessians(self.model, [layer for layer, name in names.items() if name in quantized], calibration)
        return {names[layer]: hessian.diagonal() for layers, hessian in found.items() for layer in layers}


def quantized_tensors(file: Path) -> list[str]:
    return [tensor.name for tensor in GGUFReader(file).tensors if tensor.tensor_type not in PLAIN]


def replace_weights(source: Path, target: Path, original: Original, rounded: Rounded) -> None:
    """A copy in which every quantised tensor is the original's, rounded to the same type."""
    shutil.copyfile(source, target)
    for tensor in GGUFReader(target, "r+").tensors:
        if tensor.tensor_type not in PLAIN:
            tensor.data[:] = rounded(tensor.name, original.weight(tensor.name), tensor.tensor_type)


def write_f16(source: Path, target: Path, original: Original) -> None:
    """A copy in which every quantised tensor is the original's, as F16."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        if tensor.tensor_type in PLAIN:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        else:
            writer.add_tensor(tensor.name, original.weight(tensor.name).to(torch.float16).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def kinds(file: Path) -> str:
    """Such as "24 Q4_K, 4 Q6_K", of the matrices in blocks."""
    found = [tensor.tensor_type.name for tensor in GGUFReader(file).tensors if tensor.name.startswith("blk.")]
    names = dict.fromkeys(sorted(name for name in found if name != "F32"))
    return ", ".join(f"{found.count(name)} {name}" for name in names)


class Computed(Predictions):
    """Log-probabilities (tokens, vocabulary) of one window."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @property
    def vocabulary(self) -> int:
        return self.values.shape[1]

    def log_probabilities(self, window: int, positions: Tensor) -> Tensor:
        return self.values[positions]


def scores(files: dict[str, Path], windows: ScoredWindows) -> dict[str, Scores]:
    """Of each file against the first. All are open at once, so that each computes a window once."""
    models: dict[str, EngineModel] = {name: LlamaCppModel(file) for name, file in files.items()}
    parts: dict[str, list[Scores]] = {name: [] for name in files}
    for number, ids in enumerate(windows.ids):
        window, reference = windows.part(slice(number, number + 1)), None
        for name, model in models.items():
            found = Computed(model.log_probabilities(ids))
            reference = reference or found
            parts[name].append(score(reference, found, window))
    for model in models.values():
        model.close()
    return {name: Scores.joined(found) for name, found in parts.items()}


def table_of(files: dict[str, Path], found: dict[str, Scores], seconds: dict[str, float]) -> Table:
    table = Table("file", "tensors in blocks")
    for column in ("bytes", "perplexity", "KL", "+-", "x imatrix", "s"):
        table.add_column(column, justify="right")
    divergence = {name: compare(value).kl_divergence for name, value in found.items()}
    for name, value in found.items():
        run = name.partition(":")[0]
        compared, against = compare(value), divergence.get(f"{run}: llama.cpp + imatrix")
        table.add_row(
            name,
            kinds(files[name]),
            f"{files[name].stat().st_size:,}",
            f"{perplexity(value.quantized_nll, value.tokens).value:.3f}",
            "" if name == ORIGINAL else f"{compared.kl_divergence:.3e}",
            "" if name == ORIGINAL else f"{compared.kl_divergence_standard_error:.0e}",
            f"{compared.kl_divergence / against:.3f}" if against else "",
            f"{seconds[name]:.1f}" if name in seconds else "",
            end_section=name == ORIGINAL or name.endswith("llama.cpp"),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--weighting", default="uniform", choices=("uniform", "input", "residual"), help="of tokens")
    parser.add_argument("--windows", type=int, help="of evaluation; default: the first run's")
    parser.add_argument("--threads", type=int, default=1, help="more wait for each other on a busy machine")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    runs = [read_run(directory) for directory in arguments.runs]
    if len({run.model for run in runs}) > 1:
        raise SystemExit(f"these are runs of several models: {', '.join(sorted({run.model for run in runs}))}")
    checkpoint = fetch(ModelSource(runs[0].model), lambda place: place)
    original = Original(open_model(checkpoint, Runtime(), torch.device("cpu"), trust_remote_code=False))
    evaluation = replace(runs[0].evaluation, max_windows=arguments.windows or runs[0].evaluation.max_windows)
    windows = evaluation_windows(evaluation, load_tokenizer(checkpoint.directory, trust_remote_code=False))
    console = Console(width=140)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        files, seconds = {ORIGINAL: folder / "f16.gguf"}, {}
        write_f16(runs[0].file, files[ORIGINAL], original)
        quantized = {name for run in runs for name in quantized_tensors(run.file)}
        known: dict[Calibration, dict[str, Tensor]] = {}
        for number, run in enumerate(runs):
            calibration = replace(run.calibration, token_weighting=arguments.weighting, inputs="original")
            importance = known.get(calibration) or original.importance(quantized, calibration)
            known[calibration] = importance
            files[f"{run.name}: jointq"], seconds[f"{run.name}: jointq"] = run.file, run.seconds
            for word, matrix in (("llama.cpp + imatrix", importance), ("llama.cpp", {})):
                name = f"{run.name}: {word}"
                files[name] = folder / f"{number}-{bool(matrix)}.gguf"
                started = time.perf_counter()
                replace_weights(
                    run.file,
                    files[name],
                    original,
                    lambda tensor, weight, kind, matrix=matrix: quantized_bytes(weight, kind, matrix.get(tensor)),
                )
                seconds[name] = time.perf_counter() - started
        console.print(table_of(files, scores(files, windows), seconds))
        console.print(f"{len(windows.ids)} windows of {windows.ids.shape[1]} tokens; s: of quantising, on the clock")


if __name__ == "__main__":
    main()
