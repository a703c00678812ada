#!/usr/bin/env python3
"""Tries exports of the bundled model in the runtimes that serve them, and prints how far each is from the checkpoint.

    scripts/check_runtimes.py [PART ...]    rows whose format, runtime or grid has one of these parts; default: all

A runtime that is not installed is skipped; docs/serving.md says how each is installed. A row passes with a KL
divergence below 5e-4 nats and a perplexity within 0.2 % of the dequantised checkpoint's in float32: bfloat16, in which
most runtimes compute, differs by 1.5e-4 nats. vLLM gives no KL divergence.
"""

import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jointq_cli.evaluation.engines import ENGINES
from jointq_cli.formats.export import exporter_of

MOST_KL, MOST_CHANGE = 5e-4, 0.002
WINDOWS = 8

RTN = "quantizer=rtn quantizer.group_size"
GPTQ = "quantizer=gptq quantizer.act_order=true quantizer.static_groups=false quantizer.group_size"
# (grid, as overrides of a recipe; exports of it, each with the runtime that it is tried in)
CASES = [
    (
        f"{RTN}=128 quantizer.bits=4",
        [
            ("compressed-tensors", "transformers"),
            ("compressed-tensors", "vllm"),
            ("gptq", "transformers"),
            ("mlx", "mlx"),
        ],
    ),
    (
        f"{RTN}=128 quantizer.bits=4 quantizer.symmetric=true",
        [("compressed-tensors", "vllm"), ("gptq:v1", "transformers"), ("gptq:v2", "transformers"), ("gptq:v1", "vllm")],
    ),
    (
        f"{RTN}=128 quantizer.bits=4 layers.exclude_layer_keywords=[down_proj]",
        [("gptq", "transformers"), ("mlx", "mlx")],
    ),
    (f"{GPTQ}=128 quantizer.bits=4", [("gptq", "transformers")]),
    (f"{RTN}=32 quantizer.bits=4 quantizer.symmetric=true", [("gguf:q4_0", "llama.cpp")]),
    (f"{RTN}=32 quantizer.bits=4", [("gguf:q4_1", "llama.cpp"), ("mlx", "mlx")]),
    (f"{RTN}=128 quantizer.bits=8 quantizer.symmetric=true", [("gptq", "transformers"), ("mlx", "mlx")]),
    (f"{RTN}=128 quantizer.bits=3", [("compressed-tensors", "transformers"), ("gptq", "transformers"), ("mlx", "mlx")]),
    (f"{RTN}=64 quantizer.bits=2", [("gptq", "transformers"), ("mlx", "mlx")]),
    (f"{RTN}=null quantizer.bits=4 quantizer.symmetric=true", [("gptq", "transformers"), ("mlx", "mlx")]),
]


@dataclass(frozen=True)
class Row:
    grid: str
    export: str
    runtime: str
    result: str
    passed: bool = True

    @property
    def cells(self) -> str:
        return f"{self.export:18} | {self.runtime:12} | {self.result:52} | {self.grid}"


def main(parts: list[str]) -> int:
    print(f"{'format':18} | {'runtime':12} | {'result':52} | grid", flush=True)
    passed = True
    with tempfile.TemporaryDirectory() as scratch:
        for grid, exports in CASES:
            wanted = [pair for pair in exports if not parts or any(part in f"{pair} {grid}" for part in parts)]
            for row in rows(grid, wanted, Path(scratch)):
                print(row.cells, flush=True)
                passed &= row.passed
    return 0 if passed else 1


def rows(grid: str, exports: list[tuple[str, str]], scratch: Path) -> Iterator[Row]:
    lacking = {pair: missing(*pair) for pair in exports}
    yield from (Row(grid, *pair, f"skipped: {module} is not installed") for pair, module in lacking.items() if module)
    installed = [pair for pair in exports if not lacking[pair]]
    if not installed:
        return
    run = Path(tempfile.mkdtemp(dir=scratch))
    words = ",".join(dict.fromkeys(word for word, _ in installed))
    error = jointq(
        f"quantize {grid} export=[{words}] check_exports=false evaluation.max_windows=1 calibration.num_samples=32",
        run,
        scratch,
    )
    for word, runtime in installed:
        yield error_row(grid, word, runtime, error) if error else measured(grid, word, runtime, run, scratch)


def missing(word: str, runtime: str) -> str | None:
    """A module that the runtime needs for this format and that is not installed."""
    exporter = exporter_of(word)
    needed = [ENGINES[runtime].module, *(exporter.engine_needs if runtime == exporter.engine else ())]
    return next((module for module in needed if importlib.util.find_spec(module) is None), None)


def measured(grid: str, word: str, runtime: str, run: Path, scratch: Path) -> Row:
    path, result = run / "export" / exporter_of(word).label, Path(tempfile.mkdtemp(dir=scratch))
    error = jointq(
        f"evaluate engine={runtime} model.path={path} reference={run / 'checkpoint'} "
        f"runtime.dtype=float32 evaluation.max_windows={WINDOWS}",
        result,
        scratch,
    )
    if error:
        return error_row(grid, word, runtime, error)
    found = json.loads((result / "evaluation.json").read_text())["comparison"]
    kl, change = float(found["kl_divergence"]), math.expm1(found["nll_increase"])
    kl_fails = not kl <= MOST_KL and runtime != "vllm"
    passed = not kl_fails and abs(change) <= MOST_CHANGE
    divergence = "no KL" if runtime == "vllm" else f"KL {kl:.1e}"
    return Row(
        grid, word, runtime, f"{divergence}, perplexity {100 * change:+.3f} %{'' if passed else ', FAILED'}", passed
    )


def error_row(grid: str, word: str, runtime: str, error: str) -> Row:
    return Row(grid, word, runtime, f"FAILED: {error}", passed=False)


def jointq(arguments: str, run: Path, store: Path) -> str:
    """The last line that a failing command prints; "" for one that succeeds."""
    places = [f"hydra.run.dir={run}", f"store={store / 'store'}"]
    command = [sys.executable, "-m", "jointq_cli", *arguments.split(), *places]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return (found.stderr.strip().splitlines() or ["no message"])[-1] if found.returncode else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
