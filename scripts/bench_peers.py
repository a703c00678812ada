#!/usr/bin/env python
"""jointq and other tools on the same frozen tokens, each in a process and a virtual environment of its own: one table.

    jointq calibrate recipe=smollm2_135m_w3g64 output=tokens.safetensors
    python scripts/bench_peers.py --model models/SmolLM2-135M-Instruct --tokens tokens.safetensors --group-size 64 \
        --bits 3,2,4 --text wiki.test.raw --windows 40 --work DIR
    python scripts/bench_peers.py ... --peers jointq,gptqmodel --also 'best: jointq quantizer.annealing_sweeps=20'

Every tool writes an ordinary checkpoint with the weights as they dequantise, in the dtype of the source. `jointq
evaluate` measures it against the source, and the levels of each group are counted in it: more than 2^bits of them and
the row is marked, because then it is not a model of that size which was measured. CPU seconds and the peak of the
resident memory are those of the whole process of the tool, loading and saving included.

DIR keeps the virtual environments, the log of each process, DIR/NAME/result.json and the table, DIR/table.md. What has
a result is not run again; asked for other tokens, text or arguments under its name, the script stops. A tool that
cannot be installed or run is in the table with the reason.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from jointq_cli.formats.layer_file import load_layer
from jointq_cli.formats.turned import TurnedWeight

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
BASE = ("torch==2.13.0", "transformers", "accelerate", "safetensors", "datasets")


@dataclass(frozen=True)
class Tool:
    """A peer's virtual environment: what pip is called with, one call after the other."""

    driver: str  # the script in peers/
    installs: tuple[tuple[str, ...], ...]
    loose: frozenset[str] = frozenset()  # packages whose versions constraints.txt must leave to the tool


TOOLS = {
    "autoround": Tool("autoround", (("torch==2.13.0", "auto-round==0.16.1"),)),
    "gptqmodel": Tool(
        "gptq_model",
        (
            (*BASE, "setuptools<82", "wheel", "packaging", "ninja", "pypcre", "logbar", "tokenicer", "device-smi"),
            ("--no-deps", "--no-build-isolation", "gptqmodel==7.7.0"),
            ("--no-deps", "defuser", "optimum", "torchao"),
            ("pillow", "protobuf", "requests", "sentencepiece", "threadpoolctl"),
        ),
    ),
    "llmcompressor": Tool(
        "llm_compressor",
        (("torch==2.13.0", "llmcompressor==0.14.0.1"),),
        frozenset({"transformers", "huggingface_hub", "tokenizers", "compressed-tensors"}),
    ),
    "onecomp": Tool(
        "one_comp",
        ((*BASE, "scipy", "primefac", "ortools"), ("--no-deps", "--ignore-requires-python", "onecomp==1.4.0")),
    ),
}


@dataclass(frozen=True)
class Method:
    """One row of the table: a tool with the arguments of its driver, or overrides of `jointq quantize`."""

    tool: str
    arguments: tuple[str, ...] = ()


METHODS = {
    "jointq": Method("jointq"),
    "jointq-gptq": Method("jointq", ("quantizer=gptq",)),
    "onecomp-gptq-qep": Method("onecomp", ("--method", "gptq-qep")),
    "onecomp-gptq-qep-mse": Method("onecomp", ("--method", "gptq-qep", "--mse")),
    "onecomp-jointq": Method("onecomp", ("--method", "jointq")),
    "gptqmodel": Method("gptqmodel"),
    "llmcompressor-gptq": Method("llmcompressor", ("--method", "gptq")),
    "llmcompressor-awq": Method("llmcompressor", ("--method", "awq")),
    "autoround-50x4": Method("autoround", ("--iterations", "50", "--batch-size", "4")),
    "autoround-200x8": Method("autoround", ("--iterations", "200", "--batch-size", "8")),
    "autoround-best": Method("autoround", ("--iterations", "1000", "--batch-size", "8")),
}

SLOW = ("onecomp-gptq-qep-mse", "autoround-200x8", "autoround-best")  # an hour and more on a CPU, on a real model
DEFAULT = [name for name in METHODS if name not in SLOW]
GROUPS = "group_index.safetensors"  # beside a checkpoint: the group of each column, by the name of the weight
CODES = "codes"  # beside a checkpoint of jointq: what each layer stores


