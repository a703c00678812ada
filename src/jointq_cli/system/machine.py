"""The machine and the software that a run uses: versions, processor, memory, disk. Imports no torch."""

import ctypes
import os
import platform
import resource
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from jointq_cli import __version__
from jointq_cli.system.files import nearest_existing

LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "numpy",
    "numba",
    "hydra-core",
    "omegaconf",
)

# Matrix products are rounded differently with different instruction sets.
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "NUMBA_CPU_NAME")
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def versions() -> dict[str, str]:
    """Versions by name: this package, Python, and those libraries that decide a result and are installed."""
    found = {"jointq": __version__, "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def peak_memory() -> int:
    """The peak resident set size of this process, in bytes.

    Includes shared libraries and touched pages of mapped files; excludes GPU memory and child processes. Linux reports
    it as VmHWM. The portable `ru_maxrss` is only the fallback, because a process inherits its parent's value.
    """
    return _status("VmHWM") or _maximum_resident_set()


def available_memory() -> int:
    """Bytes that this process can use in total: its resident set and what is free, within its cgroup's limit."""
    own = _status("VmRSS") or 0
    limits = [free for free in (_free_memory(), _free_in_cgroup()) if free is not None]
    return own + min(limits) if limits else sys.maxsize


def free_disk(path: Path) -> int:
    """Free bytes on the disk where `path` is, or will be."""
    return shutil.disk_usage(nearest_existing(path)).free


def release_freed_memory() -> None:
    """Returns freed heap pages to the system, where the C library can (glibc's malloc_trim).

    Weights and activations of hundreds of megabytes are allocated and freed for every block; without this the heap
    fragments and the resident set grows with the number of blocks.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def cpu_count() -> int:
    """Cores that this process may use, which may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu() -> str:
    """The processor's name, its instruction sets among INSTRUCTION_SETS, and the environment variables that restrict
    which of them libraries use."""
    limits = [f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ]
    return " ".join([*_processor(), *limits])


def _processor() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return [platform.processor() or platform.machine()]
    entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    name = entries.get("model name", platform.machine())
    flags = entries.get("flags", entries.get("Features", "")).split()  # the names on x86 and Arm
    return [name, *(known for known in INSTRUCTION_SETS if known in flags)]


def project_commit() -> str | None:
    """The git commit of the checkout this package runs from, with "-dirty" if it has changes; None when installed."""
    checkout = Path(__file__).parents[3]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def _status(name: str, file: str = "/proc/self/status") -> int | None:
    """A value in bytes by its name in a table of Linux's /proc; None on other systems."""
    try:
        status = Path(file).read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def _free_memory() -> int | None:
    return _status("MemAvailable", "/proc/meminfo")


def _free_in_cgroup() -> int | None:
    """Limit minus usage of this process's control group (versions 2 and 1), in bytes."""
    for limit, usage in CGROUPS:
        try:
            return int(Path(limit).read_text()) - int(Path(usage).read_text()) + _reclaimable(Path(usage).parent)
        except (OSError, ValueError):  # no such version, or "max"
            continue
    return None


def _reclaimable(group: Path) -> int:
    """Bytes of inactive page cache, which a control group's usage includes although the kernel can free them."""
    with suppress(OSError):
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return 0


def _maximum_resident_set() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere
