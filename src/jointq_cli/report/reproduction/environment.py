"""What surrounded two runs: machine, libraries and code, by their manifests; and which of it rounds otherwise."""

from collections.abc import Iterable, Mapping

from jointq_cli.report import number_format as units
from jointq_cli.report.reproduction.finished_run import Evidence, codes_file
from jointq_cli.system.machine import LIBRARIES

HARDWARE = ("device", "gpu", "cpu", "threads", "processes")
DIRTY = "-dirty"


def differences(original: Evidence, replay: Evidence) -> list[str]:
    """Such as "torch 2.9.0 → 2.13.0"."""
    ours, theirs = _surrounding(original), _surrounding(replay)
    return _told(dict.fromkeys([*ours, *theirs]), ours, theirs)


def that_can_round_otherwise(original: Evidence, replay: Evidence) -> list[str]:
    """Those of them that make the same code give other bits. A processor that one side does not tell proves nothing."""
    ours, theirs = _surrounding(original), _surrounding(replay)
    known = [name for name in HARDWARE if name != "cpu" or None not in (ours["cpu"], theirs["cpu"])]
    return _told([*LIBRARIES, *known], ours, theirs)


def not_known(original: Evidence, replay: Evidence) -> list[str]:
    """What may differ and would not be seen."""
    told = []
    commits = (original.manifest.commit, replay.manifest.commit)
    if commits[0] == commits[1]:
        if commits[0] is None:
            told.append("the code (no commit is recorded)")
        elif commits[0].endswith(DIRTY):
            told.append(f"the code (both have changes since commit {commits[0][:12]})")
    if None in (original.manifest.cpu, replay.manifest.cpu):
        told.append("the processor (not in both manifests)")
    if any(codes_file(layer.name) not in run.files for run in (original, replay) for layer in run.report.layers):
        told.append("the codes (hashes are missing)")
    return told


def _told(names: Iterable[str], ours: Mapping[str, str | None], theirs: Mapping[str, str | None]) -> list[str]:
    return [
        f"{name} {units.arrow(ours.get(name), theirs.get(name))}"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]


def _surrounding(run: Evidence) -> dict[str, str | None]:
    manifest = run.manifest
    return {
        **manifest.versions,
        "commit": _short(manifest.commit),
        "platform": manifest.platform,
        "device": manifest.device,
        "gpu": manifest.gpu,
        "cpu": manifest.cpu,
        "threads": str(manifest.threads),
        "processes": str(manifest.processes),
    }


def _short(commit: str | None) -> str | None:
    """Twelve digits, and whether there were changes."""
    return None if commit is None else commit[:12] + commit[40:]
