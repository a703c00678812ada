"""The measurements of scripts/check_gpu, one process each.

    python gpu_steps.py STEP --device cuda --work DIR --output FILE.json

Seconds are wall seconds of the second of two runs, the first of which compiles kernels. `floor` is the time of the
matrix products and factorisations that a method needs, timed at the same shapes on the same device.
--small: shapes of a hundredth of the work, to rehearse on a CPU.
"""

import argparse
import json
import platform
import runpy
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # each step imports what it measures, so that one that cannot be imported leaves the others
    from jointq_cli.formats.uniform import Grid

GROUP = 128
LIBRARIES = ("torch", "triton", "transformers", "numpy", "numba", "hydra-core", "omegaconf", "greenlet", "gguf")
Row = dict[str, Any]


@dataclass(frozen=True)
class Place:
    device: torch.device
    small: bool
    work: Path

    def size(self, features: int) -> int:
        """Features of a layer, a sixteenth where it is small."""
        return features // 16 if self.small else features

    def finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, action: Callable[[], Any], runs: int = 1) -> float:
        """Wall seconds of one run, after one that does not count."""
        action()
        self.finish()
        started = time.perf_counter()
        for _ in range(runs):
            action()
        self.finish()
        return (time.perf_counter() - started) / runs

    def normal(self, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device, dtype=dtype)

    def peak_gb(self) -> float | None:
        """Of GPU memory since the last call."""
        if self.device.type != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated(self.device) / 1e9
        torch.cuda.reset_peak_memory_stats(self.device)
        return round(peak, 2)