class CannotRun(Exception):
    """Why a tool has no figures."""


def run_measured(
    command: Sequence[str], log: Path, timeout: float, environment: Mapping[str, str], directory: Path | None = None
) -> dict[str, Any]:
    """Runs a command; wall and CPU seconds and bytes of it and of the processes that it waited for.

    Raises CannotRun with the last line of its output where it fails or takes longer than `timeout` seconds.
    """
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env={**os.environ, **environment},
            cwd=directory,
            start_new_session=True,
        )
        done = 0
        while not done and time.monotonic() - started < timeout:
            time.sleep(0.1)
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
        if not done:
            os.killpg(process.pid, signal.SIGKILL)
            _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # which Popen would wait for
    if not done:
        raise CannotRun(f"not done after {timeout:g} s")
    if process.returncode:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise CannotRun((lines or [f"exit code {process.returncode}"])[-1][-200:])
    return {
        "wall_seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_memory": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }


def threads(given: argparse.Namespace) -> dict[str, str]:
    """The environment of a measured process; nothing is looked up on the hub."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    return dict.fromkeys(names, str(given.threads)) | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def python_of(tool: str, work: Path, timeout: float) -> str:
    """The interpreter of the tool's virtual environment, which is made where it is not complete yet.

    Raises CannotRun.
    """
    place = work / "venvs" / tool
    python = place / "bin" / "python"
    complete = place / "complete"
    if complete.exists():
        return str(python)
    print(f"installing {tool} into {place}", flush=True)
    venv.create(place, with_pip=True, clear=True)
    kept = [line for line in CONSTRAINTS.read_text().splitlines() if line.split("==")[0] not in TOOLS[tool].loose]
    constraints = place / "constraints.txt"
    constraints.write_text("\n".join(kept) + "\n")
    for number, packages in enumerate(TOOLS[tool].installs):
        pip = [str(python), "-m", "pip", "install", "-c", str(constraints), *packages]
        try:
            run_measured(pip, place / f"install-{number}.log", timeout, {"BUILD_CUDA_EXT": "0"})
        except CannotRun as error:
            raise CannotRun(f"cannot be installed: {error}") from error
    complete.touch()
    return str(python)


def quantise(method: Method, bits: int, place: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Runs the tool; PLACE/checkpoint afterwards. Raises CannotRun."""
    checkpoint = place / "checkpoint"
    shutil.rmtree(checkpoint, ignore_errors=True)
    if method.tool != "jointq":
        driver = ROOT / "scripts" / "peers" / f"{TOOLS[method.tool].driver}.py"
        command = [python_of(method.tool, given.work, given.timeout), str(driver), *method.arguments]
        command += ["--model", str(given.model), "--tokens", str(given.tokens), "--bits", str(bits)]
        command += ["--group-size", str(given.group_size), "--output", str(checkpoint)]
        return run_measured(command, place / "log.txt", given.timeout, threads(given), place)  # some write logs there
    runs = place / "runs"
    shutil.rmtree(runs, ignore_errors=True)  # and the store with it: every run pays for all of its stages
    command = [sys.executable, "-m", "jointq_cli", "quantize", f"model.path={given.model}", f"output_dir={runs}"]
    windows = len(load_file(given.tokens)["windows"])  # all of them, as the other tools take
    command += [f"calibration.tokens={given.tokens}", f"calibration.num_samples={windows}", "name=run"]
    command += [f"quantizer.group_size={given.group_size}"]
    command += [f"quantizer.bits={bits}", "evaluation.max_windows=1", "generate_tokens=0", *method.arguments]
    measured = run_measured(command, place / "log.txt", given.timeout, threads(given))
    (written,) = runs.glob("run/*/checkpoint")
    shutil.rmtree(place / CODES, ignore_errors=True)
    (written.parent / CODES).rename(place / CODES)
    written.rename(checkpoint)
    shutil.rmtree(runs)
    return measured


