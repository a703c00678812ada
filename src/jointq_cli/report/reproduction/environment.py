"""Machine, libraries and code of two runs, from their manifests, and which of these can change rounding."""

from collections.abc import Iterable, Mapping

from jointq_cli.report.number_format import before_after
from jointq_cli.report.reproduction.finished_run import FinishedRun, codes_file
from jointq_cli.system.machine import LIBRARIES

HARDWARE = ("device", "gpu", "cpu", "threads", "processes")
DIRTY = "-dirty"


def differences(original: FinishedRun, replay: FinishedRun) -> list[str]:
    """Such as "torch 2.9.0 → 2.13.0"."""
    ours, theirs = _environment(original), _environment(replay)
    return _changes(dict.fromkeys([*ours, *theirs]), ours, theirs)


def rounding_differences(original: FinishedRun, replay: FinishedRun) -> list[str]:
    """Those with which the same code can compute other bits. A processor that one manifest lacks does not count."""
    ours, theirs = _environment(original), _environment(replay)
    known = [name for name in HARDWARE if name != "cpu" or None not in (ours["cpu"], theirs["cpu"])]
    return _changes([*LIBRARIES, *known], ours, theirs)


def unknown(original: FinishedRun, replay: FinishedRun) -> list[str]:
    """What may differ unnoticed, because it is not recorded."""
    found = []
    commits = (original.manifest.commit, replay.manifest.commit)
    if commits[0] == commits[1]:
        if commits[0] is None:
            found.append("the code (no commit is recorded)")
        elif commits[0].endswith(DIRTY):
            found.append(f"the code (both have changes since commit {commits[0][:12]})")
    if None in (original.manifest.cpu, replay.manifest.cpu):
        found.append("the processor (not in both manifests)")
    if any(codes_file(layer.name) not in run.files for run in (original, replay) for layer in run.report.layers):
        found.append("the codes (hashes are missing)")
    return found


def _changes(names: Iterable[str], ours: Mapping[str, str | None], theirs: Mapping[str, str | None]) -> list[str]:
    pairs = {name: (ours.get(name), theirs.get(name)) for name in names}
    return [f"{name} {before_after(*pair)}" for name, pair in pairs.items() if pair[0] != pair[1]]


def _environment(run: FinishedRun) -> dict[str, str | None]:
    manifest = run.manifest
    hardware = {name: getattr(manifest, name) for name in HARDWARE}
    return {
        **manifest.versions,
        "commit": manifest.commit and manifest.commit[:12] + manifest.commit[40:],  # which may end in DIRTY
        "platform": manifest.platform,
        **{name: None if value is None else str(value) for name, value in hardware.items()},
    }