def machine(place: Place) -> Row:
    """Software, processor, and the rates of products and copies."""
    found: Row = {"python": platform.python_version(), "cuda": torch.version.cuda, "versions": {}}
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):
            found["versions"][library] = version(library)
    if place.device.type == "cuda":
        properties = torch.cuda.get_device_properties(place.device)
        found |= {"gpu": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1)}
    size = place.size(8192)
    for name, dtype, tf32 in (
        ("float64", torch.float64, False),
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bfloat16", torch.bfloat16, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        one, other = place.normal(size, size, dtype=dtype), place.normal(size, size, seed=1, dtype=dtype)
        found[f"{name}_tflops"] = round(2 * size**3 / place.seconds(lambda a=one, b=other: a @ b, 3) / 1e12, 3)
    torch.backends.cuda.matmul.allow_tf32 = False
    values = place.normal(size, size)
    copied = torch.empty_like(values)
    found["copy_gb_per_s"] = round(2 * values.nbytes / place.seconds(lambda: copied.copy_(values), 3) / 1e9, 1)
    return found


def flips(place: Place) -> Row:
    """The device's flip search against the plain torch one, on the same device, dtype by dtype.

    Where two gains agree in almost all digits the two may step differently, so that not all rows are equal, but no row
    may end much higher, and the mean of the rises, relative to w R w, is about 0.
    """
    from jointq_cli import kernels
    from jointq_cli.formats.uniform import Grid

    rows = place.size(16384)
    found: Row = {"kernels": kernels.for_device(place.device).__name__, "rows": rows}
    for bits in (4, 3, 2):
        for dtype in (torch.float32, torch.float64):
            for zero in ("integer", "half") if bits == 2 else ("integer",):
                words = (f"W{bits}", str(dtype).removeprefix("torch."), *((zero,) if zero != "integer" else ()))
                found[" ".join(words)] = _compare_flips(place, Grid(bits, False, zero), dtype, rows)
    return found


def _compare_flips(place: Place, grid: "Grid", dtype: torch.dtype, rows: int) -> Row:
    from jointq_cli import kernels
    from jointq_cli.kernels.reference import ReferenceKernels
    from jointq_cli.quantization.quantizers.scale_fit import scale_rounding

    rounding = scale_rounding(torch.bfloat16)
    inputs = place.normal(4 * GROUP, GROUP, dtype=dtype) @ place.normal(GROUP, GROUP, seed=1, dtype=dtype)
    metric = inputs.T @ inputs / len(inputs)
    weights = place.normal(rows, GROUP, seed=2, dtype=dtype)
    correlation = weights @ metric
    low, high = grid.ends(weights)
    levels, scale = torch.empty_like(weights), torch.empty_like(low)
    widest, diagonal = grid.covering_scale(low, high), metric.diagonal().contiguous()
    ReferenceKernels.weighted_clip(weights, diagonal, low, widest, levels, scale, grid.box, 10)

    def search(implementation: type[kernels.Kernels]) -> tuple[Tensor, Tensor, Tensor]:
        z, s = levels.clone(), scale.clone()
        steps, _ = implementation.flip_search(correlation, metric, z @ metric, z, s, grid.box, rounding, guarded=True)
        return z, s, steps

    own = kernels.for_device(place.device)
    (z, s, steps), (plain_z, plain_s, _) = search(own), search(ReferenceKernels)
    rise = _objective(correlation, metric, z, s) - _objective(correlation, metric, plain_z, plain_s)
    relative = rise / (weights.double() * correlation.double()).sum(1)
    return {
        "seconds": round(place.seconds(lambda: search(own)), 4),
        "torch_seconds": round(place.seconds(lambda: search(ReferenceKernels)), 4),
        "steps_per_row": round(float(steps.double().mean()), 2),
        "equal_rows": round(float(((z == plain_z).all(1) & (s == plain_s)).double().mean()), 5),
        "mean_rise": float(relative.mean()),
        "worst_rise": float(relative.max()),
    }


def _objective(correlation: Tensor, metric: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    """f (rows,) = s^2 z R z - 2 s h z, of which w R w is the rest of the squared error."""
    values = levels.double() * scale.double()[:, None]
    return ((values @ metric.double() - 2 * correlation.double()) * values).sum(1)


def _hessian(place: Place, columns: int) -> Tensor:
    """Of 4 tokens a column with a power-law spectrum, (columns, columns) float64."""
    inputs = place.normal(2 * columns, columns) * torch.arange(1, columns + 1, device=place.device) ** -0.5
    inputs = inputs @ place.normal(columns, columns, seed=1) / columns**0.5 + 0.1 * place.normal(2 * columns, columns)
    return (inputs.T @ inputs).double() / len(inputs)


def _products(place: Place, rows: int, columns: int) -> float:
    """Seconds of one pass of W H in float32, group after group, as a sweep of JointQ makes them."""
    weight, matrix = place.normal(rows, columns), place.normal(columns, columns)

    def one_pass() -> None:
        for start in range(0, columns, GROUP):
            weight @ matrix[:, start : start + GROUP]

    return place.seconds(one_pass)


def _factorisation(place: Place, columns: int) -> float:
    """Seconds of a Cholesky factor and its inverse in float64."""
    matrix = torch.eye(columns, dtype=torch.float64, device=place.device) * 2 + 0.5
    identity = torch.eye(columns, dtype=torch.float64, device=place.device)
    return place.seconds(lambda: torch.linalg.solve_triangular(torch.linalg.cholesky(matrix), identity, upper=False))


def solve(place: Place, method: str, rows: int, columns: int) -> Row:
    """A layer of (rows, columns) at 4 bits: seconds of what its inputs need, of itself, and of the floor; its error."""
    from jointq_cli.quantization.quantizers import GPTQ, JointQ
    from jointq_cli.quantization.quantizers.statistics import Energies

    rows, columns = place.size(rows), place.size(columns)
    quantizer = {"jointq": JointQ(bits=4, group_size=GROUP), "gptq": GPTQ(bits=4, group_size=GROUP)}[method]
    weight, hessian = place.normal(rows, columns, seed=5) / columns**0.5, _hessian(place, columns)
    place.peak_gb()
    prepare = place.seconds(lambda: quantizer.prepare(hessian))
    prepared = quantizer.prepare(hessian)
    took = place.seconds(lambda: quantizer.quantize(weight, prepared, torch.bfloat16))
    memory = place.peak_gb()
    solution = quantizer.quantize(weight, prepared, torch.bfloat16)
    energies = Energies.of(weight, solution.quantized.dequantize(torch.float32), hessian)
    # JointQ: the start has half a pass, each sweep one, its cost and tr(W H W^T) one each. GPTQ: half a pass.
    passes = 2.5 + quantizer.max_sweeps if isinstance(quantizer, JointQ) else 0.5
    one, factor = _products(place, rows, columns), _factorisation(place, columns)
    return {
        "rows": rows, "columns": columns, "verdict": solution.verdict,
        "prepare_seconds": round(prepare, 4), "quantize_seconds": round(took, 4),
        "factorisation_seconds": round(factor, 4), "products_seconds": round(passes * one, 4),
        "times_floor": round((prepare + took) / (factor + passes * one), 2),
        "error": energies.output_error / energies.output, "peak_gb": memory,
    }  # fmt: skip


def qep(place: Place, rows: int, columns: int) -> Row:
    """Statistics with cross term and drift from 16384 tokens, and the correction of a layer by QEP."""
    from jointq_cli.quantization.accumulator import Accumulator
    from jointq_cli.quantization.qep import Qep
    from jointq_cli.quantization.quantizers import JointQ
    from jointq_cli.quantization.quantizers.statistics import Statistics

    rows, columns, tokens = place.size(rows), place.size(columns), place.size(16384)
    batch = max(1, tokens // 4)
    inputs = place.normal(batch, columns).bfloat16()
    original = inputs + 0.05 * place.normal(batch, columns, seed=1).bfloat16()
    residual, weight = place.normal(batch, rows, seed=2), place.normal(rows, columns, seed=3) / columns**0.5

    def collect() -> Statistics:
        sums = Accumulator(columns, place.device, cross=True, drift=rows)
        for _ in range(4):
            sums.add(inputs, original, None, residual)
        return Statistics(sums.hessian(), sums.cross(), sums.drift())

    place.peak_gb()
    collecting = place.seconds(collect)
    statistics, settings = collect(), Qep()
    ridge = JointQ(bits=4, group_size=GROUP).ridge(statistics.hessian)
    correcting = place.seconds(lambda: settings.correction(statistics, ridge).apply(weight))
    wide = inputs.float()
    floor = place.seconds(lambda: wide.T @ wide) * 4 * (1.5 + rows / columns)  # H is symmetric: half a product
    return {
        "rows": rows, "columns": columns, "tokens": tokens,
        "statistics_seconds": round(collecting, 4), "products_seconds": round(floor, 4),
        "correction_seconds": round(correcting, 4), "factorisation_seconds": round(_factorisation(place, columns), 4),
        "peak_gb": place.peak_gb(),
    }  # fmt: skip


def _quantise(place: Place, *words: str) -> Row:
    """`jointq quantize` in this process, and what its report says."""
    from jointq_cli.cli.main import main

    words = (f"runtime.device={place.device}", "generate_tokens=0", f"output_dir={place.work}", *words)
    if place.small:
        words += ("calibration.num_samples=4", "evaluation.max_windows=2")
    started = time.perf_counter()
    code = main(["quantize", "name=run", *words])
    (written,) = place.work.glob("run/*/report.json")
    report = json.loads(written.read_text())
    kept = ("quantizer", "reload_check", "bits_per_weight", "original", "quantized", "comparison", "warnings")
    stages = {stage["name"]: round(stage["seconds"], 2) for stage in report["stages"]}
    took = round(time.perf_counter() - started, 2)
    return {"code": code, "seconds": took, "peak_gb": place.peak_gb(), "stages": stages} | {k: report[k] for k in kept}


def recipe(place: Place) -> Row:
    """The default recipe on the bundled model."""
    return _quantise(place)


def block(place: Place) -> Row:
    """One block of the shape of Llama-3-8B's, random, calibrated on 64 x 512 tokens: minutes of a whole model are 32
    times the stage `quantize`'s."""
    model = place.work / "model"
    shape = {"layers": 1, "hidden": 4096, "intermediate": 14336, "heads": 32, "kv-heads": 8, "vocabulary": 4096}
    words = [f"--{name}={place.size(n) if name in ('hidden', 'intermediate') else n}" for name, n in shape.items()]
    sys.argv = ["make_random_model.py", str(model), *words]
    runpy.run_path(str(Path(__file__).with_name("make_random_model.py")), run_name="__main__")
    return _quantise(place, f"model.path={model}", "evaluation.max_windows=2")


STEPS: dict[str, Callable[[Place], Row]] = {
    "machine": machine,
    "flips": flips,
    "recipe": recipe,
    "jointq 4096 x 4096": lambda place: solve(place, "jointq", 4096, 4096),
    "gptq 4096 x 4096": lambda place: solve(place, "gptq", 4096, 4096),
    "qep 4096 x 4096": lambda place: qep(place, 4096, 4096),
    "block of 8B": block,
    "jointq 14336 x 4096": lambda place: solve(place, "jointq", 14336, 4096),
    "jointq 4096 x 14336": lambda place: solve(place, "jointq", 4096, 14336),
    "gptq 4096 x 14336": lambda place: solve(place, "gptq", 4096, 14336),
    "qep 4096 x 14336": lambda place: qep(place, 4096, 14336),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    found = STEPS[given.step](Place(torch.device(given.device), given.small, given.work))
    given.output.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