def most_levels(weight: Tensor, group_size: int) -> int:
    """The most distinct values in a group of `group_size` columns of one row of weight (out, in)."""
    groups = weight.reshape(-1, group_size if group_size > 0 else weight.shape[1]).sort(dim=1).values
    return int((groups[:, 1:] != groups[:, :-1]).sum(dim=1).max()) + 1


def count_levels(checkpoint: Path, group_size: int) -> list[int]:
    """The most levels in a group, of each weight matrix of the decoder blocks, as the checkpoint lies on the disk.

    GROUPS beside it says which columns belong together, where these are not neighbours. Of jointq they are counted in
    the basis in which its codes are, and the checkpoint must be what these give.
    """
    if (checkpoint.parent / CODES).is_dir():
        return levels_of_codes(checkpoint, group_size)
    order = load_file(checkpoint / GROUPS) if (checkpoint / GROUPS).exists() else {}
    found = []
    for file in sorted(checkpoint.glob("model*.safetensors")):
        for name, weight in load_file(file).items():
            if weight.dim() == 2 and re.search(r"\.\d+\.", name):
                together = order[name].argsort(stable=True) if name in order else slice(None)
                found.append(most_levels(weight[:, together], group_size))
    return found


def levels_of_codes(checkpoint: Path, group_size: int) -> list[int]:
    """As `count_levels`, of a run of jointq. Raises CannotRun where the checkpoint is something else than its codes."""
    weights = {
        name: weight for file in checkpoint.glob("model*.safetensors") for name, weight in load_file(file).items()
    }
    found = []
    for file in sorted((checkpoint.parent / CODES).glob("*.safetensors")):
        stored, weight = load_layer(file), weights[f"{file.stem}.weight"]
        if not torch.equal(stored.dequantize(weight.dtype), weight):
            raise CannotRun(f"{file.stem}: the checkpoint does not have what its codes give")
        inner = stored.inner if isinstance(stored, TurnedWeight) else stored
        found.append(most_levels(inner.dequantize(torch.float32), group_size))
    return found


def evaluate(place: Path, given: argparse.Namespace) -> dict[str, float]:
    """Perplexity and KL divergence from the source, with standard errors. Raises CannotRun."""
    runs = place / "evaluation"
    shutil.rmtree(runs, ignore_errors=True)
    text = ["evaluation=text", f"evaluation.path={given.text}"] if given.text else ["evaluation=pydoc"]
    command = [sys.executable, "-m", "jointq_cli", "evaluate", *text, f"model.path={place / 'checkpoint'}"]
    command += [f"reference={given.model}", f"evaluation.max_windows={given.windows}", f"store={given.work / 'store'}"]
    command += [f"evaluation.seqlen={given.seqlen}", "name=run", f"output_dir={runs}"]
    run_measured(command, place / "evaluation.txt", given.timeout, threads(given))
    (written,) = runs.glob("run/*/evaluation.json")
    report = json.loads(written.read_text())
    shutil.rmtree(runs)
    return {
        "perplexity": report["perplexity"]["value"],
        "perplexity_se": report["perplexity"]["standard_error"],
        "kl": report["comparison"]["kl_divergence"],
        "kl_se": report["comparison"]["kl_divergence_standard_error"],
    }


def measure(name: str, method: Method, bits: int, given: argparse.Namespace) -> dict[str, Any]:
    """The row of a tool, from DIR/NAME/result.json where it is there. What cannot run is tried again the next time."""
    place = given.work / f"{given.model.name}-w{bits}-g{given.group_size}-{name}"
    result, asked, process = place / "result.json", place / "asked.json", place / "process.json"
    settings = asked_for(method, given)
    if asked.exists() and json.loads(asked.read_text()) != settings and (result.exists() or process.exists()):
        sys.exit(f"{place}: has the result of other tokens, text or arguments; remove it, or take another --work")
    if result.exists():
        return dict(json.loads(result.read_text()))
    place.mkdir(parents=True, exist_ok=True)
    asked.write_text(json.dumps(settings, indent=1) + "\n")
    row: dict[str, Any] = {"model": given.model.name, "bits": bits, "group_size": given.group_size, "name": name}
    try:
        if not process.exists():
            process.write_text(json.dumps(quantise(method, bits, place, given)))
        row |= json.loads(process.read_text())
        levels = count_levels(place / "checkpoint", given.group_size)
        row |= {"matrices": len(levels), "most_levels": max(levels), "above": sum(n > 2**bits for n in levels)}
        row |= evaluate(place, given)
    except CannotRun as error:
        return row | {"reason": str(error)}
    result.write_text(json.dumps(row, indent=1) + "\n")
    if not given.keep:
        for written in ("checkpoint", CODES):
            shutil.rmtree(place / written, ignore_errors=True)
    return row


