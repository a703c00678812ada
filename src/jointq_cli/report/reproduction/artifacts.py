"""Compares what two runs computed by the byte: rotation, codes, checkpoint. Says by how much, if the files exist."""

from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from jointq_cli.errors import ModelError
from jointq_cli.formats.base import StoredWeight
from jointq_cli.formats.layer_file import load_layer
from jointq_cli.records import COMPUTED, ComparedStep
from jointq_cli.report.number_format import before_after, percent, plural
from jointq_cli.report.reproduction.finished_run import CODES, FinishedRun, code_files, codes_file

ROTATION = "rotation/rotation.safetensors"
CHECKPOINT = "checkpoint/"
EXPORTS = "export/"


def rotation(original: FinishedRun, replay: FinishedRun) -> ComparedStep:
    ours, theirs = (run.report.rotation.hash if run.report.rotation else None for run in (original, replay))
    if ours == theirs:
        detail = ours[:16] + _by_manifest([ROTATION], original, replay) if ours else "none"
        return ComparedStep("rotation", COMPUTED, True, detail)
    how = _difference(ROTATION, original, replay, lambda *paths: _rotation_difference(*map(load_file, paths)))
    return ComparedStep(
        "rotation", COMPUTED, False, f"sha256 {before_after(ours and ours[:16], theirs and theirs[:16])}{how}"
    )


def codes(original: FinishedRun, replay: FinishedRun) -> ComparedStep:
    """Layer by layer, in the order of the model; files of layers that no report names come last."""
    layers = {layer.name: layer for run in (replay, original) for layer in run.report.layers}
    order = dict.fromkeys(layer.name for run in (original, replay) for layer in run.report.layers)
    files = dict.fromkeys([*map(codes_file, order), *code_files(original), *code_files(replay)])
    differing = _differing(files, original, replay)
    of_all = plural(len(files), "layer")
    if not files:
        return ComparedStep("codes", COMPUTED, False, "no hash of any layer")
    if not differing:
        return ComparedStep("codes", COMPUTED, True, of_all + _by_manifest(files, original, replay))
    name = differing[0].removeprefix(f"{CODES}/").removesuffix(".safetensors")
    block = f" (block {layers[name].block} of {len(original.report.blocks)})" if name in layers else ""
    others = f", and in {len(differing)} of {of_all}" if len(differing) > 1 else ""
    how = _difference(differing[0], original, replay, lambda *paths: _codes_difference(*map(load_layer, paths)))
    where = f"first in {name}{block}{others}{_no_hash(differing[0], original, replay)}"
    return ComparedStep("codes", COMPUTED, False, where + how.replace("; ", ": ", 1), original.position(name))


def checkpoint(original: FinishedRun, replay: FinishedRun) -> ComparedStep:
    if not any(name.endswith(".safetensors") for name in _files(CHECKPOINT, original, replay)):
        return ComparedStep("checkpoint", COMPUTED, False, "no hash of any weights")
    return _compared("checkpoint", CHECKPOINT, original, replay)


def exports(original: FinishedRun, replay: FinishedRun) -> ComparedStep:
    """The packed checkpoints that the recipe asks for."""
    return _compared("exports", EXPORTS, original, replay)


def _files(folder: str, original: FinishedRun, replay: FinishedRun) -> list[str]:
    return sorted(name for name in original.files | replay.files if name.startswith(folder))


def _compared(step: str, folder: str, original: FinishedRun, replay: FinishedRun) -> ComparedStep:
    """All files of a folder by their hashes."""
    files = _files(folder, original, replay)
    differing = _differing(files, original, replay)
    of_all = plural(len(files), "file")
    if not differing:
        detail = of_all + _by_manifest(files, original, replay) if files else "none"
        return ComparedStep(step, COMPUTED, True, detail)
    first = f"{differing[0].removeprefix(folder)} first{_no_hash(differing[0], original, replay)}"
    return ComparedStep(step, COMPUTED, False, f"{len(differing)} of {of_all}, {first}")


def _differing(files: Iterable[str], original: FinishedRun, replay: FinishedRun) -> list[str]:
    """Files whose hashes differ or are missing."""
    return [name for name in files if not (hash_ := original.files.get(name)) or hash_ != replay.files.get(name)]


def _no_hash(name: str, original: FinishedRun, replay: FinishedRun) -> str:
    return "" if name in original.files and name in replay.files else " (no hash)"


def _by_manifest(files: Iterable[str], original: FinishedRun, replay: FinishedRun) -> str:
    """A remark if some hashes are from a manifest because the file does not exist any more."""
    deleted = any(not (run.directory / name).is_file() for run in (original, replay) for name in files)
    return " (by the manifest; files not there)" if deleted else ""


def _difference(name: str, original: FinishedRun, replay: FinishedRun, describe: Callable[[Path, Path], str]) -> str:
    """ "; " and what `describe` says about the file of both runs; "" if either has been deleted."""
    ours, theirs = original.directory / name, replay.directory / name
    if not (ours.is_file() and theirs.is_file()):
        return ""
    try:
        return f"; {describe(ours, theirs)}"
    except (SafetensorError, OSError, ModelError, KeyError, ValueError):  # raised for damaged files
        return "; (file cannot be read)"


def _rotation_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    if ours.keys() != theirs.keys() or any(ours[name].shape != theirs[name].shape for name in ours):
        return "of other parts"
    gaps = {name: float((ours[name].double() - theirs[name].double()).abs().max()) for name in sorted(ours)}
    return ", ".join(f"{name} by up to {gap:.1e}" for name, gap in gaps.items() if gap)


def _codes_difference(ours: StoredWeight, theirs: StoredWeight) -> str:
    found = ours.difference(theirs)
    return ", ".join(each.text + (f" by up to {percent(each.relative)}" if each.relative else "") for each in found)
