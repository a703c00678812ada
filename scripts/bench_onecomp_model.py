#!/usr/bin/env python
"""Quantise a whole model with OneComp, the reference, on a file of frozen tokens, to compare jointq with it.

    python bench_onecomp_model.py --model DIR --tokens FILE --bits 3 --group-size 64 --lambdas 0.1,0.2 --output DIR

FILE is written by `jointq calibrate`, so that both use the same windows. Each setting becomes a plain
checkpoint in the model's own dtype, OUTPUT/jointq-w3-g64-lambda0.1, for `jointq evaluate model.path=...`; a line
of JSON on stdout and in OUTPUT/results.jsonl reports time and memory. An existing checkpoint is not computed again,
so a run that was stopped can be started again. Several bits in one run share the calibration: --bits 3,2,4.

OneComp needs other packages than jointq, hence a virtual environment of its own, whose python runs this script:

    pip install torch numpy
    pip install --no-deps --ignore-requires-python onecomp==1.4.0
    pip install 'transformers>=5.5.0' accelerate datasets safetensors scipy primefac ortools

OneComp's Runner does the work with JointQ's own defaults: asymmetric, diagonal regularisation, started from clipping
and from GPTQ; lm_head is left alone, and every layer is calibrated on the inputs of the unquantised model. Replaced
are the calibration set, by FILE, and lm_eval, which OneComp imports but this script does not need, by an empty module.
The model computes in float32. Seconds are of solving, without calibration; the peak is the largest resident set of
the process during the solving, the float32 model and the statistics of all layers that are solved together included.
"""

import argparse
import importlib.machinery
import importlib.util
import json
import os
import resource
import shutil
import sys
import time
import types
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from torch import Tensor

RESULTS = "results.jsonl"
ALL_LAYERS = 1_000_000


def stub_lm_eval() -> None:
    """An empty lm_eval to import, where it is not installed."""
    if importlib.util.find_spec("lm_eval"):
        return
    for name in ("lm_eval", "lm_eval.evaluator", "lm_eval.models", "lm_eval.models.huggingface"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(sys.modules["lm_eval"])["evaluator"] = sys.modules["lm_eval.evaluator"]
    vars(sys.modules["lm_eval.models.huggingface"])["HFLM"] = object


stub_lm_eval()

from onecomp import CalibrationConfig, ModelConfig, Runner  # noqa: E402
from onecomp.quantizer.gptq import GPTQ  # noqa: E402
from onecomp.quantizer.jointq import JointQ  # noqa: E402
from onecomp.runner_methods import chunked_quantization  # noqa: E402


class Clock:
    """Wall and CPU seconds, summed over all passages through `with clock:`."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter() - self._started[0]
        self.cpu += time.process_time() - self._started[1]

    def seconds(self, name: str) -> dict[str, float]:
        return {f"{name}_wall_seconds": round(self.wall, 2), f"{name}_cpu_seconds": round(self.cpu, 2)}


class FrozenRunner(Runner):
    """OneComp's Runner, calibrated on given windows; writes each quantizer's checkpoint as soon as it is solved."""

    def __init__(self, windows: Tensor, output: Path, settings: dict[str, dict[str, Any]], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.windows = windows
        self.output = output
        self.settings = settings  # by quantizer name
        self.calibration = Clock()
        self.solving = {name: Clock() for name in settings}
        self.peaks = dict.fromkeys(settings, 0)

    def quantize_with_calibration_chunked(self) -> None:
        steps = {
            "prepare_calibration_dataset": self._prepare,
            "accumulate_xtx": self._accumulate,
            "quantize_group": self._solve,
        }
        with mock.patch.multiple(chunked_quantization, **steps):
            super().quantize_with_calibration_chunked()

    def _prepare(self, **_: Any) -> dict[str, Tensor]:
        return {"input_ids": self.windows, "attention_mask": torch.ones_like(self.windows)}

    def _accumulate(self, *positional: Any, **named: Any) -> Any:
        with self.calibration:
            return accumulate_xtx(*positional, **named)

    def _solve(self, quantizer: Any, group: Any, statistics: Mapping[str, Tensor], samples: int) -> None:
        reset_peak_memory()
        with self.solving[quantizer.name]:
            quantize_group(quantizer, group, statistics, samples)
        self.peaks[quantizer.name] = max(self.peaks[quantizer.name], peak_memory())
        if len(quantizer.results) == len(quantizer.module_to_name):
            self._write(quantizer)
            quantizer.results.clear()  # a model's worth of codes

    def _write(self, quantizer: Any) -> None:
        source, place = Path(self.model_config.path), self.output / quantizer.name
        layers = len(quantizer.results)
        model = ModelConfig(path=str(source), dtype="auto", device="cpu").load_model()
        self.update_model_weights(model, quantizer=quantizer)
        unfinished = place.with_name(place.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        model.save_pretrained(unfinished)
        for file in source.iterdir():
            if "token" in file.name or file.name in ("chat_template.jinja", "merges.txt", "vocab.json"):
                shutil.copyfile(file, unfinished / file.name)
        unfinished.rename(place)
        record = {
            "name": quantizer.name,
            "model": source.name,
            **self.settings[quantizer.name],
            "layers": layers,
            "dtype": str(model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            **self.solving[quantizer.name].seconds("solve"),
            **self.calibration.seconds("calibration"),
            "peak_memory_bytes": self.peaks[quantizer.name],
        }
        with (self.output / RESULTS).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)


accumulate_xtx = chunked_quantization.accumulate_xtx
quantize_group = chunked_quantization.quantize_group


def reset_peak_memory() -> None:
    """Reset the peak, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes, since the last reset; since the start where it cannot be reset."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def quantizers(arguments: argparse.Namespace) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Quantizer and settings of each checkpoint that does not exist yet, by name."""
    group = arguments.group_size
    made: dict[str, tuple[Any, dict[str, Any]]] = {}
    for bits in arguments.bits:
        for method in arguments.method:
            settings = {"method": method, "bits": bits, "group_size": group}
            name = f"{method}-w{bits}-g{group}"
            if method == "gptq":
                gptq = GPTQ(wbits=bits, groupsize=group, sym=False, bitpack_on_quantize=False)
                gptq.name = name  # which it would lengthen
                made[name] = gptq, settings
                continue
            for strength in arguments.lambdas:
                full = f"{name}-lambda{strength:g}"
                quantizer = JointQ(name=full, bits=bits, group_size=group, regularization_lambda=strength)
                made[full] = quantizer, {**settings, "lambda": strength}
    return {name: made[name] for name in made if not (arguments.output / name).exists()}


def numbers(kind: type) -> Any:
    """An argparse type: `0.1,0.2` as a list."""
    return lambda text: [kind(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder with a Hugging Face checkpoint")
    parser.add_argument("--tokens", type=Path, required=True, help="safetensors with `windows` (windows, tokens) int64")
    parser.add_argument("--bits", type=numbers(int), default=[4], help="one or several: 3,2,4")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--lambdas", type=numbers(float), default=[0.1], help="of jointq, in the order to be run")
    parser.add_argument("--method", nargs="+", choices=["jointq", "gptq"], default=["jointq"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch-size", type=int, default=4, help="windows at once in calibration")
    parser.add_argument("--layers-per-group", type=int, default=ALL_LAYERS, help="fewer: less memory, more passes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    wanted = quantizers(arguments)
    if not wanted:
        print(f"all of it is in {arguments.output}", file=sys.stderr)
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    with safe_open(arguments.tokens, "pt") as tokens:
        windows = tokens.get_tensor("windows")
    FrozenRunner(
        windows,
        arguments.output,
        {name: settings for name, (_, settings) in wanted.items()},
        model_config=ModelConfig(path=str(arguments.model), dtype="float32", device="cpu"),
        quantizers=[quantizer for quantizer, _ in wanted.values()],
        calibration_config=CalibrationConfig(
            batch_size=arguments.batch_size, num_layers_per_group=arguments.layers_per_group
        ),
    ).run()


if __name__ == "__main__":
    main()