def asked_for(method: Method, given: argparse.Namespace) -> dict[str, Any]:
    """All that a row depends on besides its name: what DIR/NAME/asked.json has."""
    text = str(given.text.resolve()) if given.text else None
    tokens = hashlib.sha256(given.tokens.read_bytes()).hexdigest()
    return {
        "tool": method.tool, "words": list(method.arguments), "model": str(given.model), "tokens": tokens, "text": text,
        "windows": given.windows, "seqlen": given.seqlen,
    }  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, one line for each tool and number of bits, in the order of bits and KL divergence."""
    lines = [
        "| model | bits | | KL | perplexity | CPU s | GB | levels |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["model"], -row["bits"], row.get("kl", math.inf))):
        cells = [row["model"], str(row["bits"]), row["name"]]
        if "reason" in row:
            cells += [row["reason"].replace("|", "/"), "", "", "", ""]
        else:
            above = f" **of {row['above']} of {row['matrices']} matrices: too many**" if row["above"] else ""
            cells += [f"{row['kl']:.4f} ± {row['kl_se']:.4f}", f"{row['perplexity']:.2f} ± {row['perplexity_se']:.2f}"]
            cells += [f"{row['cpu_seconds']:.0f}", f"{row['peak_memory'] / 1e9:.1f}", f"{row['most_levels']}{above}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def another(text: str) -> tuple[str, Method]:
    """`NAME: TOOL ARGUMENT ...`, an argparse type."""
    name, _, rest = text.partition(":")
    tool, *arguments = rest.split() or [""]
    if not name.strip() or (tool != "jointq" and tool not in TOOLS):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME: TOOL ARGUMENT ..., with TOOL of jointq, {', '.join(TOOLS)}"
        )
    return name.strip(), Method(tool, tuple(arguments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder with a Hugging Face checkpoint")
    parser.add_argument("--tokens", type=Path, required=True, help="written by `jointq calibrate`, for all tools")
    parser.add_argument("--work", type=Path, required=True, help="virtual environments, logs, results")
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--peers", default=",".join(DEFAULT), help=f"of {', '.join(METHODS)}; default: %(default)s")
    parser.add_argument(
        "--also", action="append", default=[], type=another, metavar="'NAME: TOOL ARGUMENT ...'",
        help="one more row: a tool with settings of jointq quantize, or with options of its driver in peers/",
    )  # fmt: skip
    parser.add_argument("--text", type=Path, help="to measure on; without it held-out topics of pydoc")
    parser.add_argument("--windows", type=int, default=40, help="of the text")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens of a window of the text")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--timeout", type=float, default=7200, help="seconds of one process")
    parser.add_argument("--keep", action="store_true", help="the checkpoints too")
    given = parser.parse_args()
    given.model, given.tokens, given.work = given.model.resolve(), given.tokens.resolve(), given.work.resolve()
    unknown = sorted(set(given.peers.split(",")) - set(METHODS))
    if unknown:
        parser.error(f"--peers: {', '.join(unknown)} is not one of {', '.join(METHODS)}")
    methods = {name: METHODS[name] for name in given.peers.split(",")}
    methods |= dict(given.also)
    failed: list[dict[str, Any]] = []
    for bits in map(int, given.bits.split(",")):
        for name, method in methods.items():
            row = measure(name, method, bits, given)
            print(json.dumps(row), flush=True)
            failed += [row] if "reason" in row else []
            results = [json.loads(file.read_text()) for file in sorted(given.work.glob("*/result.json"))]
            (given.work / "table.md").write_text(table(results + failed))


if __name__ == "__main__":
    main()
