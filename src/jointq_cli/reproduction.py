"""Whether two runs are the same run: compared in the order of the road, until it is known where they part.

What was made (rotation, codes, checkpoint) is compared by the byte. What was measured is compared to nine digits, since
the last ones depend on the order in which threads add. Runs no model and writes no file.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from jointq_cli.evidence import Evidence, codes_file
from jointq_cli.grid import QuantizedWeight
from jointq_cli.records import (
    ASKED,
    DIFFERENT,
    IDENTICAL,
    MADE,
    MEASURED,
    WITHIN_TOLERANCE,
    ReplayedFigure,
    Reproduction,
    RunReport,
    Step,
)
from jointq_cli.report import units
from jointq_cli.workspace import load_layer

ROUNDING = 1e-9  # relative: of sums in float64, which threads form in another order; one other code is far more
NAMES = ("name", "description", "output_dir", "store")  # what a run is called and where it lies
# Where something lies whose content the hashes tell, and the options of groups of which only that is left.
PLACES = ("model", "model.path", "calibration.path", "calibration.tokens", "evaluation.path")
DECIDING_RUNTIME = ("runtime.dtype", "runtime.batch_tokens")  # all else of `runtime` gives the same bits
HASHES = ("model", "calibration tokens", "evaluation windows")
TEXTS = {"calibration tokens": "calibration", "evaluation windows": "evaluation"}
TOLD_OF_A_TEXT = ("revision", "text_sha256", "tokenizer_sha256", "num_samples", "seqlen", "strategy", "seed")
MOST_NAMED = 3  # settings that differ


def decides(key: str) -> bool:
    """Whether a setting takes part in a run's result."""
    if key.split(".")[0] == "runtime":
        return key in DECIDING_RUNTIME
    return key not in NAMES and key not in PLACES


def compare(original: Evidence, replay: Evidence, tolerance: float | None = None) -> Reproduction:
    """tolerance: relative, on both perplexities and on KL divergence, for runs that were asked for the same on the
    same tokens; None for runs that must be identical."""
    figures = list(_figures(original.report, replay.report))
    steps = [
        _config(original, replay),
        *(_hash(name, original, replay) for name in HASHES),
        _rotation(original, replay),
        _codes(original, replay),
        _checkpoint(original, replay),
        _records("layers", _layer_records(original.report), _layer_records(replay.report)),
        _records("blocks", _block_records(original.report), _block_records(replay.report)),
        *map(_figure_step, figures),
    ]
    return Reproduction(
        original=str(original.directory),
        replay=str(replay.directory),
        verdict=_verdict(steps, figures, tolerance),
        steps=steps,
        surroundings=list(_surroundings(original, replay)),
        figures=figures,
        tolerance=tolerance,
    )


def _verdict(steps: Sequence[Step], figures: Sequence[ReplayedFigure], tolerance: float | None) -> str:
    if all(step.same for step in steps):
        return IDENTICAL
    comparable = all(step.same for step in steps if step.part == ASKED)
    if tolerance is not None and comparable and all(abs(figure.change) <= tolerance for figure in figures):
        return WITHIN_TOLERANCE
    return DIFFERENT


# --- what was asked


def _config(original: Evidence, replay: Evidence) -> Step:
    ours, theirs = original.settings, replay.settings
    keys = [key for key in dict.fromkeys([*ours, *theirs]) if decides(key) and ours.get(key) != theirs.get(key)]
    # Settings that came with later code have a value for earlier runs too: if it is not theirs, the results will tell.
    new = [key for key in keys if key not in ours] if _code(original) != _code(replay) else []
    differing = [key for key in keys if key not in new]
    told = [f"{key} {_arrow(ours.get(key), theirs.get(key))}" for key in differing[:MOST_NAMED]]
    told += [f"{len(differing) - MOST_NAMED} more"] if len(differing) > MOST_NAMED else []
    told += [f"new since: {', '.join(f'{key}={theirs[key]}' for key in new)}"] if new else []
    return Step("config", ASKED, not differing, ", ".join(told))


def _code(run: Evidence) -> tuple[str | None, str | None]:
    return run.manifest.versions.get("jointq"), run.manifest.commit


def _hash(name: str, original: Evidence, replay: Evidence) -> Step:
    ours, theirs = original.manifest.hashes.get(name), replay.manifest.hashes.get(name)
    if ours == theirs and ours is not None:
        return Step(name, ASKED, True, ours[:16])
    told = [f"sha256 {_arrow(ours and ours[:16], theirs and theirs[:16])}"]
    if name in TEXTS:
        told += _texts(*(run.manifest.texts.get(TEXTS[name], {}) for run in (original, replay)))
    return Step(name, ASKED, False, "; ".join(told))


def _texts(ours: Mapping[str, str], theirs: Mapping[str, str]) -> Iterator[str]:
    """Why two texts are not the same, as far as is known."""
    for key in TOLD_OF_A_TEXT:
        if ours.get(key) != theirs.get(key):
            digits = 16 if key.endswith("sha256") else None
            yield f"{key} {_arrow(*(value and value[:digits] for value in (ours.get(key), theirs.get(key))))}"
    if "pydoc" in (ours.get("dataset"), theirs.get("dataset")) and ours.get("revision") != theirs.get("revision"):
        yield "the text pydoc is the documentation of the Python that runs"


# --- what was made


def _rotation(original: Evidence, replay: Evidence) -> Step:
    ours, theirs = (None if run.report.rotation is None else run.report.rotation.hash for run in (original, replay))
    if ours == theirs:
        return Step("rotation", MADE, True, ours[:16] if ours else "none")
    told = f"sha256 {_arrow(ours and ours[:16], theirs and theirs[:16])}"
    paths = _both("rotation/rotation.safetensors", original, replay)
    return Step("rotation", MADE, False, "; ".join([told, *([_rotation_difference(*paths)] if paths else [])]))


def _rotation_difference(ours: Path, theirs: Path) -> str:
    first, second = load_file(ours), load_file(theirs)
    if first.keys() != second.keys() or any(first[name].shape != second[name].shape for name in first):
        return "of other parts"
    gaps = {name: float((first[name].double() - second[name].double()).abs().max()) for name in sorted(first)}
    return ", ".join(f"{name} by up to {gap:.1e}" for name, gap in gaps.items() if gap)


def _codes(original: Evidence, replay: Evidence) -> Step:
    names = dict.fromkeys(layer.name for run in (original, replay) for layer in run.report.layers)
    differing = [name for name in names if original.files.get(codes_file(name)) != replay.files.get(codes_file(name))]
    if not differing:
        return Step("codes", MADE, True, units.plural(len(names), "layer"))
    told = f"first in {differing[0]}{_position(differing[0], original.report)}"
    if len(differing) > 1:
        told += f", and in {len(differing)} of {units.plural(len(names), 'layer')}"
    paths = _both(codes_file(differing[0]), original, replay)
    how = f": {_codes_difference(*map(load_layer, paths))}" if paths else ""
    return Step("codes", MADE, False, told + how)


def _position(name: str, report: RunReport) -> str:
    found = [layer.block for layer in report.layers if layer.name == name]
    return f" (block {found[0]} of {len(report.blocks)})" if found else ""


def _codes_difference(ours: QuantizedWeight, theirs: QuantizedWeight) -> str:
    if ours.codes.shape != theirs.codes.shape or ours.scale.shape != theirs.scale.shape:
        return "of another shape"
    told = [f"{int((ours.codes.int() != theirs.codes.int()).sum())} of {ours.codes.numel()} codes"]
    scales, others = ours.scale.double(), theirs.scale.double()
    gap = ((others - scales).abs() / scales).max().item()
    if gap:
        told.append(f"{int((scales != others).sum())} of {scales.numel()} scales by up to {units.percent(gap)}")
    moved = int((ours.zero_point.int() != theirs.zero_point.int()).sum())
    if moved:
        told.append(f"{moved} of {ours.zero_point.numel()} zero-points")
    if not ours.column_groups().equal(theirs.column_groups()):
        told.append("columns in other groups")
    return ", ".join(told)


def _checkpoint(original: Evidence, replay: Evidence) -> Step:
    names = sorted(name for name in original.files | replay.files if name.startswith("checkpoint/"))
    differing = [name for name in names if original.files.get(name) != replay.files.get(name)]
    if not differing:
        return Step("checkpoint", MADE, True, units.plural(len(names), "file"))
    first = differing[0].removeprefix("checkpoint/")
    return Step("checkpoint", MADE, False, f"{len(differing)} of {units.plural(len(names), 'file')}, {first} first")


def _both(name: str, original: Evidence, replay: Evidence) -> tuple[Path, Path] | None:
    """The file in both runs, if neither has been deleted."""
    ours, theirs = original.directory / name, replay.directory / name
    return (ours, theirs) if ours.is_file() and theirs.is_file() else None


# --- what was measured

Record = dict[str, Any]


def _layer_records(report: RunReport) -> dict[str, Record]:
    return {layer.name: _but_for_time(dataclasses.asdict(layer)) for layer in report.layers}


def _block_records(report: RunReport) -> dict[str, Record]:
    return {f"block {block.block}": dataclasses.asdict(block) for block in report.blocks}


def _but_for_time(record: Record) -> Record:
    """With its notes as entries of their own."""
    notes = {f"notes.{name}": value for name, value in record["notes"].items()}
    return {key: value for key, value in (record | notes).items() if key not in ("seconds", "notes")}


def _records(name: str, ours: dict[str, Record], theirs: dict[str, Record]) -> Step:
    gaps = {key: _record_gaps(ours.get(key, {}), theirs.get(key, {})) for key in ours | theirs}
    differing = [key for key, found in gaps.items() if max(found.values(), default=0.0) > ROUNDING]
    if differing:
        first = differing[0]
        key = next(key for key, gap in gaps[first].items() if gap > ROUNDING)
        values = _values(*(side.get(first, {}).get(key) for side in (ours, theirs)))
        return Step(name, MEASURED, False, f"{len(differing)} of {len(gaps)}, {first} first: {key} {values}")
    largest = max((gap for found in gaps.values() for gap in found.values()), default=0.0)
    return Step(name, MEASURED, True, f"{units.plural(len(gaps), 'record')}{_rounding(largest)}")


def _values(ours: Any, theirs: Any) -> str:
    if isinstance(ours, float) and isinstance(theirs, float):
        values = _arrow(units.significant(ours), units.significant(theirs))
        return f"{values} ({_change_in_words(_change(ours, theirs))})"
    return _arrow(*(value if value is None else str(value) for value in (ours, theirs)))


def _record_gaps(ours: Record, theirs: Record) -> dict[str, float]:
    return {key: _gap(ours.get(key), theirs.get(key)) for key in dict.fromkeys([*ours, *theirs])}


def _gap(ours: Any, theirs: Any) -> float:
    """0 for equal values, the relative difference of numbers, infinity for whatever else is not the same."""
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return max(map(_gap, ours, theirs), default=0.0)
    if ours == theirs or (_is_nan(ours) and _is_nan(theirs)):
        return 0.0
    if isinstance(ours, float) and isinstance(theirs, float):
        return abs(_change(ours, theirs))
    return math.inf


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _change(ours: float, theirs: float) -> float:
    """Relative to `ours`; infinite where there is no such thing."""
    if ours == theirs or (math.isnan(ours) and math.isnan(theirs)):
        return 0.0
    change = (theirs - ours) / abs(ours) if ours else math.inf
    return math.inf if math.isnan(change) else change


def _rounding(gap: float) -> str:
    return f", but for sums' last digits: {gap:.0e} at most" if gap else ""


def _figures(ours: RunReport, theirs: RunReport) -> Iterator[ReplayedFigure]:
    measured: dict[str, Callable[[RunReport], float]] = {
        "original perplexity": lambda report: report.original.value,
        "quantised perplexity": lambda report: report.quantized.value,
        "KL divergence": lambda report: report.comparison.kl_divergence,
    }
    for name, value in measured.items():
        yield ReplayedFigure(name, value(ours), value(theirs), _change(value(ours), value(theirs)))


def _figure_step(figure: ReplayedFigure) -> Step:
    if abs(figure.change) <= ROUNDING:
        return Step(figure.name, MEASURED, True, f"{units.significant(figure.original)}{_rounding(abs(figure.change))}")
    return Step(figure.name, MEASURED, False, _values(figure.original, figure.replay))


def _change_in_words(change: float) -> str:
    """Also of what four digits do not show."""
    return units.change(change) if abs(change) >= 1e-4 else f"{change:+.1e}"


# --- what surrounded it


def _surroundings(original: Evidence, replay: Evidence) -> Iterator[str]:
    for name, (ours, theirs) in _pairs(_surrounding(original), _surrounding(replay)):
        if ours != theirs:
            yield f"{name} {_arrow(ours, theirs)}"


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


def _pairs(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterable[tuple[str, tuple[Any, Any]]]:
    return [(name, (ours.get(name), theirs.get(name))) for name in dict.fromkeys([*ours, *theirs])]


def _arrow(ours: str | None, theirs: str | None) -> str:
    return " → ".join("not there" if value is None else value for value in (ours, theirs))
