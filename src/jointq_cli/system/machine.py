"""What a run should remember of the machine and the software under it. Imports no torch."""

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

# Products in other instruction sets are rounded otherwise.
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
    """Bytes of the largest resident set this process has had since its program started.

    Counts what lies in main memory: shared libraries and touched pages of mapped files too, the memory of a
    GPU and of child processes not. Linux tells it as VmHWM; `ru_maxrss`, the portable figure, is only the
    second choice there, because a process inherits that of the parent which started it.
    """
    return _status("VmHWM") or _maximum_resident_set()


def available_memory() -> int:
    """Bytes that this process may have in all: what it has already and what is free, within its cgroup's limit."""
    own = _status("VmRSS") or 0
    limits = [room for room in (_free_memory(), _room_in_cgroup()) if room is not None]
    return own + min(limits) if limits else sys.maxsize


def free_disk(path: Path) -> int:
    """Bytes that may be written where `path` is, or will be."""
    return shutil.disk_usage(nearest_existing(path)).free


def release_freed_memory() -> None:
    """Gives freed heap pages back to the system, where the C library can (glibc).

    Blocks of weights and activations come and go by the hundred megabytes; without this the heap fragments, and the
    resident set grows with the number of blocks although no more of them are alive.
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
    """The processor's name, which of the instruction sets that decide how products are rounded it has, and the
    variables of the environment that keep libraries from using them."""
    limits = [f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ]
    return " ".join([*_processor(), *limits])


def _processor() -> list[str]:
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return [platform.processor() or platform.machine()]
    entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in told.splitlines())}
    name = entries.get("model name", platform.machine())
    flags = entries.get("flags", entries.get("Features", "")).split()  # as x86 and Arm call them
    return [name, *(known for known in INSTRUCTION_SETS if known in flags)]


def project_commit() -> str | None:
    """Commit of the checkout this package runs from, "-dirty" after changes; None when installed."""
    checkout = Path(__file__).parents[3]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.strip()


def _status(name: str, file: str = "/proc/self/status") -> int | None:
    """Bytes by a name of Linux's own tables, None where there are none."""
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


def _room_in_cgroup() -> int | None:
    """Limit less use of the control group (versions 2 and 1) that this process sees as its own."""
    for limit, use in CGROUPS:
        try:
            return int(Path(limit).read_text()) - int(Path(use).read_text()) + _reclaimable(Path(use).parent)
        except (OSError, ValueError):  # no such version, or "max"
            continue
    return None


def _reclaimable(group: Path) -> int:
    """Bytes of a control group that are files in memory, not used of late: a group's use counts them as well."""
    with suppress(OSError):
        told = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(told.get("total_inactive_file", told.get("inactive_file", 0)))
    return 0


def _maximum_resident_set() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere
